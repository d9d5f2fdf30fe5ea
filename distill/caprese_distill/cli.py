"""The command `caprese distill`: its options are the fields of `DistillConfig`, its result is an adapter file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from caprese_kernels import files, terminal
from caprese_kernels.errors import CapreseError

from .command_line import given_options, prefer_huge_pages, take_options
from .config import DistillConfig
from .settings_file import load_config

if TYPE_CHECKING:
    from .job import Job


def distill(context: typer.Context, config: Path | None, dry_run: bool, as_json: bool, **_: Any) -> None:
    """Make adapters that recover what a sparse FF block loses.

    An interrupted run continues where it stopped when the same command is given again.
    """
    settings = load_config(DistillConfig, given_options(context, DistillConfig), config)
    if dry_run and settings.generate:
        raise CapreseError(
            "--dry-run",
            expected="data with responses, to count their tokens",
            found="--generate",
            fix="leave one of the options out; an interrupted --generate keeps its responses",
        )
    prefer_huge_pages()
    # These import torch and transformers, which takes seconds: neither --help nor a wrong option should wait for it.
    from .job import Job

    with contextlib.nullcontext() if dry_run else files.output_lock(settings.output):
        _run(Job(settings, terminal.notes()), dry_run, as_json)


def _run(job: Job, dry_run: bool, as_json: bool) -> None:
    from .report import render_estimate, render_plan, render_result

    notes = terminal.notes()
    plan = job.plan()
    shown = terminal.result() if dry_run and not as_json else notes
    for part in render_plan(plan):
        shown.print(part, markup=False)
    estimate = job.estimate()
    if estimate or dry_run:
        shown.print(render_estimate(estimate))
    if dry_run:
        if as_json:
            terminal.print_json(plan.record() | {"seconds": estimate.seconds if estimate else None})
        return
    result = job.run()
    if as_json:
        terminal.print_json(result.record())
        return
    for part in render_result(result):
        terminal.result().print(part, markup=False)


take_options(distill, DistillConfig)
