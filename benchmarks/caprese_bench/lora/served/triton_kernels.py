# mypy: allow-untyped-defs
"""`kernels.up` and `down` on a GPU: one launch each, of the same tiles as the product's `griffin_up` and `down`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from caprese_kernels.gpu import gather
from caprese_kernels.gpu.arithmetic import activate, product, project
from caprese_kernels.gpu.gather_kernels import _union
from caprese_kernels.packed import PackedFF

CELLS = 2048  # tokens times neurons that a program without weights looks at


def up(
    x: Tensor, low: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, row_plan: gather.RowPlan | None = None
) -> tuple[Tensor, Any]:
    """z, and for `down` its kept part in the order of the plan."""
    row_plan = row_plan or gather.plan_rows(keep, slots)
    call = gather.Call(x.contiguous(), ff, slots)
    z, neurons = x.new_empty(len(x), ff.num_neurons), ff.num_neurons
    block = max(CELLS // call.tile, 16)
    tiles = triton.cdiv(neurons, call.up.rows)
    options = {
        name: value for name, value in call.up_options.items() if name not in ("GATED", "BIASED", *call.dependent)
    }
    lora_up[(tiles + triton.cdiv(neurons, block), call.token_tiles)](
        *(
            call.x,
            ff.gate_up_plus,
            low.contiguous(),
            keep.contiguous().view(torch.uint8),
            slots,
            row_plan.rows,
            row_plan.count,
        ),
        *(z, call.z, call.arrived, call.down_programs, *call.sizes[:3]),
        BLOCK=block,
        **options,
    )
    return z, (call, row_plan)


def down(listed: Any, ff: PackedFF, keep: Tensor, slots: Tensor, **_: Any) -> Tensor:
    """y of what `up` left."""
    call, row_plan = listed
    return call.down(None, row_plan)


@triton.jit
def lora_up(
    x,
    weights,
    low,
    keep,
    slots,
    rows,
    count,
    z,
    listed_z,
    arrived,
    down_programs,
    T,
    D,
    F,
    ARRIVED: tl.constexpr,
    ACT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z [T, F] and listed_z [T, F], whose first columns are the plan's neurons, zero where a token does not keep one.

    The first programs take the neurons of the plan, the others those that no token keeps, whose z is LoRA's alone.
    """
    tile, list_tiles = tl.program_id(0), tl.cdiv(F, ROWS)
    if tile + tl.program_id(1) == 0:
        program = tl.arange(0, ARRIVED)
        tl.store(arrived + program, tl.zeros([ARRIVED], tl.int32), mask=program < down_programs)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    here = (tokens < T)[:, None]
    slot = tl.load(slots + tokens, mask=tokens < T, other=-1)[:, None]
    if tile < list_tiles:
        listed = tl.load(count)
        first = tile * ROWS
        if first >= listed:
            return
        i = first + tl.arange(0, ROWS)
        live = i < listed
        j = tl.load(rows + i, mask=live, other=0)
        gate = project(x, weights, tokens, j, live, T, D, TOKENS, ROWS, COLUMNS, STAGES)
        up = project(x, weights, tokens, j + F, live, T, D, TOKENS, ROWS, COLUMNS, STAGES)
        kept = tl.load(keep + slot * F + j[None, :], mask=(slot >= 0) & live[None, :], other=0) != 0
        value = _with_low(tl.where(kept, gate, 0.0), tl.where(kept, up, 0.0), low, tokens, j, live, T, F, ACT)
        value = tl.where(slot >= 0, value, 0.0)
        tl.store(z + tokens[:, None] * F + j[None, :], value, mask=here & live[None, :])
        tl.store(listed_z + tokens[:, None] * F + i[None, :], tl.where(kept, value, 0.0), mask=here & live[None, :])
    else:
        j = (tile - list_tiles) * BLOCK + tl.arange(0, BLOCK)
        none = tl.zeros([TOKENS, BLOCK], tl.float32)
        value = _with_low(none, none, low, tokens, j, j < F, T, F, ACT)
        lone = (_union(keep, slots, j, T, F, TOKENS, BLOCK) == 0) & (j < F)
        tl.store(z + tokens[:, None] * F + j[None, :], tl.where(slot >= 0, value, 0.0), mask=here & lone[None, :])


@triton.jit
def _with_low(gate, up, low, tokens, j, live, T, F, ACT: tl.constexpr):
    """act(gate + low[0]) * (up + low[1]), rounded where torch rounds."""
    DTYPE: tl.constexpr = low.dtype.element_ty
    cell, mask = tokens[:, None] * F + j[None, :], (tokens < T)[:, None] & live[None, :]
    low_gate = tl.load(low + cell, mask=mask, other=0.0).to(tl.float32)
    low_up = tl.load(low + T * F + cell, mask=mask, other=0.0).to(tl.float32)
    g = activate((gate.to(DTYPE).to(tl.float32) + low_gate).to(DTYPE).to(tl.float32), ACT).to(DTYPE)
    return product(g, (up.to(DTYPE).to(tl.float32) + low_up).to(DTYPE))
