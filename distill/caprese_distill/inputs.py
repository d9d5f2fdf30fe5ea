"""From a verb's settings to what its work needs: rows, samples, an output that can be written."""

from __future__ import annotations

import datetime
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels import files
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from .blocks import resolve_method
from .config import AdapterSettings, DataSettings
from .data.bad_rows import BadRows
from .data.chat import ChatRenderer, Rendering
from .data.samples import Sample, encode
from .data.sources import Source, read_source
from .data.templates import load_template, stop_ids
from .loading import max_sample_tokens
from .progress import note, progress_bar


def read_rows(config: DataSettings, bad_rows: BadRows, responses: bool = True) -> Source:
    """The rows that the settings name; `responses` False: prompts alone."""
    return read_source(
        config.data,
        config.samples,
        config.seed,
        prompt_column=config.prompt_column,
        response_column=config.response_column,
        responses=responses,
        instruction=config.instruction,
        bad_rows=bad_rows,
    )


def resolve_selection(config: AdapterSettings, model_config: Any, rank: int) -> tuple[BaseModelInfo, Method]:
    """The base model's dimensions, and the settings' method for it. Raises the errors of `resolve_method`."""
    info, method = resolve_method(
        model_config, config.model, config.method, config.density, max(rank, 1), config.layers
    )
    return info, replace(method, rank=rank, score=config.score, prior=config.prior or 0.0, core=config.core or 0.0)


def chat_renderer(config: DataSettings, model_config: Any, tokenizer: Any, console: Console) -> ChatRenderer:
    """What makes tokens of the rows, with a remark on what prompts depend on."""
    template = None if config.chat_template is None else load_template(config.chat_template)
    rendering = Rendering(template, config.chat_template_kwargs, config.date)
    renderer = ChatRenderer(tokenizer, rendering, stop_ids(config.model, model_config))
    if not renderer.has_template:
        note(console, "the tokenizer has no chat template: prompts are used as plain text")
    elif renderer.prints_date:
        today = datetime.date.today()
        note(console, f"the chat template prints the date: continue this run on another day with --date {today}")
    return renderer


def encode_rows(
    config: DataSettings,
    source: Source,
    model_config: Any,
    renderer: ChatRenderer,
    bad_rows: BadRows,
    console: Console,
    held_out: int = 1,
) -> list[Sample]:
    """The rows as samples, with remarks on what is not used. CapreseError for fewer than one beside those held out."""
    with progress_bar(console, "rows/s") as bar:
        line = bar.add_task("tokens", total=len(source.rows))
        limit = max_sample_tokens(model_config, config.max_length)
        samples, skipped = encode(renderer, source.rows, limit, bad_rows, lambda: bar.advance(line))
    note_remarks(renderer, source, console)
    check_samples(config, samples, skipped, bad_rows, source, console, held_out)
    return samples


def note_remarks(renderer: ChatRenderer, source: Source, console: Console) -> None:
    """Say for how many rows the template changes what."""
    for remark, count in renderer.remarks.items():
        note(console, f"{count} of {len(source.rows)} rows: {remark}")


def check_samples(
    config: DataSettings,
    samples: list[Sample],
    skipped: Counter[str],
    bad_rows: BadRows,
    source: Source,
    console: Console,
    held_out: int = 1,
) -> None:
    """CapreseError for too few samples or too many bad rows; a remark on those that were skipped."""
    rows = source.provenance["drawn"]
    bad_rows.check(config.data, rows)
    if bad_rows:
        source.provenance["bad_rows"] = len(bad_rows)
        note(console, f"skipped {len(bad_rows)} of {rows} rows that cannot be used: {bad_rows.reasons()}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if len(samples) < 1 + held_out:
        raise CapreseError(
            f"samples of {config.data}",
            expected="2 or more usable (one is held out)" if held_out else "1 or more usable",
            found=f"{len(samples)} of {rows}" + (f" ({reasons})" if reasons else ""),
            fix="give more data, or a higher --max-length",
        )
    if skipped:
        note(console, f"skipped {skipped.total()} of {rows} samples: {reasons}")


def check_writable(output: Path) -> None:
    """CapreseError before the work, not after it."""
    with files.reporting(f"output {output}", expected="a file that can be written", fix="give another --output"):
        files.check_target(output)
        with tempfile.TemporaryFile(dir=next(p for p in output.absolute().parents if p.exists())):
            pass
