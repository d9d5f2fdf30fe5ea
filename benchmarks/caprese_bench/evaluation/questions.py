"""Questions, and reading the data sets that they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprese_kernels.errors import CapreseError


@dataclass(frozen=True)
class Question:
    """One problem as it is sent to the server."""

    id: str
    prompt: str
    difficulty: str | None = None
    stop: tuple[str, ...] = ()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one in each line. Raises CapreseError with the number of a line that is not one."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CapreseError(
            f"--data {path}", expected="a JSONL file", found=str(error), fix="correct the path"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise CapreseError(
                f"--data {path}, line {number}", expected="a JSON object", found=line[:60], fix="correct the line"
            )
        rows.append(row)
    return rows


def hub(name: str, load: Callable[[Any], Any]) -> Any:
    """`load(datasets)` for a data set of the Hub. Raises CapreseError if it cannot be downloaded or read."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return load(datasets)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CapreseError(
            f"data set {name}",
            expected="one on the Hub or in its local cache",
            found=f"{type(error).__name__}: {error}",
            fix="give a local file with the same columns, --data TASK=FILE.jsonl",
        ) from None
