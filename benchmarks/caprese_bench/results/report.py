"""What every benchmark shares: rows with their provenance, shown as a table, written as JSON, CSV and one HTML page.

A row is a flat dict of JSON values. The column "section" groups rows in tables and on the page, where there is one.
"""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from caprese_kernels.errors import CapreseError

from .plots import Plot, Row, svg

# Header of a column, what it shows, and how.
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
    """A benchmark's rows. `keys` are the columns that name a case, `measures` what `compare` sets side by side."""

    name: str
    provenance: dict[str, Any]
    keys: list[str]
    measures: list[str]
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # cases that failed, which have no row
    partial: bool = True  # until the benchmark has gone through to its end

    def key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.keys)

    def sections(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(str(row.get("section", self.name)), []).append(row)
        return found

    @classmethod
    def load(cls, path: Path) -> Result:
        """From a JSON file that `write` made."""
        try:
            result = cls(**json.loads(path.read_text()))
            for row in result.rows:
                if not isinstance(row, dict) or any(isinstance(row.get(name), str) for name in result.measures):
                    raise ValueError("rows that are none")
            return result
        except (OSError, ValueError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "another content"
            raise CapreseError(
                f"result {path}",
                expected="a JSON file that a benchmark wrote",
                found=reason or str(error),
                fix="correct the path",
            ) from None

    def write_json(self, folder: Path) -> Path:
        """`<name>.json`, replaced in one step: an interrupted run leaves the older one or the newer one."""
        folder.mkdir(parents=True, exist_ok=True)
        path, new = folder / f"{self.name}.json", folder / f".{self.name}.json.new"
        new.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
        new.replace(path)
        return path

    def write(self, folder: Path, plots: Sequence[Plot] = (), columns: Columns | None = None) -> Path:
        """`<name>.json`, `.csv` and `.html` in `folder`; returns the JSON's path."""
        path = self.write_json(folder)
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns_of(self.rows), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        path.with_suffix(".html").write_text(page(self, plots, columns))
        return path


def iqr(values: Sequence[float]) -> float:
    """Interquartile range; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def columns_of(rows: list[Row]) -> list[str]:
    """Every column that some row fills, in the order of appearance."""
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))


def table(title: str, rows: list[Row], columns: Columns) -> Table:
    """Rows for the terminal. Columns that no row fills are left out; what all rows share is said above."""
    values = {header: [row[key] for row in rows if row.get(key) is not None] for header, (key, _) in columns.items()}
    same = {header for header, found in values.items() if len(found) > 1 and all(value == found[0] for value in found)}
    told = ", ".join(f"{header} {columns[header][1](values[header][0])}" for header in columns if header in same)
    shown = Table(title=f"{title}: {told}" if told else title)
    kept = {header: column for header, column in columns.items() if values[header] and header not in same}
    for header in kept:
        text = isinstance(values[header][0], str)
        shown.add_column(header, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        shown.add_row(*("" if row.get(key) is None else show(row[key]) for key, show in kept.values()))
    return shown


def terminal() -> Console:
    """Where tables go; wide enough for them where the output is a file."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)
    return console


BODY = "<!-- body -->"  # what `body_of` takes out of a page stands between two of these


def page(result: Result, plots: Sequence[Plot], columns: Columns | None = None) -> str:
    """One HTML page that needs nothing else: no script, no style sheet, no picture from elsewhere."""
    parts = [f"<h1>{html.escape(result.name)}</h1>"]
    parts.append(f'<p class="origin">{html.escape(origin(result.provenance))}</p>')
    if result.partial:
        parts.append('<p class="warn">Partial: the run was stopped before its end.</p>')
    parts += [f'<p class="warn">Failed: {html.escape(error)}</p>' for error in result.errors]
    for section, rows in result.sections().items():
        parts.append(f"<h2>{html.escape(section)}</h2>")
        parts.append('<div class="side">' + "".join(svg(plot, rows) for plot in plots if plot.section == section))
        parts.append("</div>" + (_columns_table(rows, columns) if columns else ""))
        raw = _table(columns_of(rows), [[_shown(row.get(column)) for column in columns_of(rows)] for row in rows])
        parts.append(f"<details{'' if columns else ' open'}><summary>all figures</summary>{raw}</details>")
    source = html.escape(json.dumps(result.provenance, indent=2))
    parts.append(f"<details><summary>where {result.name} comes from</summary><pre>{source}</pre></details>")
    return document(result.name, "\n".join(parts))


def document(title: str, body: str) -> str:
    """A page of its own."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{BODY}{body}{BODY}</html>\n"
    )


def body_of(page: str) -> str:
    """What `document` was given, for a page that holds several."""
    return page.split(BODY)[1]


def origin(provenance: dict[str, Any]) -> str:
    """Command, hardware, date, versions and commit in a line."""
    return f"{provenance['command']} on {circumstances(provenance)}"


def circumstances(provenance: dict[str, Any]) -> str:
    """Hardware, date, versions and commit."""
    hardware, versions = provenance["hardware"], provenance["versions"]
    gpus = [gpu["name"] for gpu in hardware.get("gpus", [])]
    told = ", ".join(f"{name} {versions[name]}" for name in ("vllm", "torch", "triton") if versions.get(name))
    where, day = ", ".join(gpus) or cpu_name(hardware), provenance["time"][:10]
    return f"{where}, {day}, {told}, commit {short(provenance['git_commit'])}"


def short(commit: str | None) -> str:
    """12 digits, and whether the checkout had changes."""
    return "unknown" if commit is None else commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def cpu_name(hardware: dict[str, Any]) -> str:
    return f"{hardware['cpu']['model']} ({hardware['cpu']['cores']} cores, no GPU)"


def _columns_table(rows: list[Row], columns: Columns) -> str:
    filled = {
        header: column for header, column in columns.items() if any(row.get(column[0]) is not None for row in rows)
    }
    cells = [["" if row.get(key) is None else show(row[key]) for key, show in filled.values()] for row in rows]
    return _table([header.strip() for header in filled], cells)


def _table(headers: list[str], cells: list[list[str]]) -> str:
    def line(tag: str, values: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = [line("td", row) for row in cells]
    return '<div class="rows"><table>' + "\n".join([line("th", headers), *body]) + "</table></div>"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
