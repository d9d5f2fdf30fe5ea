"""`caprese bench parameters`: what Caprese adds to a model, and what it spares (the paper's figure 6), from configs."""

from __future__ import annotations

if not __package__:
    import as_script  # type: ignore[import-not-found]  # noqa: F401

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from caprese_kernels.config import DEFAULT_DENSITY, DEFAULT_RANK, resolve_layers
from caprese_serve.provenance import provenance

from .families import FAMILIES, config, model_config
from .plots import Plot
from .recording import recording
from .report import Columns, Result, Row, table, terminal

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


@dataclass(frozen=True)
class Count:
    """A model's parameters; tied embeddings count once."""

    name: str
    family: str
    hidden_size: int
    layers: int
    total: int
    ff: int  # of one FF block
    gate: int  # of its gate projection, which CATS must read whole


def count(name: str, hf_config: Any, family: str = "") -> Count:
    """Exact: the transformers model itself is made, without memory for its weights. CapreseError for no gated FF."""
    import torch
    from transformers import AutoModelForCausalLM

    from caprese_distill.blocks import find_blocks
    from caprese_kernels.config import BaseModelInfo

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    info = BaseModelInfo.from_hf(hf_config, name)
    blocks = find_blocks(model, info, range(info.num_hidden_layers))
    block: Any = blocks[0]
    ff, gate = (sum(p.numel() for p in part.parameters()) for part in (block, block.gate_proj))
    total = sum(p.numel() for p in model.parameters())
    return Count(name, family or type(hf_config).__name__, info.hidden_size, info.num_hidden_layers, total, ff, gate)


def cut(count: Count, method: str, layers: int, rank: int, density: float) -> float:
    """Share of the model's parameters that a generated token no longer needs where `layers` blocks are sparse, net of
    L [D, r] and R [r, D] of each.

    GRIFFIN drops (1 - density) of a block; CATS must read the gate projection first, and drops that share of the rest.
    """
    spared = (1 - density) * (count.ff if method == "griffin" else count.ff - count.gate)
    return layers * (spared - 2 * count.hidden_size * rank) / count.total


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
