"""Draws the README's picture from the measured results: accuracy and time to the next token of each variant.

`python -m tools.readme` draws it with the tables. The same results give the same bytes: text stays text, so that the
file carries its figures and their source, and nothing in it depends on the date.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

VARIANTS = ("Full", "GRIFFIN", "Caprese (GRIFFIN)", "CATS", "Caprese (CATS)")
# Readable on a white page and on a dark one alike.
INK, ERROR, FULL, SPARSE, CAPRESE = "#7d8590", "#5b6470", "#9aa3ad", "#d9822b", "#2f9e8f"


@dataclass(frozen=True)
class Panel:
    """One bar for each variant, in the order of VARIANTS; `errors` are the half widths of the error bars."""

    title: str
    subtitle: str
    values: tuple[float, ...]
    errors: tuple[float, ...]
    labels: tuple[str, ...]
    limit: float


def draw(panels: tuple[Panel, Panel], source: str) -> str:
    """An SVG, `source` in its metadata and below the bars."""
    settings: dict[Any, Any] = {  # of keys that matplotlib types one by one
        "svg.fonttype": "none",
        "svg.hashsalt": "caprese",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9.6, 3.5))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, panel in zip((left, right), panels, strict=True):
            _bars(axes, panel)
        left.set_yticks(range(len(VARIANTS)), VARIANTS)
        left.invert_yaxis()  # shared: the first variant on top in both
        figure.subplots_adjust(left=0.155, right=0.985, top=0.76, bottom=0.1, wspace=0.08)
        figure.text(0.012, 0.02, source, fontsize=7.5)
        written = io.StringIO()
        figure.savefig(
            written,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": "tools/picture.py", "Title": f"{panels[0].title}. {panels[1].title}",
                      "Description": source},
        )  # fmt: skip
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def _bars(axes: Axes, panel: Panel) -> None:
    colours = [FULL if name == "Full" else CAPRESE if "Caprese" in name else SPARSE for name in VARIANTS]
    axes.barh(
        range(len(VARIANTS)), panel.values, xerr=panel.errors, color=colours, height=0.68,
        error_kw={"ecolor": ERROR, "elinewidth": 1.2, "capsize": 2.5},
    )  # fmt: skip
    for row, (value, error, label) in enumerate(zip(panel.values, panel.errors, panel.labels, strict=True)):
        axes.text(value + error + panel.limit * 0.02, row, label, va="center", fontsize=9.5)
    axes.set_xlim(0, panel.limit)
    axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", pad=33)
    axes.text(0, 1.03, panel.subtitle, transform=axes.transAxes, fontsize=8.5, linespacing=1.35)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
