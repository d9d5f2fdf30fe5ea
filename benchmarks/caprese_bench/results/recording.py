"""A result that grows row by row and survives being stopped: written after each row, continued with --resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from caprese_kernels.errors import CapreseError

from .plots import Plot
from .report import Columns, Result, Row

SAME = ("git_commit", "source", "hardware", "versions", "settings")  # of the provenance, or rows do not go together


class Recording:
    """The rows so far; `path` is the JSON file that holds them."""

    def __init__(self, result: Result, path: Path):
        self.result, self.path = result, path

    def has(self, row: Row) -> bool:
        """Whether a row with the same keys is there."""
        return any(self.result.key(row) == self.result.key(other) for other in self.result.rows)

    def add(self, *rows: Row) -> None:
        """Take the rows in, instead of those with the same keys, and write the JSON file."""
        keys = {self.result.key(row) for row in rows}
        self.result.rows = [row for row in self.result.rows if self.result.key(row) not in keys]
        self.result.rows += rows
        self.save()

    def save(self) -> None:
        self.result.write_json(self.path.parent)


@contextmanager
def recording(
    result: Result,
    out: Path,
    plots: Sequence[Plot] | Callable[[Result], Sequence[Plot]],
    resume: bool | None,
    console: Console,
    columns: Columns | None = None,
) -> Iterator[Recording]:
    """`<name>.json`, `.csv` and `.html` in `out`, written whatever ends the block; partial unless it ends well.

    `resume` takes over the rows that an earlier run with the same settings, on the same machine and commit, left there.
    CapreseError where these differ, or where `out` cannot be written. None: the benchmark keeps what it needs to go on
    itself, and does so without being told. `columns` are the page's tables'.
    """
    check_writable(out)
    path = out / f"{result.name}.json"
    earlier = previous(path, result) if resume else None
    if earlier is not None:
        result.rows = earlier.rows
        result.provenance["command"] = f"{earlier.provenance['command']} && {result.provenance['command']}"
    try:
        yield Recording(result, path)
        result.partial = False
    except KeyboardInterrupt:
        how = "the same command" if resume is None else "the same command with --resume"
        console.print(f"interrupted: {len(result.rows)} rows are kept; {how} goes on")
        raise
    finally:
        result.write(out, plots(result) if callable(plots) else plots, columns)
    console.print(f"Written: {path}, .csv, .html")


def previous(path: Path, new: Result) -> Result | None:
    """The result of an earlier run that was made as this one; None if there was no run."""
    if not path.exists():
        return None
    earlier = Result.load(path)
    for part in SAME:
        # "-dirty" tells nothing here: results that are committed make it so when they are written anew; see `source`.
        then, now = (str(r.provenance.get(part)).removesuffix("-dirty") for r in (earlier, new))
        if then != now:
            raise CapreseError(
                f"--resume of {path}",
                expected=f"{part.replace('_', ' ')} as then: {then}",
                found=now,
                fix="run without --resume, or with another --out",
            )
    return earlier


def earlier_rows(path: Path, new: Result) -> list[Row]:
    """The rows of an earlier run that was made as this one; none where it was made otherwise, or is no result."""
    try:
        earlier = previous(path, new)
    except CapreseError:
        return []
    return earlier.rows if earlier else []


def check_writable(out: Path) -> None:
    """Fail before the work, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CapreseError(
            "--out", expected="a folder that can be written", found=f"{out}: {error.strerror}", fix="give another"
        ) from None


def progress(console: Console) -> Progress:
    """A bar with counts and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
