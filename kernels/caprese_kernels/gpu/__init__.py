"""The Triton backend, for NVIDIA GPUs: backend.Backend, whose functions `reference` defines.

Nothing synchronizes and no shape on the host depends on data, so all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

from torch import Tensor

from ..packed import PackedFF
from ..reference import core_ff, prompt_ff  # products of cuBLAS
from . import crossover, gather, masked
from .crossover import Path
from .gather import RowPlan, plan_rows
from .histogram import cats_observe, cats_threshold
from .masked import dense_ff
from .statistics import griffin_norms, griffin_observe, griffin_select

__all__ = [
    "NAME",
    "Path",
    "RowPlan",
    "cats_ff",
    "cats_observe",
    "cats_threshold",
    "core_ff",
    "dense_ff",
    "griffin_ff",
    "griffin_norms",
    "griffin_observe",
    "griffin_select",
    "plan_layers",
    "plan_rows",
    "prompt_ff",
]

NAME = "triton"


def griffin_ff(
    x: Tensor,
    ff: PackedFF,
    keep: Tensor,
    slots: Tensor,
    row_plan: RowPlan | None = None,
    out: Tensor | None = None,
    path: Path | None = None,
) -> Tensor:
    """As reference.griffin_ff.

    `row_plan` is `plan_rows(keep, slots)`, which a caller may make for all layers at once; None makes it here. `path`
    None is the faster one for this many tokens, as far as measured (`crossover`).
    """
    if not len(x):
        return x.new_empty(x.shape) if out is None else out
    x = x.contiguous()
    if (path or crossover.choose("griffin", len(x), x.device)) == "masked":
        return masked.griffin_ff(x, ff, keep, slots, out)
    return gather.griffin_ff(x, ff, keep, slots, row_plan or plan_rows(keep, slots), out)


def plan_layers(keep: Tensor, slots: Tensor) -> RowPlan | None:
    """`plan_rows` of all layers' tables keep [L, S, F], in one launch; None where so many tokens need no plan."""
    return plan_rows(keep, slots) if crossover.choose("griffin", len(slots), keep.device) == "gather" else None


def cats_ff(
    x: Tensor,
    ff: PackedFF,
    tau: Tensor,
    slots: Tensor,
    out: Tensor | None = None,
    kept: Tensor | None = None,
    path: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """As reference.cats_ff; `path` as in `griffin_ff`. Without `kept` one more launch sets it to zero."""
    kept = slots.new_zeros(len(x)) if kept is None else kept
    if not len(x):
        return x.new_empty(x.shape) if out is None else out, kept
    x = x.contiguous()
    if (path or crossover.choose("cats", len(x), x.device)) == "masked":
        return masked.cats_ff(x, ff, tau, slots, out, kept), kept
    return gather.cats_ff(x, ff, tau, slots, out, kept), kept
