"""`caprese bench kernels`: sparse FF kernels against the dense block and the memory's bandwidth, all in one run.

Not named kernels.py: transformers imports a package `kernels`, and would find such a module beside a running script.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.lists import names, one_name
from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import ResumableSettings, options_of

if TYPE_CHECKING:
    from caprese_kernels.backend import Backend, KernelName

    from .cases import Group
    from .measure import MeasurementSettings

KEYS = ["section", "shape", "tokens", "method", "density", "rank", "selection", "overlap"]
MEASURES = ["time_us", "ratio", "bandwidth_share"]
NOISY = 0.2  # interquartile range / median, above which a time is reported as noisy
PROMPT, CPU_PROMPT = 2048, 512  # tokens; a dense block of the larger takes a CPU seconds


@dataclass(frozen=True, kw_only=True)
class KernelSettings(ResumableSettings):
    """Options of `caprese bench kernels`."""

    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto"
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto"
    shapes: Annotated[
        str | None, typer.Option(help="Comma-separated names. Default: all; with --quick the smallest.")
    ] = None
    sections: Annotated[str | None, typer.Option(help="Comma-separated. Default: all.")] = None
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and repeats, no torch.compile.")] = False
    full: Annotated[
        bool, typer.Option("--full", help=f"{PROMPT} prompt tokens on a CPU too, instead of {CPU_PROMPT}.")
    ] = False
    repeats: Annotated[int | None, typer.Option(min=3, help="Samples of each figure. Default: 20; with --quick 5.")] = (
        None
    )


@options_of(KernelSettings)
def kernels(settings: KernelSettings) -> None:
    """Time, bandwidth and ratio to dense of the FF kernels, for the shapes of five models."""
    from . import cases
    from .measure import MeasurementSettings

    default = "qwen-2.5-1.5b" if settings.quick else ",".join(cases.SHAPES)
    shapes = [cases.SHAPES[name] for name in names("--shapes", settings.shapes or default, cases.SHAPES)]
    sections = names("--sections", settings.sections or ",".join(cases.SECTIONS), cases.SECTIONS)
    device = _device(settings.device)
    backend = load_backend(settings.backend, device)
    repeats = settings.repeats or (5 if settings.quick else 20)
    prompt = PROMPT if device == "cuda" or settings.full else CPU_PROMPT
    groups = list(cases.groups(sections, shapes, settings.quick, prompt))
    measurement = MeasurementSettings(device, backend.NAME, repeats, settings.quick)
    result = run(groups, measurement, backend, settings.out, settings.resume)
    show(result, COLUMNS, settings.as_json)
    if result.errors:
        raise CapreseError(
            "kernels",
            expected="every case to agree with the reference",
            found=f"{len(result.errors)} that do not or failed",
            fix=f"see the errors above and in {settings.out / 'kernels.json'}",
        )


def run(
    groups: list[Group], settings: MeasurementSettings, backend: Backend, out: Path, resume: bool = False
) -> Result:
    """Measure the groups, and write the result to `out` after each."""
    import torch

    from .measure import Memory, measure

    check_writable(out)
    notes = terminal.notes()
    memory = Memory(settings.device)
    result = Result("kernels", _provenance(settings, memory.source), KEYS, MEASURES)
    with recording(result, out, PLOTS, resume, COLUMNS) as record, progress() as bar:
        line = bar.add_task("", total=len(groups))
        section_and_shape = None
        for group in groups:
            if section_and_shape != (group.section, group.shape):
                section_and_shape = group.section, group.shape
                torch.compiler.reset()  # compile for this shape's sizes, as vLLM does for one model, not for any size
            bar.update(line, description=f"{group.section} {group.shape.name}, {group.tokens} tokens")
            present = [row for row in result.rows if _belongs(row, group)]
            if len(present) != len(group.cases) + 1:  # the dense block has a row too
                measured = measure(group, settings, backend, memory)
                result.rows = [row for row in result.rows if not _belongs(row, group)]
                result.errors += measured.errors
                record.add(*measured.rows)
                for error in measured.errors:
                    bar.console.print(Text.assemble(("failed:", "red"), f" {error}"), soft_wrap=True)
            bar.advance(line)
    if noisy := sum(row["iqr_us"] > NOISY * row["time_us"] for row in result.rows):
        notes.print(
            f"{noisy} of {len(result.rows)} times scatter by more than {NOISY:.0%} (interquartile range / median): "
            "is the machine busy?",
            style="yellow",
        )
    notes.print(f"bandwidth: {memory.source}")
    return result


def load_backend(name: str, device: str) -> Backend:
    """The kernels to measure. Raises CapreseError for an unknown name, or for kernels of another device."""
    import torch

    from caprese_kernels import backend

    one_name("--backend", name, ("auto", "reference", "cpu", "triton"))
    if name == {"cpu": "triton", "cuda": "cpu"}[device]:
        raise CapreseError(
            "--backend", expected=f"one for the device {device}", found=name, fix="give the --device that it runs on"
        )
    return backend.choose(cast("KernelName", name), torch.device(device))


def _belongs(row: Row, group: Group) -> bool:
    return (row["section"], row["shape"], row["tokens"]) == (group.section, group.shape.name, group.tokens)


def _provenance(settings: MeasurementSettings, bandwidth: str) -> dict[str, Any]:
    import torch

    recorded = asdict(settings) | {"dtype": "bfloat16", "threads": torch.get_num_threads()}
    return provenance() | {"settings": recorded, "bandwidth": bandwidth}


def _device(name: str) -> str:
    import torch

    one_name("--device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise CapreseError("--device", expected="a GPU that torch can use", found="none", fix="use --device cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


COLUMNS: Columns = {
    "shape": ("shape", str),
    "tokens": ("tokens", str),
    "method": ("method", str),
    "kernel": ("kernel", str),
    "density": ("density", "{:g}".format),
    "rank": ("rank", str),
    "selection": ("selection", str),
    "overlap": ("overlap", "{:.0%}".format),
    "neurons read": ("union", str),
    "MB needed": ("required_mb", "{:.1f}".format),
    "time us": ("time_us", "{:.1f}".format),
    "IQR": ("iqr_us", "{:.1f}".format),
    "GB/s": ("gb_s", "{:.1f}".format),
    "of bandwidth": ("bandwidth_share", "{:.0%}".format),
    "of dense": ("ratio", "{:.3f}".format),
}
DENSE = "time / dense time"
PLOTS = [
    Plot("shapes", "shape", "ratio", ("method", "rank"), "", DENSE, level=1),
    Plot("shapes", "shape", "bandwidth_share", ("method", "rank"), "", "share of bandwidth", level=1),
    Plot("batch", "tokens", "ratio", ("method", "selection"), "tokens in the batch", DENSE, "shape", True, 1),
    Plot("density", "density", "ratio", ("method",), "density", DENSE, "shape", level=1),
    Plot("density", "density", "bandwidth_share", ("method",), "density", "share of bandwidth", "shape", level=1),
    Plot("overlap", "overlap", "ratio", ("density",), "share of a selection common to all 4", DENSE, "shape", level=1),
    Plot("core", "tokens", "ratio", ("selection", "rank"), "tokens in the batch", DENSE, "shape", True, 1),
    Plot("statistics", "shape", "ratio", ("method",), "", "time / dense time of the prompt"),
]
