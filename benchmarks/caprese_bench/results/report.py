"""A benchmark's result: rows with their provenance, printed as tables, written as JSON, CSV and one HTML page.

A row is a flat dict of JSON values, whose columns `schemas` describes. The column "section", if there is one, groups
the rows in tables and on the page.
"""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from caprese_kernels import files, terminal
from caprese_kernels.errors import CapreseError, quote

from .plots import Plot, Row, can_plot, svg

# A table's columns: header -> (key of the row, how its value is formatted).
Columns = dict[str, tuple[str, Callable[[Any], str]]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 88em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } h2 { margin-top: 2em; }
.origin { color: #666; font-size: 13px; } details { margin: .5em 0; }
.side { display: flex; flex-wrap: wrap; gap: 2em; align-items: flex-start; }
.side svg { max-width: 100%; height: auto; } .rows { max-height: 70vh; overflow: auto; max-width: 100%; }
pre { background: #f6f6f6; padding: 1em; overflow: auto; } .warn { color: #a40000; font-weight: bold; }
"""


@dataclass
class Result:
    """The rows of one benchmark. `keys` are the columns that name a case, `measures` those that `compare` compares."""

    name: str
    provenance: dict[str, Any]
    keys: list[str]
    measures: list[str]
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # cases that failed, which have no row
    partial: bool = True  # until the benchmark has ended

    def key(self, row: Row) -> tuple[Any, ...]:
        """The row's values of `keys`."""
        return tuple(row.get(key) for key in self.keys)

    def sections(self) -> dict[str, list[Row]]:
        """The rows by their column "section", in the order of appearance."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(str(row.get("section", self.name)), []).append(row)
        return grouped

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a JSON file that `write` made. Raises CapreseError for any other."""
        from .parsing import parse, read_json  # with pydantic, which `decode` does without
        from .stored import StoredResult

        found = parse(StoredResult, read_json(path), f"result {path}")
        result = cls(**found.model_dump())
        for row in result.rows:
            wrong = [name for name in result.measures if isinstance(row.get(name), str)]
            if wrong:
                raise CapreseError(
                    f"result {path}", expected=f"figures as {wrong[0]}", found=quote(row[wrong[0]]), fix="measure again"
                )
        return result

    def write_json(self, folder: Path) -> Path:
        """Write `<name>.json` in one step, so that an interruption leaves the old or the new; returns its path."""
        path = folder / f"{self.name}.json"
        with _writing(path):
            files.write_text(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        return path

    def write(self, folder: Path, plots: Sequence[Plot] = (), columns: Columns | None = None) -> Path:
        """Write `<name>.json`, `.csv` and `.html` into `folder`; returns the JSON file's path."""
        path = self.write_json(folder)
        table = path.with_suffix(".csv")
        with _writing(table), files.staged(table) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns_of(self.rows), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        with _writing(path.with_suffix(".html")):
            files.write_text(path.with_suffix(".html"), page(self, plots, columns))
        return path


def _writing(path: Path) -> AbstractContextManager[None]:
    fix = "free some space, or give another --out"
    return files.reporting(f"result {path}", expected="a file that can be written", fix=fix)


def columns_of(rows: list[Row]) -> list[str]:
    """Every column that has a value in some row, in the order of appearance."""
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))


def table(title: str, rows: list[Row], columns: Columns) -> Table:
    """Rows as a table for the terminal, without empty columns. A value that all rows share stands in the title."""
    values = {header: [row[key] for row in rows if row.get(key) is not None] for header, (key, _) in columns.items()}
    same = {header for header, found in values.items() if len(found) > 1 and all(value == found[0] for value in found)}
    common = ", ".join(f"{header} {columns[header][1](values[header][0])}" for header in columns if header in same)
    shown = Table(title=f"{title}: {common}" if common else title)
    kept = {header: column for header, column in columns.items() if values[header] and header not in same}
    for header in kept:
        text = isinstance(values[header][0], str)
        shown.add_column(header, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        shown.add_row(*("" if row.get(key) is None else text_of(row[key]) for key, text_of in kept.values()))
    return shown


def show(result: Result, columns: Columns, as_json: bool, only: Callable[[Row], bool] = lambda row: True) -> None:
    """Print a result on stdout: the whole as JSON, or a table of each section with the rows that `only` accepts."""
    if as_json:
        terminal.print_json(asdict(result))
        return
    for section, rows in result.sections().items():
        terminal.result().print(table(section, [row for row in rows if only(row)], columns))


BODY = "<!-- body -->"  # encloses the part of a page that `body_of` returns


def page(result: Result, plots: Sequence[Plot], columns: Columns | None = None) -> str:
    """One self-contained HTML page: no scripts, style sheets or images from elsewhere. Plots need matplotlib."""
    parts = [f"<h1>{html.escape(result.name)}</h1>"]
    parts.append(f'<p class="origin">{html.escape(origin(result.provenance))}</p>')
    if result.partial:
        parts.append('<p class="warn">Partial: the run was stopped before its end.</p>')
    if plots and not can_plot():
        plots = ()
        parts.append('<p class="warn">Without plots: matplotlib was not installed.</p>')
    parts += [f'<p class="warn">Failed: {html.escape(error)}</p>' for error in result.errors]
    for section, rows in result.sections().items():
        parts.append(f"<h2>{html.escape(section)}</h2>")
        parts.append('<div class="side">' + "".join(svg(plot, rows) for plot in plots if plot.section == section))
        parts.append("</div>" + (_columns_table(rows, columns) if columns else ""))
        raw = _table(columns_of(rows), [[_shown(row.get(column)) for column in columns_of(rows)] for row in rows])
        parts.append(f"<details{'' if columns else ' open'}><summary>all figures</summary>{raw}</details>")
    source = html.escape(json.dumps(result.provenance, indent=2))
    parts.append(f"<details><summary>provenance of {result.name}</summary><pre>{source}</pre></details>")
    return document(result.name, "\n".join(parts))


def document(title: str, body: str) -> str:
    """An HTML page with this title and body."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{BODY}{body}{BODY}</html>\n"
    )


def body_of(page: str) -> str:
    """The body that `document` was given, to put several results on one page."""
    return page.split(BODY)[1]


def origin(provenance: dict[str, Any]) -> str:
    """Command, hardware, date, versions and commit, as one line of text."""
    return f"{provenance['command']} on {circumstances(provenance)}"


def circumstances(provenance: dict[str, Any]) -> str:
    """Hardware, date, versions and commit, as one line of text."""
    hardware, versions = provenance["hardware"], provenance["versions"]
    gpus = [gpu["name"] for gpu in hardware.get("gpus", [])]
    software = ", ".join(f"{name} {versions[name]}" for name in ("vllm", "torch", "triton") if versions.get(name))
    device, day = ", ".join(gpus) or cpu_name(hardware), provenance["time"][:10]
    return f"{device}, {day}, {software}, commit {short(provenance['git_commit'])}"


def short(commit: str | None) -> str:
    """The commit's first 12 digits, with "-dirty" if the checkout had uncommitted changes."""
    return "unknown" if commit is None else commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def cpu_name(hardware: dict[str, Any]) -> str:
    """The CPU, for a machine without a GPU."""
    return f"{hardware['cpu']['model']} ({hardware['cpu']['cores']} cores, no GPU)"


def _columns_table(rows: list[Row], columns: Columns) -> str:
    filled = {
        header: column for header, column in columns.items() if any(row.get(column[0]) is not None for row in rows)
    }
    cells = [["" if row.get(key) is None else text_of(row[key]) for key, text_of in filled.values()] for row in rows]
    return _table([header.strip() for header in filled], cells)


def _table(headers: list[str], cells: list[list[str]]) -> str:
    def line(tag: str, values: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = [line("td", row) for row in cells]
    return '<div class="rows"><table>' + "\n".join([line("th", headers), *body]) + "</table></div>"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
