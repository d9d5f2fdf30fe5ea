"""torch.library operators over the backends: usable in torch.compile and CUDA graphs, dispatched by device.

caprese::griffin_ff, cats_ff, griffin_observe, griffin_select, cats_observe and cats_threshold take a PackedFF's tensors
one by one; the functions of the same names here take it whole. `reference` defines what they compute. They are for
models of one's own: the plugin, which is one operator already, calls the backend itself.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .backend import Backend, choose
from .packed import PackedFF


@cache
def _backend(device: torch.device) -> Backend:
    return choose("auto", device)


def griffin_ff(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    return torch.ops.caprese.griffin_ff(x, *_parts(ff), keep, slots)


def cats_ff(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.caprese.cats_ff(x, *_parts(ff), tau, slots)


def griffin_observe(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    torch.ops.caprese.griffin_observe(z, offsets, slots, statistic)


def griffin_select(statistic: Tensor, k: int) -> Tensor:
    return torch.ops.caprese.griffin_select(statistic, k)


def cats_observe(gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor) -> None:
    torch.ops.caprese.cats_observe(gate, activation, offsets, slots, histogram)


def cats_threshold(histogram: Tensor, density: float) -> Tensor:
    return torch.ops.caprese.cats_threshold(histogram, density)


def _parts(ff: PackedFF) -> tuple[Tensor, Tensor, str, int, Tensor | None, Tensor | None]:
    """PackedFF(*_parts(ff)) is ff."""
    return ff.gate_up_plus, ff.down_plus, ff.activation, ff.rank, ff.gate_up_bias, ff.down_bias


@torch.library.custom_op("caprese::griffin_ff", mutates_args=())
def _griffin_ff(
    x: Tensor,
    gate_up_plus: Tensor,
    down_plus: Tensor,
    activation: str,
    rank: int,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    keep: Tensor,
    slots: Tensor,
) -> Tensor:
    ff = PackedFF(gate_up_plus, down_plus, activation, rank, gate_up_bias, down_bias)
    return _backend(x.device).griffin_ff(x, ff, keep, slots)


@_griffin_ff.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("caprese::cats_ff", mutates_args=())
def _cats_ff(
    x: Tensor,
    gate_up_plus: Tensor,
    down_plus: Tensor,
    activation: str,
    rank: int,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    tau: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    ff = PackedFF(gate_up_plus, down_plus, activation, rank, gate_up_bias, down_bias)
    return _backend(x.device).cats_ff(x, ff, tau, slots)


@_cats_ff.register_fake
def _(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.int64)


@torch.library.custom_op("caprese::griffin_observe", mutates_args=("statistic",))
def _griffin_observe(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    _backend(z.device).griffin_observe(z, offsets, slots, statistic)


@torch.library.custom_op("caprese::cats_observe", mutates_args=("histogram",))
def _cats_observe(gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor) -> None:
    _backend(gate.device).cats_observe(gate, activation, offsets, slots, histogram)


@torch.library.custom_op("caprese::griffin_select", mutates_args=())
def _griffin_select(statistic: Tensor, k: int) -> Tensor:
    return _backend(statistic.device).griffin_select(statistic, k)


@_griffin_select.register_fake
def _(statistic: Tensor, k: int) -> Tensor:
    return statistic.new_empty(statistic.shape, dtype=torch.bool)


@torch.library.custom_op("caprese::cats_threshold", mutates_args=())
def _cats_threshold(histogram: Tensor, density: float) -> Tensor:
    return _backend(histogram.device).cats_threshold(histogram, density)


@_cats_threshold.register_fake
def _(histogram: Tensor, density: float) -> Tensor:
    return histogram.new_empty(len(histogram), dtype=torch.float32)
