"""The command `caprese evaluate`: its options are the fields of `EvaluateConfig`, its result is a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from caprese_kernels import terminal
from caprese_kernels.config import describe_density

from ..command_line import given_options, prefer_huge_pages, take_options
from ..settings_file import load_config
from .config import EvaluateConfig


def evaluate(context: typer.Context, config: Path | None, as_json: bool, **_: Any) -> None:
    """Measure what an adapter costs: the next token's divergence from the original model's, and agreement with it."""
    settings = load_config(EvaluateConfig, given_options(context, EvaluateConfig), config)
    prefer_huge_pages()
    # These import torch and transformers, which takes seconds: neither --help nor a wrong option should wait for it.
    from ..report import quality_table
    from .job import evaluate as run

    result = run(settings, terminal.notes())
    if as_json:
        terminal.print_json(result.record())
        return
    adapter = result.adapters.config
    density = describe_density(adapter.density, adapter.densities)
    title = f"next token on given responses; {adapter.method}, density {density}, rank {adapter.rank}"
    terminal.result().print(quality_table(result.quality, title, adapter), markup=False)


take_options(evaluate, EvaluateConfig, dry_run=False)
