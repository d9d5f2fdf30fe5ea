"""`caprese distill`: from a model and samples to an adapter file."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import tempfile
from enum import StrEnum
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, LayerChoice
from caprese_kernels.errors import CapreseError

if TYPE_CHECKING:
    from caprese_kernels.adapters import Adapters

    from .data import Row, Sample


class Stage(StrEnum):
    layer_wise = "layer-wise"


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
    stage: Annotated[Stage, typer.Option(help="Kind of distillation.")] = Stage.layer_wise,
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
    seed: Annotated[int, typer.Option(help="Seed of the choice of rows.")] = 0,
) -> None:
    """Make adapters that give back what a sparse FF block loses.

    An interrupted run goes on where it was when the same command is given again.
    """
    from . import checkpoint
    from .sources import read_source

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
        "--seed": seed,
    }
    given = [word for key, value in command.items() if value is not None for word in (key, str(value))]
    choice = _parse_layers(layers)
    source = read_source(data, samples, seed)
    rows = source.rows
    _check_writable(output)

    import torch

    from .blocks import plan
    from .layerwise import distill_layer_wise

    notes, resume = Console(stderr=True), checkpoint.resume_path(output)
    target = _device(device)
    config, tokenizer = _load_small_parts(model)
    info, resolved = plan(config, model, method, density, rank, choice)
    encoded = _encode(tokenizer, rows, max_length, data, notes)
    fed = sum(s.num_rows for s in encoded)
    if fed < info.hidden_size:
        notes.print(f"only {fed} response tokens for hidden size {info.hidden_size}: expect little; give more samples")
    network = _load_model(model, dtype).to(target)
    try:
        adapters = distill_layer_wise(network, encoded, info, resolved, resume, notes)
    except torch.OutOfMemoryError as error:
        raise CapreseError(
            "device memory",
            expected="enough for the model and a sample",
            found=str(error),
            fix="use a lower --max-length",
        ) from None
    except KeyboardInterrupt:
        notes.print("interrupted; the same command goes on from the last checkpoint")
        raise
    adapters.config.training |= {
        "data": source.provenance,
        "command": shlex.join(["caprese", "distill", model, *given]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
    }
    try:
        adapters.save(output)
    except OSError as error:
        raise _unwritable(output, error.strerror or str(error)) from None
    checkpoint.remove(resume)
    _report(adapters, output)


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


def _device(device: Device) -> str:
    import torch

    if device == Device.cuda and not torch.cuda.is_available():
        raise CapreseError("--device", expected="a GPU that torch can use", found="none", fix="use --device cpu")
    return str(device) if device != Device.auto else "cuda" if torch.cuda.is_available() else "cpu"


def _load_small_parts(model: str) -> tuple[Any, Any]:
    """The model's configuration and tokenizer."""
    if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CapreseError(
            "model", expected="a directory or a Hub id (owner/name)", found=f"no directory {model}", fix="correct it"
        )
    try:
        from transformers import AutoConfig, AutoTokenizer

        return AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except Exception as error:  # OSError, ValueError, KeyError, what the file formats raise ...
        raise _unloadable(model, error) from None


def _load_model(model: str, dtype: Dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        network, info = AutoModelForCausalLM.from_pretrained(model, dtype=str(dtype), output_loading_info=True)
    except Exception as error:  # as above
        raise _unloadable(model, error) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise _unloadable(model, f"{len(missing)} weights are missing, first {missing[0]}")
    return network


def _unloadable(model: str, error: Exception | str) -> CapreseError:
    found = error if isinstance(error, str) else f"{type(error).__name__}: {shorten(str(error), 250)}"
    return CapreseError(
        f"model {model}",
        expected="a causal language model that transformers loads",
        found=found,
        fix="check the directory",
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


def _report(adapters: Adapters, output: Path) -> None:
    config, training = adapters.config, adapters.config.training
    table = Table(title=f"{config.method}, density {config.density:g}, rank {config.rank}, on held-out samples")
    for column in ("layer", "||E||²/||FF||²", "with L R", "remaining", "remaining (fitted)", "ridge"):
        table.add_column(column, justify="right")
    for layer, row in training["errors"].items():
        parts = [f"{row[key]:.1%}" for key in ("error_before", "error_after", "remaining", "remaining_fit")]
        table.add_row(layer, *parts, f"{row['ridge']:g}")
    console = Console()
    console.print(table)
    size = output.stat().st_size / 2**20
    tokens = f"{training['samples']} samples, {training['tokens']:,} response tokens, {training['seconds']:g} s"
    console.print(f"wrote {output} ({size:.1f} MiB, {str(adapters.dtype).removeprefix('torch.')}): {tokens}")
