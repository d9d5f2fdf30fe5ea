"""Questions, and reading the data sets that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprese_kernels import files
from caprese_kernels.errors import CapreseError, quote
from caprese_kernels.json_text import parse_json

MAX_ROW = 1 << 22  # bytes of a line


@dataclass(frozen=True)
class Question:
    """One problem as it is sent to the server."""

    id: str
    prompt: str
    difficulty: str | None = None
    stop: tuple[str, ...] = ()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one in each line. Raises CapreseError with the number of a line that is not one."""
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, MAX_ROW)
        except ValueError as error:
            raise _wrong_line(path, number, str(error)) from None
        if not isinstance(row, dict):
            raise _wrong_line(path, number, quote(row))
        rows.append(row)
    return rows


def _lines(path: Path) -> Iterator[bytes]:
    """Line by line, so that a long one is refused before it is in memory."""
    with (
        files.reporting(f"--data {path}", expected="a JSONL file", fix="correct the path"),
        files.open_regular(path) as file,
    ):
        while line := file.readline(MAX_ROW + 1):
            yield line


def _wrong_line(path: Path, number: int, found: str) -> CapreseError:
    return CapreseError(f"--data {path}, line {number}", expected="a JSON object", found=found, fix="correct the line")


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
