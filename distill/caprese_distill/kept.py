"""Progress of other runs with the same output: it is never deleted, but kept beside, and taken back when its run is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from .progress import note

OTHER_RUN = "it belongs to another run"


def kept_files(path: Path) -> list[Path]:
    """What is kept of the progress file `path`, the last first."""
    start = f"{path.name}.kept-"
    found = [p for p in path.parent.glob(f"{_escaped(start)}*") if p.name.removeprefix(start).isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix(start)))


def set_aside(path: Path, why: str, console: Console | None) -> Path:
    """Rename the file to one that no run writes, and say `why`; returns the new path."""
    last = kept_files(path)
    number = int(last[0].name.rpartition("-")[2]) + 1 if last else 1
    aside = path.with_name(f"{path.name}.kept-{number}")
    os.replace(path, aside)
    note(console, f"{path}: {why} (kept: {aside.name})")
    return aside


def take_back(path: Path, fits: Callable[[Path], bool], console: Console | None) -> None:
    """Where `path` is not of this run, but a kept file is, by `fits`: exchange them, and say so."""
    if path.exists() and fits(path):
        return
    found = next((each for each in kept_files(path) if fits(each)), None)
    if found is None:
        return
    if path.exists():
        set_aside(path, OTHER_RUN, console)
    os.replace(found, path)
    note(console, f"{path}: it was kept, and is taken back (from: {found.name})")


def _escaped(name: str) -> str:
    """The name for glob."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
