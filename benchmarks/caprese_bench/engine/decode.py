"""`caprese bench decode`: a whole decode step of a published shape without vLLM, on a GPU as one CUDA graph.

Full, GRIFFIN, LoRA, Caprese and CATS take turns on the same weights; all but the FF blocks is the same code. Every
variant's FF blocks are compared with the plain reference first, layer by layer on the same inputs: a wrong one has no
row. The floor is that of floor.py. Needs torch and, on a GPU, triton; neither vLLM nor pydantic nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, table, terminal
from .decode_variants import VARIANTS, Variant
from .models import ARCHS

if TYPE_CHECKING:
    from torch import Tensor

    from caprese_kernels.backend import Backend

    from ..kernels.timing import Timing
    from .decode_model import DecodeModel, FeedForward

KEYS = ["section", "arch", "context", "batch", "variant"]
MEASURES = ["time_ms", "ratio", "gb_s"]
REPEATS = 30


def decode(
    arch: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(ARCHS)}; default 14B on a GPU, 0.5B on a CPU.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in a request's KV cache.")] = 2048,
    variants: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(VARIANTS)}.")] = ",".join(VARIANTS),
    batch: Annotated[str, typer.Option(help="Comma-separated numbers of requests, each with its selection.")] = "1",
    density: Annotated[float, typer.Option(min=0.01, max=1, help="Share of neurons kept.")] = 0.5,
    rank: Annotated[int, typer.Option(min=1, help="Of L and R, and of what LoRA has as many parameters as.")] = 256,
    repeats: Annotated[int, typer.Option(min=3, help="Interleaved samples of each variant.")] = REPEATS,
    quick: Annotated[bool, typer.Option("--quick", help="Four layers of the shape, five samples.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in --out already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for decode.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """Time of a whole decode step, one CUDA graph, beside the bytes it must read; no vLLM needed."""
    import torch

    from caprese_kernels.backend import choose

    from .decode_model import Dimensions

    check_writable(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arch = arch or ("qwen2.5-14b" if device == "cuda" else "qwen2.5-0.5b")
    sizes, repeats = Dimensions.of(arch), min(repeats, 5) if quick else repeats
    if quick:
        sizes = Dimensions(**{**vars(sizes), "layers": 4})
    chosen, counts = _chosen(variants), _counts(batch)
    backend = choose("auto", torch.device(device))
    settings = {"density": density, "rank": rank, "repeats": repeats, "layers": sizes.layers, "dtype": "bfloat16"}
    settings |= {"kernel": backend.NAME, "graph": device == "cuda", "threads": torch.get_num_threads()}
    result = Result("decode", provenance() | {"settings": settings}, KEYS, MEASURES)
    console = terminal()
    with recording(result, out, PLOTS, resume, console, COLUMNS) as record, progress(console) as bar:
        line = bar.add_task("", total=len(counts))
        for count in counts:
            name = {"section": "decode", "arch": arch, "context": context, "batch": count}
            bar.update(line, description=f"{arch}, {count} at once")
            if not all(record.has(name | {"variant": variant.label}) for variant in chosen):
                record.add(*measure(name, sizes, chosen, density, rank, repeats, device, backend))
            bar.advance(line)
    console.print(table("decode", result.rows, COLUMNS))


def measure(
    name: Row, sizes: Any, chosen: list[Variant], density: float, rank: int, repeats: int, device: str, backend: Backend
) -> list[Row]:
    """A row for each variant: its FF blocks held to the reference, then steps of all in turn."""
    import torch

    from ..kernels.timing import Timer, interleave, memory
    from .decode_ff import Choices, dense_candidates
    from .decode_model import DecodeModel

    with torch.inference_mode():
        model = DecodeModel(sizes, rank, name["context"], name["batch"], device, torch.bfloat16)
        candidates = dense_candidates(model)
        tried = interleave({kernel: Timer([_step(model, ff)], device) for kernel, ff in candidates.items()}, 5, 30)
        best = min(tried, key=lambda kernel: tried[kernel].median)
        choices = Choices(model, backend, density, candidates[best])
        source, size, calls = memory(device)
        timers: dict[Any, Timer] = {None: Timer(calls, device)}
        errors = {}
        for variant in chosen:
            ff = choices.feed_forward(variant)
            errors[variant.label] = choices.check(variant, ff)
            timers[variant.label] = Timer([_step(model, ff)], device)
        timings = interleave(timers, repeats, seconds=120)
    pace = size / timings.pop(None).median / 1e9
    full, *_ = needed = [choices.bytes(variant, name["context"], name["batch"]) for variant in chosen]
    rows = []
    for variant, some in zip(chosen, needed, strict=True):
        more = {"kernel": best if variant.method is None else backend.NAME, "error": errors[variant.label]}
        rows.append(row(name, variant, timings, some, full, more | {"bandwidth_gb_s": pace, "bandwidth": source}))
    return rows


def row(name: Row, variant: Variant, timings: dict[str, Timing], needed: float, full: float, more: Row) -> Row:
    timed, base = timings[variant.label], timings["Full"]
    speed = needed / timed.median / 1e9
    return {
        **name,
        "variant": variant.label,
        "time_ms": 1e3 * timed.median,
        "iqr_ms": 1e3 * timed.iqr,
        "ratio": timed.median / base.median,
        "predicted_ratio": needed / full,
        "mb_a_step": needed / 1e6,
        "gb_s": speed,
        "bandwidth_share": speed / more["bandwidth_gb_s"],
        "samples": timed.samples,
        **more,
    }


def _step(model: DecodeModel, ff: FeedForward) -> Any:
    def step() -> Tensor:
        return model.step(ff)

    return step


def _chosen(text: str) -> list[Variant]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise CapreseError("--variants", expected=f"of {', '.join(VARIANTS)}", found=repr(name), fix="correct it")
    if "full" not in names:
        raise CapreseError("--variants", expected="full among them, which ratios are to", found=text, fix="add it")
    return [variant for name, variant in VARIANTS.items() if name in names]


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise CapreseError("--batch", expected="comma-separated numbers from 1", found=repr(text), fix="correct it")
    return [int(part) for part in parts]


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
