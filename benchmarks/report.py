"""What every benchmark shares: rows with their provenance, shown as a table, written as JSON, CSV and one HTML page.

A row is a flat dict of JSON values. The column "section" groups rows in tables and on the page, where there is one.
"""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from caprese_kernels.errors import CapreseError

Row = dict[str, Any]
# Header of a column, what it shows, and how.
Columns = dict[str, tuple[str, Callable[[Any], str]]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 88em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
td.text { text-align: left; }
.side { display: flex; flex-wrap: wrap; gap: 2em; align-items: flex-start; }
.side svg { max-width: 100%; height: auto; } .rows { max-height: 70vh; overflow: auto; max-width: 100%; }
pre { background: #f6f6f6; padding: 1em; overflow: auto; } .warn { color: #a40000; font-weight: bold; }
"""


@dataclass
class Plot:
    """y against x for the rows of one section: one line for each value of `by`, one panel for each value of `panel`."""

    section: str
    x: str
    y: str
    by: tuple[str, ...]
    xlabel: str
    ylabel: str
    panel: str | None = None
    log2_x: bool = False
    level: float | None = None  # a horizontal line: where two things are equal, or a target


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

    def write(self, folder: Path, plots: Sequence[Plot] = ()) -> Path:
        """`<name>.json`, `.csv` and `.html` in `folder`; returns the JSON's path."""
        path = self.write_json(folder)
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns_of(self.rows), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        path.with_suffix(".html").write_text(page(self, plots))
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


def page(result: Result, plots: Sequence[Plot]) -> str:
    """One HTML page that needs nothing else: no script, no style sheet, no picture from elsewhere."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(result.name)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(result.name)}</h1>"
    ]
    if result.partial:
        parts.append('<p class="warn">Partial: the run was stopped before its end.</p>')
    parts += [f'<p class="warn">Failed: {html.escape(error)}</p>' for error in result.errors]
    for section, rows in result.sections().items():
        parts.append(f'<h2>{html.escape(section)}</h2><div class="side"><div>')
        parts += [_svg(plot, rows) for plot in plots if plot.section == section]
        parts.append(f'</div><div class="rows">{_html_table(rows)}</div></div>')
    source = html.escape(json.dumps(result.provenance, indent=2))
    parts.append(f"<h2>Where this comes from</h2><pre>{source}</pre></html>\n")
    return "\n".join(parts)


def _html_table(rows: list[Row]) -> str:
    columns = [column for column in columns_of(rows) if column != "section"]

    def line(tag: str, values: list[Any]) -> str:
        left = [" class=text" if isinstance(value, str) and tag == "td" else "" for value in values]
        cells = zip(left, (html.escape(_shown(value)) for value in values), strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in cells) + "</tr>"

    body = [line("td", [row.get(column) for column in columns]) for row in rows]
    return "<table>" + "\n".join([line("th", list(columns)), *body]) + "</table>"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _svg(plot: Plot, rows: list[Row]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get(plot.x) is not None and row.get(plot.y) is not None]
    panels = list(dict.fromkeys(row.get(plot.panel) if plot.panel else None for row in rows)) or [None]
    lines = (len(panels) + 1) // 2 if len(panels) > 1 else 1
    figure = Figure(figsize=(5.2 * min(2, len(panels)), 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, min(2, len(panels)), squeeze=False, sharey=True).flat
    for panel, ax in zip(panels, axes, strict=False):
        here = [row for row in rows if plot.panel is None or row.get(plot.panel) == panel]
        for name in dict.fromkeys(tuple(row.get(column) for column in plot.by) for row in here):
            points = [(r[plot.x], r[plot.y]) for r in here if tuple(r.get(column) for column in plot.by) == name]
            words = isinstance(points[0][0], str)  # no line between things that have no order
            named = ((v, k) for k, v in zip(plot.by, name, strict=True) if v is not None)
            label = ", ".join(v if isinstance(v, str) else f"{k} {v:g}" for v, k in named)
            ax.plot(*zip(*points, strict=True), "o" if words else "o-", label=label, markersize=4)
            ax.tick_params(axis="x", labelrotation=20 if words else 0)
        if plot.level is not None:
            ax.axhline(plot.level, color="0.5", linewidth=1, linestyle="--")
        if plot.log2_x:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlabel=plot.xlabel, ylabel=plot.ylabel, title=panel, ylim=(0, None))
        ax.legend(fontsize="small")
    for ax in list(figure.axes)[len(panels) :]:
        ax.set_visible(False)
    text, nothing = StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text: smaller, and it can be searched. The salt makes the same rows the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "caprese"}):
        figure.savefig(text, format="svg", metadata=nothing)
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
