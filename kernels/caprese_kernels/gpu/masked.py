# mypy: allow-untyped-defs
"""The path for many tokens: cuBLAS reads every row once; one kernel between its two products activates and masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..packed import PackedFF
from . import tuning
from .arithmetic import activate, product


def dense_ff(x: Tensor, ff: PackedFF, out: Tensor | None = None) -> Tensor:
    """As reference.dense_ff."""
    inputs = ff.gate_up_plus[: len(ff.gate_up_plus) - ff.rank]
    h = F.linear(x, inputs, ff.gate_up_bias)
    z = _combine(h, None, ff, "dense")
    return _down(z, ff.down_plus[: ff.num_neurons], ff.down_bias, out)


def griffin_ff(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, out: Tensor | None) -> Tensor:
    """As reference.griffin_ff, for T > 0 tokens."""
    z = _combine(*_up(x, ff), ff, "griffin", keep.contiguous().view(torch.uint8), slots)
    return _without_padding(_down(z, ff.down_plus, ff.down_bias, out), ff, slots)


def cats_ff(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor, out: Tensor | None, kept: Tensor) -> Tensor:
    """y of reference.cats_ff, for T > 0 tokens; counts are added to `kept`."""
    z = _combine(*_up(x, ff), ff, "cats", tau, slots, kept)
    return _without_padding(_down(z, ff.down_plus, ff.down_bias, out), ff, slots)


def _up(x: Tensor, ff: PackedFF) -> tuple[Tensor, Tensor]:
    """What goes into the activation, x W_g and x W_1 [T, 2F], without a gate x W_1 [T, F]; and x L [T, r]."""
    inputs = len(ff.gate_up_plus) - ff.rank
    if ff.gate_up_bias is None:
        h = F.linear(x, ff.gate_up_plus)
        return h[:, :inputs], h[:, inputs:]
    # L has no bias; adding it after one product for all would round twice.
    return F.linear(x, ff.gate_up_plus[:inputs], ff.gate_up_bias), F.linear(x, ff.gate_up_plus[inputs:])


def _down(z: Tensor, weights: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    return torch.mm(z, weights, out=out) if bias is None else torch.addmm(bias, z, weights, out=out)


def _without_padding(y: Tensor, ff: PackedFF, slots: Tensor) -> Tensor:
    """z of padding is zero, hence y is but for the bias."""
    return y if ff.down_bias is None else y.masked_fill_(slots[:, None] < 0, 0)


def _combine(
    h: Tensor,
    low_rank: Tensor | None,
    ff: PackedFF,
    method: str,
    table: Tensor | None = None,
    slots: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """z [T, F], or z+ [T, F + r] with x L behind; `table` is keep [S, F] uint8 or tau [S], by the method."""
    rank = 0 if low_rank is None else low_rank.shape[1]
    width = ff.num_neurons + rank
    z = h.new_empty(len(h), width)
    if len(h):
        _activate_and_mask[(len(h), triton.cdiv(width, tuning.MASK_BLOCK))](
            *(h, low_rank, table, slots, z, kept, ff.scale),
            *(h.stride(0), 0 if low_rank is None else low_rank.stride(0), ff.num_neurons, rank),
            METHOD=method,
            TOTAL=kept is not None and not kept.dim(),
            SCALED=ff.scale is not None,
            ACT=ff.activation,
            GATED=ff.gate is not None,
            BLOCK=tuning.MASK_BLOCK,
            num_warps=4,
        )
    return z


@triton.jit
def _activate_and_mask(
    h,
    low_rank,
    table,
    slots,
    z,
    kept_count,
    scale,
    h_stride,
    low_rank_stride,
    F,
    R,
    METHOD: tl.constexpr,
    TOTAL: tl.constexpr,
    SCALED: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK neurons of one token."""
    t = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    neuron = j < F
    h += t * h_stride
    g = activate(tl.load(h + j, mask=neuron, other=0.0).to(tl.float32), ACT).to(h.dtype.element_ty)
    value = g
    if GATED:
        value = product(g, tl.load(h + F + j, mask=neuron, other=0.0))
    if METHOD != "dense":
        slot = tl.load(slots + t)
        kept = j < tl.where(slot >= 0, F, 0)
        if METHOD == "griffin":
            kept = tl.load(table + slot * F + j, mask=kept, other=0) != 0
        else:
            magnitude = tl.abs(g.to(tl.float32))
            if SCALED:
                magnitude *= tl.load(scale + j, mask=neuron, other=0.0)
            kept &= magnitude >= tl.load(table + slot, mask=slot >= 0, other=float("inf"))
            # Integers: their sum has one value in any order.
            tl.atomic_add(kept_count + (0 if TOTAL else t), tl.sum(kept.to(tl.int64)), sem="relaxed")
        value = tl.where(kept, value, 0.0)
        if R > 0:
            mask = (j >= F) & (j < tl.where(slot >= 0, F + R, 0))
            value = tl.where(neuron, value, tl.load(low_rank + t * low_rank_stride + j - F, mask=mask, other=0.0))
    tl.store(z + t * (F + R) + j, value, mask=j < F + R)
