"""`caprese bench kernels`: sparse FF kernels against the dense block and the memory's bandwidth, all in one run.

Not named kernels.py: transformers imports a package `kernels`, and would find it when a script of this folder runs.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from caprese_kernels.errors import CapreseError
from caprese_serve.provenance import provenance

from ..results.plots import Plot
from ..results.recording import check_writable, progress, recording
from ..results.report import Columns, Result, Row, table, terminal

if TYPE_CHECKING:
    from caprese_kernels.backend import Backend, KernelName

    from .cases import Group
    from .measure import Settings

KEYS = ["section", "shape", "tokens", "method", "density", "rank", "selection", "overlap"]
MEASURES = ["time_us", "ratio", "bandwidth_share"]
NOISY = 0.2
PROMPT, CPU_PROMPT = 2048, 512  # tokens; a dense block of the larger takes a CPU seconds


def kernels(
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    shapes: Annotated[
        str | None, typer.Option(help="Comma-separated names; default all, the smallest if --quick.")
    ] = None,
    sections: Annotated[str | None, typer.Option(help="Comma-separated; default all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and repeats, no torch.compile.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help=f"{PROMPT} prompt tokens on a CPU too, not {CPU_PROMPT}.")
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(min=3, help="Samples of each figure; default 20, 5 if --quick.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in --out already.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for kernels.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """Time, bandwidth and ratio to dense of the FF kernels, for the shapes of five models."""
    from . import cases as cases
    from .measure import Settings

    smallest = "qwen-2.5-1.5b" if quick else None
    chosen = [cases.SHAPES[name] for name in _names("--shapes", shapes or smallest, cases.SHAPES)]
    parts = _names("--sections", sections, cases.SECTIONS)
    where = _device(device)
    implementation = load_backend(backend, where)
    settings = Settings(where, implementation.NAME, repeats or (5 if quick else 20), quick)
    todo = list(cases.groups(parts, chosen, quick, PROMPT if where == "cuda" or full else CPU_PROMPT))
    result = run(todo, settings, implementation, out, resume)
    if result.errors:
        raise CapreseError(
            "kernels",
            expected="every case to agree with the reference",
            found=f"{len(result.errors)} that do not or failed",
            fix=f"see the errors above and in {out / 'kernels.json'}",
        )


def run(todo: list[Group], settings: Settings, backend: Backend, out: Path, resume: bool = False) -> Result:
    """Measure the groups, write after each, show each section when it is complete. Returns what is in `out`."""
    import matplotlib  # noqa: F401  missing? say so now, not after the work
    import torch

    from .measure import Memory, measure

    check_writable(out)
    console = terminal()
    memory = Memory(settings.device)
    result = Result("kernels", _provenance(settings, memory.source), KEYS, MEASURES)
    with recording(result, out, PLOTS, resume, console, COLUMNS) as record, progress(console) as bar:
        line = bar.add_task("", total=len(todo))
        for section, members in groupby(todo, key=lambda group: group.section):
            shape = None
            for group in members:
                if shape != group.shape:  # compile for its sizes, not for any; as vLLM does for one model
                    shape = group.shape
                    torch.compiler.reset()
                bar.update(line, description=f"{section} {group.shape.name}, {group.tokens} tokens")
                present = [row for row in result.rows if _belongs(row, group)]
                if len(present) != len(group.cases) + 1:  # the dense block's is the one more
                    measured = measure(group, settings, backend, memory)
                    result.rows = [row for row in result.rows if not _belongs(row, group)]
                    result.errors += measured.errors
                    record.add(*measured.rows)
                    for error in measured.errors:
                        bar.console.print(f"[red]failed:[/red] {escape(error)}", soft_wrap=True)
                bar.advance(line)
            bar.console.print(table(section, result.sections().get(section, []), COLUMNS))
    if noisy := sum(row["iqr_us"] > NOISY * row["time_us"] for row in result.rows):
        console.print(
            f"[yellow]{noisy} of {len(result.rows)} times scatter by more than {NOISY:.0%}[/yellow] (interquartile "
            "range by median): is the machine busy?"
        )
    console.print(f"bandwidth: {memory.source}")
    return result


def load_backend(name: str, device: str) -> Backend:
    """The implementation to measure."""
    import torch

    from caprese_kernels import backend

    _name("--backend", name, ("auto", "reference", "cpu", "triton"))
    if name == {"cpu": "triton", "cuda": "cpu"}[device]:
        raise CapreseError(
            "--backend", expected=f"one for the device {device}", found=name, fix="give the --device that it is for"
        )
    return backend.choose(cast("KernelName", name), torch.device(device))


def _belongs(row: Row, group: Group) -> bool:
    return (row["section"], row["shape"], row["tokens"]) == (group.section, group.shape.name, group.tokens)


def _provenance(settings: Settings, bandwidth: str) -> dict[str, Any]:
    import torch

    made_with = asdict(settings) | {"dtype": "bfloat16", "threads": torch.get_num_threads()}
    return provenance() | {"settings": made_with, "bandwidth": bandwidth}


def _device(name: str) -> str:
    import torch

    _name("--device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise CapreseError("--device", expected="a GPU that torch can use", found="none", fix="use --device cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _name(option: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise CapreseError(option, expected=f"one of {', '.join(known)}", found=repr(name), fix="correct it")


def _names(option: str, text: str | None, known: Any) -> list[str]:
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise CapreseError(option, expected=f"of {', '.join(known)}", found=repr(name), fix="correct it")
    return names


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
    Plot("statistics", "shape", "ratio", ("method",), "", "time / dense time of the prompt"),
]
