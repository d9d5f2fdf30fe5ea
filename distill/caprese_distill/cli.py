"""`caprese distill`: from a model and samples to an adapter file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import shlex
import tempfile
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, LayerChoice
from caprese_kernels.errors import CapreseError

if TYPE_CHECKING:
    from collections import Counter

    from .data.samples import Row, Sample

INSTRUCTION = "Please reason step by step."  # of every training sample of the paper, section 3.4
SAMPLES = 20_000  # as many


class Stage(StrEnum):
    layer_wise = "layer-wise"
    end_to_end = "end-to-end"


class Solver(StrEnum):
    closed_form = "closed-form"
    adam = "adam"


class Weighting(StrEnum):
    none = "none"
    gradient = "gradient"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def distill(
    model: Annotated[str, typer.Argument(help="Model directory, or Hub id.")],
    data: Annotated[
        str,
        typer.Option(
            help="JSONL, .parquet or .csv file, directory of such files, or Hub dataset as owner/name:config@split."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Adapter file to write.")] = Path("adapters.safetensors"),
    method: Annotated[str, typer.Option(metavar="griffin|cats", help="Sparse method.")] = "griffin",
    density: Annotated[float, typer.Option(help="Share of neurons that a generated token keeps.")] = DEFAULT_DENSITY,
    rank: Annotated[int, typer.Option(help="Rank r of the low-rank layers.")] = DEFAULT_RANK,
    stage: Annotated[
        Stage, typer.Option(help="Where to stop: end-to-end begins with layer-wise, and is several times its time.")
    ] = Stage.end_to_end,
    solver: Annotated[
        Solver, typer.Option(help="Layer-wise: the optimum in one pass, or the paper's many epochs, to compare.")
    ] = Solver.closed_form,
    weighting: Annotated[
        Weighting,
        typer.Option(help="Closed form: again, tokens weighted by the gradient of the model's output; one pass more."),
    ] = Weighting.none,
    layers: Annotated[
        str | None,
        typer.Option(help="first-half, all, or indices as 0,1,2; by default first-half for griffin, all for cats."),
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(help="Text or chat messages; by default prompt, question, problem ..., the first there."),
    ] = None,
    response_column: Annotated[
        str | None,
        typer.Option(help="By default response, solution, answer ...; or the messages' last, the assistant's."),
    ] = None,
    instruction: Annotated[
        str, typer.Option(help="Put before every prompt that has it not, as in the paper; '' for none.")
    ] = INSTRUCTION,
    samples: Annotated[int, typer.Option(min=2, help="Rows to use at most, drawn by the seed.")] = SAMPLES,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Let the model answer the prompts itself, by vLLM; no responses are read."),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="--generate: by default as the model's generation_config; else greedy.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=2, help="--generate: longest response; by default what --max-length leaves.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='--generate: arguments of vllm.LLM, as {"tensor_parallel_size": 4}.'),
    ] = None,
    max_length: Annotated[
        int,
        typer.Option(min=1, help="Longer samples (in tokens) are skipped; so are those beyond the model's positions."),
    ] = 2048,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of model and adapters; auto is the checkpoint's.")] = Dtype.auto,
    device: Annotated[
        Device, typer.Option(help="Where the model runs; auto is cuda where there is one.")
    ] = Device.auto,
    learning_rate: Annotated[
        float | None, typer.Option(help="End to end; default 2e-4 for hidden size 2048 or less, 4e-6 for 8192 or more.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="End to end: samples of a step.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="End to end: passes over the samples.")] = 3,
    layer_wise_learning_rate: Annotated[float, typer.Option(help="With --solver adam.")] = 1e-3,
    layer_wise_batch: Annotated[int, typer.Option(min=1, help="With --solver adam: samples of a step.")] = 128,
    layer_wise_epochs: Annotated[int, typer.Option(min=1, help="With --solver adam: passes over the samples.")] = 20,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="End to end: compute activations again instead of keeping them.")
    ] = True,
    tensorboard: Annotated[Path | None, typer.Option(help="End to end: directory for TensorBoard's logs.")] = None,
    device_map: Annotated[
        str | None,
        typer.Option(metavar="auto", help="Spread a model too big for a GPU over all, then CPU memory, by accelerate."),
    ] = None,
    num_workers: Annotated[
        int,
        typer.Option(min=1, help="Processes (each with a GPU, on cuda) to share the data, by Ray; 1 is without Ray."),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the choice of rows and of the order of training.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, memory and time after a few batches, and end; write nothing.")
    ] = False,
) -> None:
    """Make adapters that give back what a sparse FF block loses.

    An interrupted run goes on where it was when the same command is given again.
    """
    from .data.sources import read_source

    command = {
        "--data": data,
        "--output": output,
        "--method": method,
        "--density": density,
        "--rank": rank,
        "--stage": stage,
        "--solver": solver,
        "--weighting": weighting,
        "--layers": layers,
        "--prompt-column": prompt_column,
        "--response-column": response_column,
        "--instruction": instruction,
        "--samples": samples,
        "--temperature": temperature,
        "--max-new-tokens": max_new_tokens,
        "--engine": engine,
        "--max-length": max_length,
        "--dtype": dtype,
        "--device": device,
        "--learning-rate": learning_rate,
        "--batch": batch,
        "--epochs": epochs,
        "--device-map": device_map,
        "--num-workers": num_workers,
        "--seed": seed,
    }
    if solver == Solver.adam:
        command |= {
            "--layer-wise-learning-rate": layer_wise_learning_rate,
            "--layer-wise-batch": layer_wise_batch,
            "--layer-wise-epochs": layer_wise_epochs,
        }
    given = [word for key, value in command.items() if value is not None for word in (key, str(value))]
    given += ["--generate"] if generate else []
    given += [] if gradient_checkpointing else ["--no-gradient-checkpointing"]
    choice = _parse_layers(layers)
    arguments = _parse_engine(engine)
    unused = [name for name in ("--temperature", "--max-new-tokens", "--engine") if command[name] is not None]
    if unused and not generate:
        raise CapreseError(unused[0], expected="--generate beside it", found="none", fix=f"take out {unused[0]}")
    weighted = weighting == Weighting.gradient
    if weighted and solver == Solver.adam:
        raise CapreseError(
            "--weighting", expected="--solver closed-form", found="--solver adam", fix="leave one of them out"
        )
    if dry_run and generate:
        raise CapreseError(
            "--dry-run",
            expected="responses to count",
            found="--generate beside it",
            fix="leave one of them out; an interrupted --generate keeps what it has",
        )
    if solver == Solver.adam and (num_workers > 1 or device_map is not None):
        raise CapreseError(
            "--solver", expected="closed-form with --num-workers and --device-map", found="adam", fix="take one out"
        )
    if weighted and (num_workers > 1 or device_map is not None):
        raise CapreseError(
            "--weighting", expected="none with --num-workers and --device-map", found="gradient", fix="take one out"
        )
    if device_map is not None and (device_map != "auto" or num_workers > 1):
        raise CapreseError(
            "--device-map",
            expected="auto, in one process that has all the GPUs",
            found=f"{device_map} with --num-workers {num_workers}",
            fix="use one of the two options",
        )
    for name, given_rate in (("", learning_rate), ("layer-wise-", layer_wise_learning_rate)):
        if given_rate is not None and not 0 < given_rate < math.inf:
            raise CapreseError(
                f"--{name}learning-rate", expected="a number above 0", found=f"{given_rate:g}", fix="correct it"
            )
    if tensorboard is not None:
        _check_tensorboard(tensorboard)
    source = read_source(
        data,
        samples,
        seed,
        prompt_column=prompt_column,
        response_column=response_column,
        responses=not generate,
        instruction=instruction,
    )
    rows, told = source.rows, source.provenance
    _check_writable(output)

    import torch

    from .blocks import find_blocks, plan
    from .card import write_card
    from .data.generate import Generation, generate_samples
    from .end_to_end.train import Recipe, default_learning_rate
    from .estimate import check_disk, check_memory, estimate_memory, estimate_seconds
    from .layer_wise.adam import AdamSettings
    from .loading import find_device, load_skeleton, load_small_parts, longest, stored_dtype
    from .report import Resources, report, report_estimate, report_plan
    from .stages import clean_up, held_bytes, remaining, run_stages, save

    notes = Console(stderr=True)
    target = find_device("auto" if num_workers > 1 else device)  # Ray's workers may have GPUs that this machine lacks
    notes.print(str(source), highlight=False, markup=False)
    config, tokenizer = load_small_parts(model)
    info, resolved = plan(config, model, method, density, rank, choice)
    skeleton = load_skeleton(model, config, dtype)
    find_blocks(skeleton, info, resolved.layers)
    if tokenizer.chat_template is None:
        notes.print("the tokenizer has no chat template: prompts are used as plain text")
    made = None
    if generate:
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = Generation(temperature, max_new_tokens, seed, dtype, arguments)
        made = generate_samples(rows, tokenizer, model, config, output, settings, max_length, notes)
        encoded = _usable(made.samples, made.skipped, len(rows), data, notes)
        told |= {"generated": made.provenance}
    else:
        encoded = _encode(tokenizer, rows, longest(config, max_length), data, notes)
    fed = sum(s.num_rows for s in encoded)
    if fed < info.hidden_size:
        notes.print(f"only {fed} response tokens for hidden size {info.hidden_size}: expect little; give more samples")
    rate = default_learning_rate(info.hidden_size) if learning_rate is None else learning_rate
    recipe, adam = None, None
    if stage == Stage.end_to_end:
        recipe = Recipe(rate, batch, epochs, seed=seed, gradient_checkpointing=gradient_checkpointing)
    if solver == Solver.adam:
        adam = AdamSettings(layer_wise_learning_rate, layer_wise_batch, layer_wise_epochs, seed=seed)
    memory = estimate_memory(skeleton, encoded, info, resolved, recipe, target, stored_dtype(config), adam, weighted)
    screen = Console() if dry_run else notes
    report_plan(screen, skeleton, info, resolved, recipe, encoded, len(rows), memory, adam, weighted)
    check_disk(memory, output, held_bytes(output))
    # Of one process on one device: what several share, or how they go on after a kill, is not estimated.
    alone = num_workers == 1 and device_map is None
    warning = check_memory(memory, target) if alone else None
    if warning:
        notes.print(warning)
    if dry_run and not alone:
        screen.print("time: only estimated for one process on one device")
        return
    try:
        network, resources = _place(model, dtype, device, device_map, num_workers, output), None
        if alone:
            left = remaining(network, encoded, resolved, recipe, output, adam, weighted)
            seconds = estimate_seconds(network, info, resolved, recipe, encoded, left, adam)
            resources = Resources(memory, seconds, target)
            report_estimate(screen, resources, left)
        if dry_run:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        adapters = run_stages(network, encoded, info, resolved, recipe, output, notes, tensorboard, adam, weighted)
    except torch.OutOfMemoryError as error:
        raise CapreseError(
            "device memory",
            expected="enough for the model and a sample",
            found=str(error),
            fix="use a lower --max-length, or --stage layer-wise",
        ) from None
    except KeyboardInterrupt:
        if not dry_run:
            notes.print("interrupted; the same command goes on from the last checkpoint")
        raise
    adapters.config.training |= {
        "data": told,
        "command": shlex.join(["caprese", "distill", model, *given]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "resources": resources.record() if resources else None,
    }
    save(adapters, output)
    kept = made.keep() if made else None  # before what a killed run needs goes
    clean_up(output)
    report(adapters, output, write_card(adapters, output))
    if kept:
        notes.print(f"responses kept in {kept}: --data reads them", highlight=False, markup=False)


def _place(model: str, dtype: Dtype, device: Device, device_map: str | None, num_workers: int, output: Path) -> Any:
    """The model, loaded in this process; or the cluster.Cluster whose workers load it."""
    from .loading import find_device, load_model, load_model_on

    if device_map is not None:
        return load_model(model, str(dtype), device_map)
    if num_workers == 1:
        return load_model_on(model, dtype, find_device(device))
    from .scale.cluster import Cluster, connect
    from .stages import scratch_path

    where, resources = connect(num_workers, device)
    name = str(Path(model).absolute()) if Path(model).is_dir() else model  # workers have directories of their own
    load = partial(load_model_on, name, str(dtype), where)
    return Cluster(load, num_workers, resources, scratch_path(output))


def _parse_layers(text: str | None) -> LayerChoice | None:
    names: dict[str | None, LayerChoice | None] = {None: None, "all": "all", "first-half": "first-half"}
    if text in names:
        return names[text]
    if text and re.fullmatch(r"\d+(,\d+)*", text):
        return [int(i) for i in text.split(",")]
    raise CapreseError("--layers", expected="first-half, all, or indices as 0,1,2", found=repr(text), fix="correct it")


def _check_writable(output: Path) -> None:
    """Fail before the work, not after it."""
    if output.is_dir():
        raise _unwritable(output, "a directory")
    try:
        with tempfile.TemporaryFile(dir=next(p for p in output.absolute().parents if p.exists())):
            pass
    except OSError as error:
        raise _unwritable(output, error.strerror or str(error)) from None


def _check_tensorboard(logs: Path) -> None:
    """Fail before the layer-wise stage, not after it."""
    if importlib.util.find_spec("tensorboard") is None:
        raise CapreseError(
            "--tensorboard",
            expected="the package tensorboard",
            found="none",
            fix='pip install "caprese-vllm[distill]"',
        )
    if any(path.exists() and not path.is_dir() for path in (logs, *logs.parents)):
        raise CapreseError("--tensorboard", expected="a directory", found=f"a file at {logs}", fix="give another path")


def _unwritable(output: Path, found: str) -> CapreseError:
    return CapreseError(
        f"output {output}", expected="a file that can be written", found=found, fix="give another --output"
    )


def _parse_engine(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        value = error
    if isinstance(value, dict):
        return value
    raise CapreseError("--engine", expected="a JSON object", found=f"{text!r}", fix="correct it")


def _encode(tokenizer: Any, rows: list[Row], max_length: int, data: str, notes: Console) -> list[Sample]:
    from .data.samples import encode
    from .progress import progress_bar

    with progress_bar(notes, "rows/s") as bar:
        line = bar.add_task("tokens", total=len(rows))
        encoded, skipped = encode(tokenizer, rows, max_length, lambda: bar.advance(line))
    return _usable(encoded, skipped, len(rows), data, notes)


def _usable(samples: list[Sample], skipped: Counter[str], rows: int, data: str, notes: Console) -> list[Sample]:
    """The samples, if they are enough; what was skipped is told."""
    told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if len(samples) < 2:
        raise CapreseError(
            f"samples of {data}",
            expected="2 or more usable (one is held out)",
            found=f"{len(samples)} of {rows}" + (f" ({told})" if told else ""),
            fix="give more data, or a higher --max-length",
        )
    if skipped:
        notes.print(f"skipped {skipped.total()} of {rows} samples: {told}")
    return samples
