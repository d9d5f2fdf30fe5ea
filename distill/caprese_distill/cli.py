"""`caprese distill`: from a model and samples to an adapter file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import shlex
import tempfile
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, LayerChoice
from caprese_kernels.errors import CapreseError

if TYPE_CHECKING:
    from .data import Row, Sample


class Stage(StrEnum):
    layer_wise = "layer-wise"
    end_to_end = "end-to-end"


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
    data: Annotated[Path, typer.Option(help="JSONL file of rows with `prompt` (text or messages) and `response`.")],
    output: Annotated[Path, typer.Option(help="Adapter file to write.")] = Path("adapters.safetensors"),
    method: Annotated[str, typer.Option(metavar="griffin|cats", help="Sparse method.")] = "griffin",
    density: Annotated[float, typer.Option(help="Share of neurons that a generated token keeps.")] = DEFAULT_DENSITY,
    rank: Annotated[int, typer.Option(help="Rank r of the low-rank layers.")] = DEFAULT_RANK,
    stage: Annotated[
        Stage, typer.Option(help="Where to stop: end-to-end begins with layer-wise, and is several times its time.")
    ] = Stage.end_to_end,
    layers: Annotated[
        str | None,
        typer.Option(help="first-half, all, or indices as 0,1,2; by default first-half for griffin, all for cats."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Rows to use, drawn by the seed; default all.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Longer samples (in tokens) are skipped.")] = 2048,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of model and adapters; auto is the checkpoint's.")] = Dtype.auto,
    device: Annotated[
        Device, typer.Option(help="Where the model runs; auto is cuda where there is one.")
    ] = Device.auto,
    learning_rate: Annotated[
        float | None, typer.Option(help="End to end; default 2e-4 for hidden size 2048 or less, 4e-6 for 8192 or more.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="End to end: samples of a step.")] = 16,
    epochs: Annotated[int, typer.Option(min=1, help="End to end: passes over the samples.")] = 3,
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
) -> None:
    """Make adapters that give back what a sparse FF block loses.

    An interrupted run goes on where it was when the same command is given again.
    """
    from .data import read_rows

    command = {
        "--data": data,
        "--output": output,
        "--method": method,
        "--density": density,
        "--rank": rank,
        "--stage": stage,
        "--layers": layers,
        "--samples": samples,
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
    given = [word for key, value in command.items() if value is not None for word in (key, str(value))]
    choice = _parse_layers(layers)
    rows = read_rows(data, samples, seed)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    _check_writable(output)

    import torch

    from .blocks import plan
    from .end_to_end import Recipe, default_learning_rate
    from .loading import load_small_parts
    from .report import report
    from .stages import clean_up, run_stages

    notes, place = Console(stderr=True), _place(model, dtype, device, device_map, num_workers, output)
    config, tokenizer = load_small_parts(model)
    info, resolved = plan(config, model, method, density, rank, choice)
    encoded = _encode(tokenizer, rows, max_length, data, notes)
    fed = sum(s.num_rows for s in encoded)
    if fed < info.hidden_size:
        notes.print(f"only {fed} response tokens for hidden size {info.hidden_size}: expect little; give more samples")
    rate = default_learning_rate(info.hidden_size) if learning_rate is None else learning_rate
    recipe = Recipe(rate, batch, epochs, seed=seed, gradient_checkpointing=gradient_checkpointing)
    try:
        adapters = run_stages(
            place(), encoded, info, resolved, recipe if stage == Stage.end_to_end else None, output, notes, tensorboard
        )
    except torch.OutOfMemoryError as error:
        raise CapreseError(
            "device memory",
            expected="enough for the model and a sample",
            found=str(error),
            fix="use a lower --max-length, or --stage layer-wise",
        ) from None
    except KeyboardInterrupt:
        notes.print("interrupted; the same command goes on from the last checkpoint")
        raise
    adapters.config.training |= {
        "data": {"file": data.name, "sha256": digest},
        "command": shlex.join(["caprese", "distill", model, *given]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
    }
    try:
        adapters.save(output)
    except OSError as error:
        raise _unwritable(output, error.strerror or str(error)) from None
    clean_up(output)
    report(adapters, output)


def _place(
    model: str, dtype: Dtype, device: Device, device_map: str | None, num_workers: int, output: Path
) -> Callable[[], Any]:
    """What gives the model in this process; or workers that each have it, this process then having none."""
    from .loading import find_device, load_model, load_model_on

    if device_map is not None:
        if device_map != "auto" or num_workers > 1:
            raise CapreseError(
                "--device-map",
                expected="auto, in one process that has all the GPUs",
                found=f"{device_map} with --num-workers {num_workers}",
                fix="use one of the two options",
            )
        return partial(load_model, model, str(dtype), device_map)
    if num_workers == 1:
        return partial(load_model_on, model, dtype, find_device(device))
    from .cluster import Cluster, connect
    from .stages import scratch_path

    where, resources = connect(num_workers, device)
    name = str(Path(model).absolute()) if Path(model).is_dir() else model  # workers have directories of their own
    load = partial(load_model_on, name, str(dtype), where)
    return partial(Cluster, load, num_workers, resources, scratch_path(output))


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
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise _unwritable(output, error.strerror or str(error)) from None


def _unwritable(output: Path, found: str) -> CapreseError:
    return CapreseError(
        f"output {output}", expected="a file that can be written", found=found, fix="give another --output"
    )


def _encode(tokenizer: Any, rows: list[Row], max_length: int, data: Path, notes: Console) -> list[Sample]:
    from rich.progress import Progress

    from .data import encode

    if tokenizer.chat_template is None:
        notes.print("the tokenizer has no chat template: prompts are used as plain text")
    with Progress(console=notes) as bar:
        line = bar.add_task("tokens", total=len(rows))
        encoded, skipped = encode(tokenizer, rows, max_length, lambda: bar.advance(line))
    told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if len(encoded) < 2:
        raise CapreseError(
            f"samples of {data}",
            expected="2 or more usable (one is held out)",
            found=f"{len(encoded)} of {len(rows)}" + (f" ({told})" if told else ""),
            fix="give more data, or a higher --max-length",
        )
    if skipped:
        notes.print(f"skipped {skipped.total()} of {len(rows)} samples: {told}")
    return encoded
