"""`caprese bench compare`: two results side by side, and what makes the comparison doubtful."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from caprese_kernels import terminal
from caprese_kernels.errors import CapreseError

from .report import Columns, Result, Row, table


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A result, for example an older one.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="A result of the same benchmark.")],
    as_json: terminal.AsJson = False,
) -> None:
    """Print A, B and B/A of every figure; warn where the two results are not comparable."""
    first, second = Result.load(a), Result.load(b)
    if first.name != second.name:
        raise CapreseError(
            "results to compare",
            expected="two of one benchmark",
            found=f"{first.name} and {second.name}",
            fix="give two files of the same name",
        )
    rows = side_by_side(first, second)
    doubts = list(warnings(first, second))
    if as_json:
        terminal.print_json({"name": first.name, "rows": rows, "warnings": doubts})
        return
    console = terminal.result()
    console.print(table(f"{first.name}, {len(rows)} cases", rows, columns(first)))
    for doubt in doubts:
        console.print(Text.assemble(("warning:", "yellow"), f" {doubt}"), soft_wrap=True)


def side_by_side(a: Result, b: Result) -> list[Row]:
    """A row for each case that both results have: its keys, and "MEASURE A", "MEASURE B" and "MEASURE B/A"."""
    others = {b.key(row): row for row in b.rows}
    rows = []
    for row in a.rows:
        other = others.get(a.key(row))
        if other is None:
            continue
        pair: Row = {key: row.get(key) for key in a.keys}
        for measure in a.measures:
            one, two = row.get(measure), other.get(measure)
            ratio = two / one if one and two is not None else None
            pair |= {f"{measure} A": one, f"{measure} B": two, f"{measure} B/A": ratio}
        rows.append(pair)
    return rows


def columns(result: Result) -> Columns:
    """The columns of the table of such rows."""
    shown: Columns = {key: (key, str) for key in result.keys}
    for measure in result.measures:
        shown |= {f"{measure} {side}": (f"{measure} {side}", _figure) for side in ("A", "B")}
        shown[f"{measure} B/A"] = (f"{measure} B/A", "{:.3f}".format)
    return shown


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def warnings(a: Result, b: Result) -> Iterator[str]:
    """What makes the comparison doubtful, one line each."""
    for part in ("hardware", "versions", "settings", "bandwidth"):
        for path, one, other in _differences(part, a.provenance.get(part), b.provenance.get(part)):
            yield f"different {path}: {one} and {other}"
    for name, result in (("A", a), ("B", b)):
        commit = result.provenance.get("git_commit")
        if commit is None:
            yield f"the commit of {name} is unknown"
        elif str(commit).endswith("-dirty"):
            yield f"{name} was measured on uncommitted changes ({commit})"
        if result.partial:
            yield f"{name} is partial: its run was stopped before the end"
        if result.errors:
            yield f"{name} has {len(result.errors)} failed cases, without rows"
    rows_a, rows_b = ({result.key(row): row for row in result.rows} for result in (a, b))
    shapes = [{row["shape"] for row in result.rows if row.get("shape")} for result in (a, b)]
    if shapes[0] != shapes[1]:
        yield f"different shapes: {', '.join(sorted(shapes[0]))} and {', '.join(sorted(shapes[1]))}"
    for name, keys in (("A", rows_a.keys() - rows_b.keys()), ("B", rows_b.keys() - rows_a.keys())):
        if keys:
            yield f"{len(keys)} cases are only in {name}"
    sizes = [
        (column, key)
        for column in ("hidden_size", "neurons")
        for key in rows_a.keys() & rows_b.keys()
        if rows_a[key].get(column) != rows_b[key].get(column)
    ]
    if sizes:
        yield f"shapes of one name but different sizes, in {len(sizes)} figures"


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(f"{path}.{key}", a.get(key), b.get(key))
    elif a != b:
        yield path, a, b
