"""`caprese bench decode`: a whole decode step of a published shape without vLLM, on a GPU as one CUDA graph.

All variants take turns on the same weights, and everything except the FF blocks is the same code. First every variant's
FF blocks are compared with the plain reference, layer by layer on the same inputs; a wrong one gets no row. The step
cannot be faster than reading its bytes (kernels/floor.py). Needs torch and, on a GPU, triton; neither vLLM nor pydantic
nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.lists import counts
from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of
from .models import ARCHS
from .variants import VARIANTS, Variant, choose_variants

if TYPE_CHECKING:
    from caprese_kernels.backend import Backend

    from ..kernels.timing import Timing
    from .decode_model import DecodeDimensions

PAPER_STEPS = "full,griffin,lora,caprese,caprese-all,cats,caprese-cats"  # variants
KEYS = ["section", "arch", "context", "batch", "variant"]
MEASURES = ["time_ms", "ratio", "gb_s"]


@dataclass(frozen=True, kw_only=True)
class DecodeSettings(ResumableSettings):
    """Options of `caprese bench decode`."""

    arch: Annotated[str | None, typer.Option(help=f"Of {', '.join(ARCHS)}. Default: 14B on a GPU, 0.5B on a CPU.")] = (
        None
    )
    context: Annotated[int, typer.Option(min=1, help="Tokens in a request's KV cache.")] = 2048
    variants: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(VARIANTS)}.")] = PAPER_STEPS
    batch: Annotated[
        str, typer.Option(help="Comma-separated numbers of requests, each request with its own selection.")
    ] = "1"
    density: Annotated[float, typer.Option(min=0.01, max=1, help="Share of neurons kept.")] = 0.5
    rank: Annotated[int, typer.Option(min=1, help="Rank of L and R; LoRA gets as many parameters as these have.")] = 256
    repeats: Annotated[int, typer.Option(min=3, help="Interleaved samples of each variant.")] = 30
    quick: Annotated[bool, typer.Option("--quick", help="Four layers of the shape, five samples.")] = False


@options_of(DecodeSettings)
def decode(settings: DecodeSettings) -> None:
    """Time of a whole decode step, one CUDA graph, beside the bytes it must read; no vLLM needed."""
    import torch

    from caprese_kernels.backend import choose

    from .decode_model import DecodeDimensions

    check_writable(settings.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arch = settings.arch or ("qwen2.5-14b" if device == "cuda" else "qwen2.5-0.5b")
    dimensions = DecodeDimensions.of(arch)
    if settings.quick:
        dimensions = replace(dimensions, layers=4)
        settings = replace(settings, repeats=min(settings.repeats, 5))
    variants, batches = choose_variants(settings.variants), counts("--batch", settings.batch)
    if not batches:
        raise CapreseError("--batch", expected="one number or more", found="none", fix="give one, for example 1")
    backend = choose("auto", torch.device(device))
    recorded = {
        "density": settings.density,
        "rank": settings.rank,
        "repeats": settings.repeats,
        "layers": dimensions.layers,
        "dtype": "bfloat16",
        "kernel": backend.NAME,
        "graph": device == "cuda",
        "threads": torch.get_num_threads(),
    }
    result = Result("decode", provenance() | {"settings": recorded}, KEYS, MEASURES)
    with recording(result, settings.out, PLOTS, settings.resume, COLUMNS) as record, progress() as bar:
        line = bar.add_task("", total=len(batches))
        for batch in batches:
            key = {"section": "decode", "arch": arch, "context": settings.context, "batch": batch}
            bar.update(line, description=f"{arch}, {batch} at once")
            if not all(record.has(key | {"variant": variant.label}) for variant in variants):
                record.add(*measure(key, dimensions, variants, settings, device, backend))
            bar.advance(line)
    show(result, COLUMNS, settings.as_json)


def measure(
    key: Row,
    dimensions: DecodeDimensions,
    variants: Sequence[Variant],
    settings: DecodeSettings,
    device: str,
    backend: Backend,
) -> list[Row]:
    """A row for each variant: its FF blocks compared with the reference, then steps of all variants in turn.

    `key` has the columns that all these rows share: section, arch, context and batch.
    """
    import torch

    from ..kernels.timing import Timer, interleave, memory
    from .decode_ff import DecodeBlocks, dense_candidates
    from .decode_model import DecodeModel

    with torch.inference_mode():
        model = DecodeModel(dimensions, settings.rank, key["context"], key["batch"], device, torch.bfloat16)
        candidates = dense_candidates(model)
        dense_timers = {kernel: Timer([partial(model.step, ff)], device) for kernel, ff in candidates.items()}
        dense_timings = interleave(dense_timers, 5, 30)
        best = min(dense_timings, key=lambda kernel: dense_timings[kernel].median)
        blocks = DecodeBlocks(model, backend, settings.density, candidates[best])
        source, size, calls = memory(device)
        timers: dict[Any, Timer] = {None: Timer(calls, device)}
        errors = {}
        for variant in variants:
            ff = blocks.feed_forward(variant)
            errors[variant.label] = blocks.check(variant, ff)
            timers[variant.label] = Timer([partial(model.step, ff)], device)
        timings = interleave(timers, settings.repeats, seconds=120)
    bandwidth = size / timings.pop(None).median / 1e9
    full, *_ = required = [blocks.bytes(variant, key["context"], key["batch"]) for variant in variants]
    rows = []
    for variant, required_bytes in zip(variants, required, strict=True):
        more = {"kernel": best if variant.method is None else backend.NAME, "error": errors[variant.label]}
        more |= {"bandwidth_gb_s": bandwidth, "bandwidth": source}
        rows.append(row(key, variant, timings, required_bytes, full, more))
    return rows


def row(key: Row, variant: Variant, timings: dict[str, Timing], required: float, full: float, more: Row) -> Row:
    """A variant's row; `required` and `full` are the bytes that its step and Full's must read."""
    timed, full_timed = timings[variant.label], timings["Full"]
    speed = required / timed.median / 1e9
    return {
        **key,
        "variant": variant.label,
        "time_ms": 1e3 * timed.median,
        "iqr_ms": 1e3 * timed.iqr,
        "ratio": timed.median / full_timed.median,
        "predicted_ratio": required / full,
        "mb_a_step": required / 1e6,
        "gb_s": speed,
        "bandwidth_share": speed / more["bandwidth_gb_s"],
        "samples": timed.samples,
        **more,
    }


COLUMNS: Columns = {
    "variant": ("variant", str),
    "kernel": ("kernel", str),
    "batch": ("batch", str),
    "ms": ("time_ms", "{:.3f}".format),
    "±": ("iqr_ms", "{:.3f}".format),
    "of Full": ("ratio", "{:.3f}".format),
    "by bytes": ("predicted_ratio", "{:.3f}".format),
    "MB": ("mb_a_step", "{:.0f}".format),
    "GB/s": ("gb_s", "{:.1f}".format),
    "of bandwidth": ("bandwidth_share", "{:.0%}".format),
    "error": ("error", "{:.1e}".format),
}
PLOTS = [
    Plot("decode", "batch", "time_ms", ("variant",), "requests at once", "a decode step, ms", error="iqr_ms",
         kind="bar", show="{:.2f}".format),
    Plot("decode", "batch", "ratio", ("variant",), "requests at once", "time / Full's", kind="bar", level=1,
         show="{:.2f}".format),
    Plot("decode", "batch", "predicted_ratio", ("variant",), "requests at once", "bytes / Full's", kind="bar", level=1,
         show="{:.2f}".format),
]  # fmt: skip
