"""The command `caprese calibrate`: its options are the fields of `CalibrateConfig`, its result is an adapter file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from caprese_kernels import terminal
from caprese_kernels.config import describe_density

from ..command_line import given_options, prefer_huge_pages, take_options
from ..settings_file import load_config
from .config import CalibrateConfig

if TYPE_CHECKING:
    from .job import Calibration


def calibrate(context: typer.Context, config: Path | None, as_json: bool, **_: Any) -> None:
    """Choose neurons by a few samples, without training: a file to serve at once, or to distill against."""
    settings = load_config(CalibrateConfig, given_options(context, CalibrateConfig), config)
    prefer_huge_pages()
    from .job import calibrate as run  # imports torch and transformers, which takes seconds

    result = run(settings, terminal.notes())
    if as_json:
        terminal.print_json(result.record())
        return
    console = terminal.result()
    console.print(render(result), markup=False)
    if result.selection.kl > result.uniform.kl:
        worse = "densities by layer make the next token worse: give more samples, or leave out --allocate"
        console.print(worse, highlight=False, markup=False)
    size = result.adapter.stat().st_size / 2**20
    console.print(f"wrote {result.adapter} ({size:.1f} MiB): {result.seconds:.0f} s", highlight=False, markup=False)


def render(result: Calibration) -> Table:
    """What the selections cost on held-out samples, by density."""
    from ..report import quality_cells  # imports torch, as `run` does

    config = result.adapters.config
    chosen = f"score {config.score}, prior {config.prior:g}, core {config.core:g}"
    table = Table(title=f"next token on held-out responses, without L and R; {config.method}, {chosen}")
    for column in ("selection", "density", "KL(original || sparse), nats", "same most likely token", "tokens"):
        table.add_column(column, justify="left" if column == "selection" else "right")
    uniform = "the same in every layer" if config.densities else "this file's"
    for density, quality in result.quality.items():
        style = "bold" if density == config.density and not config.densities else None
        table.add_row(uniform, f"{density:g}", *quality_cells(quality), style=style)
    if config.densities:
        own = describe_density(config.density, config.densities)
        table.add_row("this file's", own, *quality_cells(result.selection), style="bold")
    table.add_row("each prompt's own (the paper)", f"{config.density:g}", *quality_cells(result.plain))
    return table


take_options(calibrate, CalibrateConfig, dry_run=False)
