"""`caprese bench distill-speed`: how fast a published shape is distilled, stage by stage, and in how much memory.

Random weights and samples of one length: what counts is the arithmetic. Hours of the paper's recipe (20,000 samples,
three epochs end to end) follow from the pace, the layer-wise closed form being one pass.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_serve.provenance import provenance

from ..engine.models import ARCHS, write_arch
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, table, terminal

if TYPE_CHECKING:
    import torch

    from caprese_distill.data.samples import Sample

KEYS = ["arch", "method", "stage"]
MEASURES = ["tokens_per_s", "samples_per_s", "peak_gib"]
PAPER_SAMPLES, PAPER_EPOCHS = 20_000, 3
LAYER_WISE, END_TO_END = "layer-wise, closed form", "end to end"


def distill_speed(
    arch: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(ARCHS)}; default 1.5B on a GPU, 0.5B on a CPU.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated, of griffin and cats.")] = "griffin,cats",
    samples: Annotated[int | None, typer.Option(min=32, help="Default 320 on a GPU, 32 on a CPU.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of a sample.")] = 128,
    response: Annotated[int, typer.Option(min=2, help="Response tokens of a sample.")] = 384,
    rank: Annotated[int, typer.Option(min=1, help="Of L and R.")] = 256,
    quick: Annotated[bool, typer.Option("--quick", help="GRIFFIN alone, samples of 16 + 48 tokens.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in --out already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for distill-speed.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """Samples a second and memory of both stages of `caprese distill`, at a published shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_writable(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = arch or ("qwen2.5-1.5b" if device.type == "cuda" else "qwen2.5-0.5b")
    if quick:
        methods, prompt, response = "griffin", 16, 48
    count = samples or (320 if device.type == "cuda" else 32)
    with TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_arch(arch, Path(folder)))
    settings = {"samples": count, "prompt": prompt, "response": response, "rank": rank, "device": device.type}
    result = Result("distill-speed", provenance() | {"settings": settings}, KEYS, MEASURES)
    console = terminal()
    with recording(result, out, (), resume, console, COLUMNS) as record:
        names = [name.strip() for name in methods.split(",")]
        todo = [n for n in names if not record.has({"arch": arch, "method": n, "stage": END_TO_END})]
        if todo:
            torch.manual_seed(0)
            with console.status(f"{arch}: random weights"), device:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            drawn = draw(count, prompt, response, config.vocab_size)
            for name in todo:
                record.add(*measure(model, config, arch, name, rank, drawn, device, console))
    console.print(table("distill-speed", result.rows, COLUMNS))


def draw(count: int, prompt: int, response: int, vocabulary: int) -> list[Sample]:
    """Random samples, all of one length."""
    import torch

    from caprese_distill.data.samples import Sample

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (count, prompt + response), generator=generator).tolist()
    return [Sample.of(row[:prompt], row[prompt:], line) for line, row in enumerate(ids, start=1)]


def measure(
    model: Any,
    config: Any,
    arch: str,
    method: str,
    rank: int,
    samples: list[Sample],
    device: torch.device,
    console: Any,
) -> list[Row]:
    """A row for each stage. Seconds are those that grow with the samples, held-out looks included, not the solving of
    the closed form; the peak is since the last stage."""
    import torch

    from caprese_distill.blocks import resolve_method
    from caprese_distill.data.samples import split
    from caprese_distill.end_to_end.train import Recipe, default_learning_rate, distill_end_to_end
    from caprese_distill.layer_wise.closed_form import distill_layer_wise
    from caprese_distill.memory import peak_memory

    info, resolved = resolve_method(config, arch, method, 0.5, rank)
    rows: list[Row] = []

    def row(stage: str, seconds: float, seen: int, epochs: int, solving: float = 0.0) -> None:
        tokens, pace = seen * len(samples[0].ids), seen / seconds
        row = {"arch": arch, "method": method, "stage": stage, "samples": seen, "tokens": tokens, "seconds": seconds}
        row |= {"solving_s": solving, "tokens_per_s": tokens / seconds, "samples_per_s": pace}
        row |= {"paper_hours": (PAPER_SAMPLES * epochs / pace + solving) / 3600}
        rows.append(row | {"peak_gib": peak_memory(device).get("device", peak_memory(device)["host"]) / 2**30})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    adapters = distill_layer_wise(model, samples, info, resolved, console=console)
    told, seen = adapters.config.training, len(split(samples)[0])
    row(LAYER_WISE, told["seconds"] - told["seconds_solving"], len(samples), 1, told["seconds_solving"])
    recipe = Recipe(default_learning_rate(info.hidden_size), epochs=1)
    trained = distill_end_to_end(model, samples, adapters, recipe, console=console)
    row(END_TO_END, trained.config.training["end_to_end"]["seconds"], seen * recipe.epochs, PAPER_EPOCHS)
    return rows


COLUMNS: Columns = {
    "arch": ("arch", str),
    "method": ("method", str),
    "stage": ("stage", str),
    "samples": ("samples", str),
    "tokens": ("tokens", str),
    "seconds": ("seconds", "{:.1f}".format),
    "solving, s": ("solving_s", "{:.1f}".format),
    "tokens/s": ("tokens_per_s", "{:,.0f}".format),
    "samples/s": ("samples_per_s", "{:.2f}".format),
    "20,000 samples, h": ("paper_hours", "{:.1f}".format),
    "peak GiB": ("peak_gib", "{:.2f}".format),
}
