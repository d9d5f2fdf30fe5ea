"""Plots of a result's rows as SVG for an HTML page: lines with error bars, lines with bands, or groups of bars."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from typing import Any, Literal

Row = dict[str, Any]
# A variant has the same colour in all benchmarks.
COLOURS = {
    "Full": "#333333",
    "GRIFFIN": "#e08214",
    "LoRA": "#8073ac",
    "Caprese (GRIFFIN)": "#1f78b4",
    "CATS": "#b2a429",
    "Caprese (CATS)": "#1b9e77",
}
OTHERS = ("#1f78b4", "#e08214", "#1b9e77", "#8073ac", "#d7301f", "#b2a429", "#666666", "#e7298a", "#a6761d")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller files, which can be searched
    "svg.hashsalt": "caprese",  # the same rows give the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


@dataclass
class Plot:
    """y against x for the rows of one section, each named by its column.

    There is a line, or a colour of bars, for each value of the columns `by`, and a panel for each value of `panel`.
    `error` is the column of the error's half width: error bars, or the shade around a line of kind "band". `level` is a
    horizontal line, for a target or equality.
    """

    section: str
    x: str
    y: str
    by: tuple[str, ...]
    xlabel: str
    ylabel: str
    panel: str | None = None
    log2_x: bool = False
    level: float | None = None
    error: str | None = None
    kind: Literal["line", "band", "bar"] = "line"
    from_zero: bool = True
    percent: bool = False  # y is a share
    show: Callable[[float], str] | None = None  # formats the number above a bar


def can_plot() -> bool:
    """Whether matplotlib is installed; without it results have no plots."""
    return find_spec("matplotlib") is not None


def svg(plot: Plot, rows: Sequence[Row]) -> str:
    """One figure as an SVG element, its panels two a line. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in rows if row.get(plot.x) is not None and row.get(plot.y) is not None]
    panels = list(dict.fromkeys(row.get(plot.panel) if plot.panel else None for row in rows)) or [None]
    colours = _colours(plot, rows)
    text, no_metadata = StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        lines, across = -(-len(panels) // 2), min(2, len(panels))
        figure = Figure(figsize=(5.6 * across, 3.6 * lines), layout="constrained")
        axes = figure.subplots(lines, across, squeeze=False, sharey=True).flat
        for panel, ax in zip(panels, axes, strict=False):
            in_panel = [row for row in rows if plot.panel is None or row.get(plot.panel) == panel]
            (_bars if plot.kind == "bar" else _lines)(ax, plot, in_panel, colours)
            if plot.level is not None:
                ax.axhline(plot.level, color="0.5", linewidth=1, linestyle="--")
            ax.set(xlabel=plot.xlabel, ylabel=plot.ylabel, title=panel)
            if plot.from_zero:
                ax.set_ylim(0, None)
            if plot.percent:
                ax.yaxis.set_major_formatter(PercentFormatter(1))
            if len(colours) > 1:
                above = plot.kind == "bar" and panel is None  # bars leave no room inside
                place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
                ax.legend(fontsize="small", **(place if above else {"ncols": 2 if len(colours) > 4 else 1}))
        for ax in list(figure.axes)[len(panels) :]:
            ax.set_visible(False)
        figure.savefig(text, format="svg", metadata=no_metadata)
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def _series(plot: Plot, row: Row) -> str:
    """The name of the row's line: the values of `by`, numbers after their column's name."""
    named = ((row.get(column), column) for column in plot.by if row.get(column) is not None)
    return ", ".join(value if isinstance(value, str) else f"{column} {value:g}" for value, column in named)


def _colours(plot: Plot, rows: Sequence[Row]) -> dict[str, Any]:
    """The colour of each line: a name's own, or from dark to light for numbers."""
    import matplotlib

    names = list(dict.fromkeys(_series(plot, row) for row in rows))
    if len(names) > 2 and all(isinstance(row.get(column), int | float) for row in rows for column in plot.by):
        return {name: matplotlib.colormaps["viridis"](i / len(names)) for i, name in enumerate(names)}
    free = (colour for colour in OTHERS * len(names) if colour not in [COLOURS.get(name) for name in names])
    return {name: COLOURS.get(name) or next(free) for name in names}


def _lines(ax: Any, plot: Plot, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    words = any(isinstance(row[plot.x], str) for row in rows)  # words have no order: points without a line
    for name in dict.fromkeys(_series(plot, row) for row in rows):
        own = [row for row in rows if _series(plot, row) == name]
        x, y = ([row[column] for row in own] for column in (plot.x, plot.y))
        if plot.kind == "band":
            half = _errors(plot, own) or [0.0] * len(y)
            ax.plot(x, y, color=colours[name], label=name)
            low, high = ([a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1))
            ax.fill_between(x, low, high, color=colours[name], alpha=0.2, linewidth=0)
            continue
        style = {"color": colours[name], "marker": "o", "markersize": 4, "linestyle": "" if words else "-"}
        ax.errorbar(x, y, _errors(plot, own), label=name, capsize=2, elinewidth=1, **style)
    ax.tick_params(axis="x", labelrotation=20 if words else 0)
    if plot.log2_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")


def _bars(ax: Any, plot: Plot, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    groups = list(dict.fromkeys(str(row[plot.x]) for row in rows))
    names = list(dict.fromkeys(_series(plot, row) for row in rows))
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        own = [row for row in rows if _series(plot, row) == name]
        at = [groups.index(str(row[plot.x])) + (i - (len(names) - 1) / 2) * width for row in own]
        style = {"color": colours[name], "error_kw": {"ecolor": "0.3", "capsize": 2, "elinewidth": 1}}
        heights = [row[plot.y] for row in own]
        bars = ax.bar(at, heights, width * 0.92, yerr=_errors(plot, own), label=name, **style)
        if plot.show:
            ax.bar_label(bars, [plot.show(row[plot.y]) for row in own], fontsize=7, padding=3)
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(axis="x", visible=False)


def _errors(plot: Plot, rows: Sequence[Row]) -> list[float] | None:
    return [row.get(plot.error) or 0.0 for row in rows] if plot.error else None
