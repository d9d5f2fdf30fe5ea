"""A result that grows row by row: written after each row, so that a stopped run can be continued with --resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from caprese_kernels import files, terminal
from caprese_kernels.errors import CapreseError

from .plots import Plot, can_plot
from .report import Columns, Result, Row

# Parts of the provenance that must be equal for rows of two runs to stand in one result.
SAME = ("git_commit", "source", "hardware", "versions", "settings")


class Recording:
    """A result in progress; `path` is its JSON file."""

    def __init__(self, result: Result, path: Path):
        self.result, self.path = result, path

    def has(self, row: Row) -> bool:
        """Whether there is a row with the same keys."""
        return any(self.result.key(row) == self.result.key(other) for other in self.result.rows)

    def add(self, *rows: Row) -> None:
        """Add the rows, replacing those with the same keys, and write the JSON file."""
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
    columns: Columns | None = None,
) -> Iterator[Recording]:
    """Writes `<name>.json`, `.csv` and `.html` to `out` when the block ends; partial if it ends by an exception.

    With `resume` the result starts with the rows that an earlier run with the same settings, on the same machine and
    commit, left in `out`; raises CapreseError if these differ, or if `out` cannot be written. `resume` is None for a
    benchmark that stores its own intermediate results and always continues from them. `columns` are those of the page's
    tables.
    """
    check_writable(out)
    path = out / f"{result.name}.json"
    with files.output_lock(path):
        yield from _recording(result, path, plots, resume, columns)


def _recording(
    result: Result,
    path: Path,
    plots: Sequence[Plot] | Callable[[Result], Sequence[Plot]],
    resume: bool | None,
    columns: Columns | None,
) -> Iterator[Recording]:
    earlier = previous(path, result) if resume else None
    if earlier is not None:
        result.rows = earlier.rows
        result.provenance["command"] = f"{earlier.provenance.get('command')} && {result.provenance['command']}"
    try:
        yield Recording(result, path)
        result.partial = False
    except KeyboardInterrupt:
        command = "the same command" if resume is None else "the same command with --resume"
        terminal.notes().print(f"interrupted: {len(result.rows)} rows are kept; {command} continues", soft_wrap=True)
        raise
    finally:
        result.write(path.parent, plots(result) if callable(plots) else plots, columns)
    written = f"Written: {path}, .csv, .html"
    if not can_plot():
        written += ' (without plots: pip install "caprese-vllm[bench]")'
    terminal.notes().print(written, soft_wrap=True, markup=False)


def previous(path: Path, new: Result) -> Result | None:
    """The result of an earlier run, or None. Raises CapreseError if its settings, machine or sources differ."""
    if not path.exists():
        return None
    earlier = Result.load(path)
    for part in SAME:
        # Without "-dirty": writing a committed result again makes the checkout dirty; `source` is exact.
        then, now = (str(r.provenance.get(part)).removesuffix("-dirty") for r in (earlier, new))
        if then != now:
            raise CapreseError(
                f"--resume of {path}",
                expected=f"the same {part.replace('_', ' ')} as the earlier run: {then}",
                found=now,
                fix="run without --resume, or with another --out",
            )
    return earlier


def check_writable(out: Path) -> None:
    """Make the folder. Raises CapreseError now, before the work, if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CapreseError(
            "--out",
            expected="a folder that can be written",
            found=f"{out}: {error.strerror}",
            fix="give another folder",
        ) from None


def progress() -> Progress:
    """A progress bar on stderr: description, bar, counts, time so far and time left."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=terminal.notes())
