"""From a verb's settings to what its work needs: rows, samples, an output that can be written."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from caprese_kernels import files
from caprese_kernels.errors import CapreseError

from .config import AdapterSettings
from .data.samples import Sample, encode
from .data.sources import Source, read_source
from .loading import max_sample_tokens
from .progress import progress_bar


def read_rows(config: AdapterSettings, responses: bool = True) -> Source:
    """The rows that the settings name; `responses` False: prompts alone."""
    return read_source(
        config.data,
        config.samples,
        config.seed,
        prompt_column=config.prompt_column,
        response_column=config.response_column,
        responses=responses,
        instruction=config.instruction,
    )


def encode_rows(
    config: AdapterSettings, source: Source, model_config: Any, tokenizer: Any, console: Console
) -> list[Sample]:
    """The rows as samples, with a remark on those that are skipped. CapreseError for fewer than two samples."""
    with progress_bar(console, "rows/s") as bar:
        line = bar.add_task("tokens", total=len(source.rows))
        limit = max_sample_tokens(model_config, config.max_length)
        samples, skipped = encode(tokenizer, source.rows, limit, lambda: bar.advance(line))
    check_samples(config, samples, skipped, len(source.rows), console)
    return samples


def check_samples(
    config: AdapterSettings, samples: list[Sample], skipped: Counter[str], rows: int, console: Console
) -> None:
    """CapreseError for too few samples; a remark on those that were skipped."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if len(samples) < 2:
        raise CapreseError(
            f"samples of {config.data}",
            expected="2 or more usable (one is held out)",
            found=f"{len(samples)} of {rows}" + (f" ({reasons})" if reasons else ""),
            fix="give more data, or a higher --max-length",
        )
    if skipped:
        text = f"skipped {skipped.total()} of {rows} samples: {reasons}"
        console.print(text, highlight=False, markup=False)


def check_writable(output: Path) -> None:
    """CapreseError before the work, not after it."""
    try:
        files.check_target(output)
        with tempfile.TemporaryFile(dir=next(p for p in output.absolute().parents if p.exists())):
            pass
    except OSError as error:
        raise _unwritable(output, error.strerror or str(error)) from None


def _unwritable(output: Path, found: str) -> CapreseError:
    return CapreseError(
        f"output {output}", expected="a file that can be written", found=found, fix="give another --output"
    )
