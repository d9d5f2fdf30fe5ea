"""`caprese bench distill-speed`: how fast a published shape is distilled, stage by stage, and in how much memory.

Weights and samples are random and all samples have one length, because only the arithmetic counts. The hours of the
paper's recipe (20,000 samples, three epochs end to end) follow from the measured speed; the layer-wise closed form is
one pass over the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels import terminal
from caprese_serve.provenance import provenance

from ..engine.models import ARCHS, write_arch
from ..results.lists import names
from ..results.recording import check_writable, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of

if TYPE_CHECKING:
    import torch

    from caprese_distill.data.samples import Sample

KEYS = ["arch", "method", "stage"]
MEASURES = ["tokens_per_s", "samples_per_s", "peak_gib"]
PAPER_SAMPLES, PAPER_EPOCHS = 20_000, 3
LAYER_WISE, END_TO_END = "layer-wise, closed form", "end to end"


@dataclass(frozen=True, kw_only=True)
class DistillSpeedSettings(ResumableSettings):
    """Options of `caprese bench distill-speed`."""

    arch: Annotated[str | None, typer.Option(help=f"Of {', '.join(ARCHS)}. Default: 1.5B on a GPU, 0.5B on a CPU.")] = (
        None
    )
    methods: Annotated[str, typer.Option(help="Comma-separated, of griffin and cats.")] = "griffin,cats"
    samples: Annotated[int | None, typer.Option(min=32, help="Default: 320 on a GPU, 32 on a CPU.")] = None
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of a sample.")] = 128
    response: Annotated[int, typer.Option(min=2, help="Response tokens of a sample.")] = 384
    rank: Annotated[int, typer.Option(min=1, help="Rank of L and R.")] = 256
    quick: Annotated[bool, typer.Option("--quick", help="GRIFFIN alone, samples of 16 + 48 tokens.")] = False


@options_of(DistillSpeedSettings)
def distill_speed(settings: DistillSpeedSettings) -> None:
    """Samples a second and memory of both stages of `caprese distill`, at a published shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_writable(settings.out)
    if settings.quick:
        settings = replace(settings, methods="griffin", prompt=16, response=48)
    methods = names("--methods", settings.methods, ("griffin", "cats"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch = settings.arch or ("qwen2.5-1.5b" if device.type == "cuda" else "qwen2.5-0.5b")
    count = settings.samples or (320 if device.type == "cuda" else 32)
    with TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_arch(arch, Path(folder)))
    recorded: dict[str, Any] = {
        "samples": count,
        "prompt": settings.prompt,
        "response": settings.response,
        "rank": settings.rank,
    }
    recorded |= {"device": device.type}
    result = Result("distill-speed", provenance() | {"settings": recorded}, KEYS, MEASURES)
    with recording(result, settings.out, (), settings.resume, COLUMNS) as record:
        todo = [n for n in methods if not record.has({"arch": arch, "method": n, "stage": END_TO_END})]
        if todo:
            torch.manual_seed(0)
            with terminal.notes().status(f"{arch}: random weights"), device:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            samples = random_samples(count, settings.prompt, settings.response, config.vocab_size)
            for name in todo:
                record.add(*measure(model, arch, name, settings.rank, samples, device))
    show(result, COLUMNS, settings.as_json)


def random_samples(count: int, prompt: int, response: int, vocabulary: int) -> list[Sample]:
    """Random samples, all of one length."""
    import torch

    from caprese_distill.data.samples import Sample

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (count, prompt + response), generator=generator).tolist()
    return [Sample.of(row[:prompt], row[prompt:], line) for line, row in enumerate(ids, start=1)]


def measure(model: Any, arch: str, method: str, rank: int, samples: list[Sample], device: torch.device) -> list[Row]:
    """A row for each stage.

    Seconds are those that grow with the number of samples, including held-out evaluation, without the time to solve the
    closed form. The peak of memory is that since the previous stage.
    """
    import torch

    from caprese_distill.blocks import resolve_method
    from caprese_distill.data.samples import split
    from caprese_distill.end_to_end.train import Recipe, default_learning_rate, distill_end_to_end
    from caprese_distill.layer_wise.closed_form import distill_layer_wise
    from caprese_distill.memory import peak_memory

    info, resolved = resolve_method(model.config, arch, method, 0.5, rank)
    console = terminal.notes()
    rows: list[Row] = []

    def add_row(stage: str, seconds: float, seen: int, epochs: int, solving: float = 0.0) -> None:
        tokens, samples_per_s = seen * len(samples[0].ids), seen / seconds
        row = {"arch": arch, "method": method, "stage": stage, "samples": seen, "tokens": tokens, "seconds": seconds}
        row |= {"solving_s": solving, "tokens_per_s": tokens / seconds, "samples_per_s": samples_per_s}
        row |= {"paper_hours": (PAPER_SAMPLES * epochs / samples_per_s + solving) / 3600}
        rows.append(row | {"peak_gib": peak_memory(device).get("device", peak_memory(device)["host"]) / 2**30})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    adapters = distill_layer_wise(model, samples, info, resolved, console=console)
    training, seen = adapters.config.training, len(split(samples)[0])
    solving = training["seconds_solving"]
    add_row(LAYER_WISE, training["seconds"] - solving, len(samples), 1, solving)
    recipe = Recipe(default_learning_rate(info.hidden_size), epochs=1)
    trained = distill_end_to_end(model, samples, adapters, recipe, console=console)
    add_row(END_TO_END, trained.config.training["end_to_end"]["seconds"], seen * recipe.epochs, PAPER_EPOCHS)
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
