"""`caprese bench parameters`: what Caprese adds to a model, and what it spares (the paper's figure 6), from configs.

The families need only the package's base dependencies; another model's config needs transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, resolve_layers
from caprese_serve.provenance import provenance

from ..paper.counts import ParameterCount, count, count_published, spared_share
from ..paper.families import FAMILIES, model_config
from ..results.plots import Plot
from ..results.recording import recording
from ..results.report import Columns, Result, Row, show
from ..results.settings import OutputSettings, options_of

KEYS = ["section", "model", "rank", "density"]
MEASURES = ["added", "added_of_model", "added_of_ff", "cut_griffin", "cut_cats"]
SECTIONS = {"all layers": "all", "first half of the layers": "first-half"}


@dataclass(frozen=True, kw_only=True)
class ParametersSettings(OutputSettings):
    """Options of `caprese bench parameters`."""

    rank: Annotated[int, typer.Option(min=1, help="Rank r of the low-rank layers.")] = DEFAULT_RANK
    density: Annotated[float, typer.Option(min=0, max=1, help="Share of neurons kept.")] = DEFAULT_DENSITY
    model: Annotated[
        list[str] | None, typer.Option(help="Model directory or Hub id, instead of the families; may be repeated.")
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="Only the smallest model of each family.")] = False


@options_of(ParametersSettings)
def parameters(settings: ParametersSettings) -> None:
    """Share of new parameters, and active parameters cut: Llama 3, Gemma 2 and Qwen 2.5 families, or your model."""
    if settings.model:
        counts = [count(path, model_config(path)) for path in settings.model]
    else:
        counts = [count_published(family, name) for family, name in _published(settings.quick)]
    recorded = {"rank": settings.rank, "density": settings.density, "quick": settings.quick}
    result = Result("parameters", provenance() | {"settings": recorded}, KEYS, MEASURES)
    with recording(result, settings.out, PLOTS, resume=None, columns=COLUMNS) as record:
        record.add(*(row(section, each, settings.rank, settings.density) for section in SECTIONS for each in counts))
    show(result, COLUMNS, settings.as_json)


def _published(quick: bool) -> list[tuple[str, str]]:
    """(family, model) of all models, or of the smallest of each family."""
    return [(name, model) for name, family in FAMILIES.items() for model in list(family.models)[: 1 if quick else None]]


def row(section: str, count: ParameterCount, rank: int, density: float) -> Row:
    """A model's row with the layers of `section` sparse, each with L [D, r] and R [r, D]."""
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
        **{f"cut_{method}": spared_share(count, method, sparse, rank, density) for method in ("griffin", "cats")},
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
