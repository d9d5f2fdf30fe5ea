"""`caprese bench compare`: two results side by side, and whether they may be compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from caprese_kernels.errors import CapreseError

from .report import Columns, Result, table, terminal


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A result, for example an older one.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="A result of the same benchmark.")],
) -> None:
    """Two results side by side: A, B and B/A of every figure; warns where they are not comparable."""
    first, second = Result.load(a), Result.load(b)
    if first.name != second.name:
        raise CapreseError(
            "results to compare",
            expected="two of one benchmark",
            found=f"{first.name} and {second.name}",
            fix="give another file",
        )
    console = terminal()
    console.print(side_by_side(first, second))
    for warning in warnings(first, second):
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)


def side_by_side(a: Result, b: Result) -> Table:
    """The cases that both have. Ratios are B / A."""
    others = {b.key(row): row for row in b.rows}
    columns: Columns = {key: (key, str) for key in a.keys}
    for measure in a.measures:
        columns |= {f"{measure} {side}": (f"{measure} {side}", _figure) for side in ("A", "B")}
        columns[f"{measure} B/A"] = (f"{measure} B/A", "{:.3f}".format)
    rows = []
    for row in a.rows:
        other = others.get(a.key(row))
        if other is None:
            continue
        rows.append({key: row.get(key) for key in a.keys})
        for measure in a.measures:
            one, two = row.get(measure), other.get(measure)
            ratio = two / one if one and two is not None else None
            rows[-1] |= {f"{measure} A": one, f"{measure} B": two, f"{measure} B/A": ratio}
    return table(f"{a.name}, {len(rows)} cases", rows, columns)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def warnings(a: Result, b: Result) -> Iterator[str]:
    """What makes the comparison doubtful, one line each."""
    for part in ("hardware", "versions", "settings", "bandwidth"):
        for path, one, other in _differences(part, a.provenance.get(part), b.provenance.get(part)):
            yield f"other {path}: {one} and {other}"
    for name, result in (("A", a), ("B", b)):
        commit = result.provenance.get("git_commit")
        if commit is None:
            yield f"{name} does not know its commit"
        elif str(commit).endswith("-dirty"):
            yield f"{name} was measured on uncommitted changes ({commit})"
        if result.partial:
            yield f"{name} is partial: its run was stopped before the end"
        if result.errors:
            yield f"{name} has {len(result.errors)} failed cases, without rows"
    mine, theirs = ({result.key(row): row for row in result.rows} for result in (a, b))
    shapes = [{row["shape"] for row in result.rows if row.get("shape")} for result in (a, b)]
    if shapes[0] != shapes[1]:
        yield f"other shapes: {', '.join(sorted(shapes[0]))} and {', '.join(sorted(shapes[1]))}"
    for name, keys in (("A", mine.keys() - theirs.keys()), ("B", theirs.keys() - mine.keys())):
        if keys:
            yield f"{len(keys)} cases are only in {name}"
    sizes = [
        (k, s)
        for k in ("hidden_size", "neurons")
        for s in mine.keys() & theirs.keys()
        if mine[s].get(k) != theirs[s].get(k)
    ]
    if sizes:
        yield f"shapes of one name and other sizes, in {len(sizes)} figures"


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differences(f"{path}.{key}", a.get(key), b.get(key))
    elif a != b:
        yield path, a, b
