"""What a long step shows: remarks, and a progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    """Units a second since this process began, without what a checkpoint restored."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        new = task.completed - task.fields.get("first", 0)
        if not (task.elapsed and new):
            return Text(f"- {self.unit}")
        speed = new / task.elapsed
        return Text(f"{speed:,.{0 if speed >= 10 else 1}f} {self.unit}")


def progress_bar(console: Console | None, unit: str) -> Progress:
    """A bar with the speed in `unit` (such as "tok/s") and the time left; silent without a console."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, _Speed(unit), TimeRemainingColumn(), console=console, disable=console is None)


def note(console: Console | None, text: str) -> None:
    """Print a remark as it is: nothing in it is markup, a number or a path to be coloured."""
    if console:
        console.print(text, highlight=False, markup=False)
