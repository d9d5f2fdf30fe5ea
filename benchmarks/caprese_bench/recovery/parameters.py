"""`caprese bench parameters`: what Caprese adds to a model, and what it spares (the paper's figure 6), from configs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, resolve_layers
from caprese_serve.provenance import provenance

from ..paper.counts import Count, count, cut
from ..paper.families import FAMILIES, config, model_config
from ..results.plots import Plot
from ..results.recording import recording
from ..results.report import Columns, Result, Row, table, terminal

KEYS = ["section", "model", "rank", "density"]
MEASURES = ["added", "added_of_model", "added_of_ff", "cut_griffin", "cut_cats"]
SECTIONS = {"all layers": "all", "first half of the layers": "first-half"}


def parameters(
    rank: Annotated[int, typer.Option(min=1, help="Rank r of the low-rank layers.")] = DEFAULT_RANK,
    density: Annotated[float, typer.Option(min=0, max=1, help="Share of neurons kept.")] = DEFAULT_DENSITY,
    model: Annotated[
        list[str] | None, typer.Option(help="Model directory or Hub id, instead of the families; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the smallest model of each family.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for parameters.json, .csv and .html.")] = Path("out/bench"),
) -> None:
    """Share of new parameters, and active parameters cut: Llama 3, Gemma 2 and Qwen 2.5 families, or your model."""
    counts = [count(name, config(family, name), family) for family, name in _known(quick)] if not model else []
    counts += [count(path, model_config(path)) for path in model or []]
    settings = {"rank": rank, "density": density, "quick": quick}
    result = Result("parameters", provenance() | {"settings": settings}, KEYS, MEASURES)
    with recording(result, out, PLOTS, resume=None, console=terminal(), columns=COLUMNS) as record:
        record.add(*(row(section, each, rank, density) for section in SECTIONS for each in counts))
    console = terminal()
    for section, rows in result.sections().items():
        console.print(table(section, rows, COLUMNS))


def _known(quick: bool) -> list[tuple[str, str]]:
    return [(family, name) for family, (_, models) in FAMILIES.items() for name in list(models)[: 1 if quick else None]]


def row(section: str, count: Count, rank: int, density: float) -> Row:
    """One model with the layers of `section` sparse: L [D, r] and R [r, D] each."""
    sparse = len(resolve_layers(SECTIONS[section], count.layers))  # type: ignore[arg-type]
    added = sparse * 2 * count.hidden_size * rank
    return {
        "section": section,
        "family": count.family,
        "model": count.name,
        "rank": rank,
        "density": density,
        "parameters": count.total,
        "parameters_b": count.total / 1e9,
        "ff_parameters": count.ff * count.layers,
        "added": added,
        "added_of_model": added / count.total,
        "added_of_ff": added / (count.ff * count.layers),
        **{f"cut_{method}": cut(count, method, sparse, rank, density) for method in ("griffin", "cats")},
    }


COLUMNS: Columns = {
    "model": ("model", str),
    "rank": ("rank", str),
    "density": ("density", "{:g}".format),
    "parameters": ("parameters", "{:,}".format),
    "in FF blocks": ("ff_parameters", "{:,}".format),
    "added": ("added", "{:,}".format),
    "of the model": ("added_of_model", "{:.2%}".format),
    "of the FF blocks": ("added_of_ff", "{:.2%}".format),
    "active cut, GRIFFIN": ("cut_griffin", "{:.1%}".format),
    "active cut, CATS": ("cut_cats", "{:.1%}".format),
}
BILLIONS = "parameters of the model, billions"
PLOTS = [
    plot
    for section in SECTIONS
    for plot in (
        Plot(
            section,
            "parameters_b",
            "added_of_model",
            ("family",),
            BILLIONS,
            "new / all parameters",
            log2_x=True,
            percent=True,
        ),
        Plot(
            section,
            "parameters_b",
            "added_of_ff",
            ("family",),
            BILLIONS,
            "new / FF parameters",
            log2_x=True,
            percent=True,
        ),
    )
]
