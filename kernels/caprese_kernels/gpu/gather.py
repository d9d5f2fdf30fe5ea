"""The path for few tokens: it reads only the rows that some token of the batch needs, each once.

Launches: GRIFFIN `plan_rows` (a list of rows), `griffin_up` (z of those rows), `down` (y); CATS `cats_up`, `down`.
The r rows of L^T and R are active for every token; they come after the neurons and are in no list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..packed import PackedFF
from . import gather_kernels as kernels
from . import tuning


@dataclass(frozen=True)
class RowPlan:
    """The neurons that some token of a batch keeps, ascending: the first count of rows; for one layer or L of them.

    rows [F] or [L, F] int32; count [] or [L] int32, -1 if every token is padding. `plan[i]` is layer i's.
    """

    rows: Tensor
    count: Tensor

    def __getitem__(self, layer: int) -> RowPlan:
        return RowPlan(self.rows[layer], self.count[layer])


def plan_rows(keep: Tensor, slots: Tensor) -> RowPlan:
    """Unite the selections keep[slots]: keep [S, F], or [L, S, F] for L layers in one launch, bool; slots [T] int64."""
    tables = keep.contiguous().view(torch.uint8).view(-1, *keep.shape[-2:])
    layers, num_slots, neurons = tables.shape
    rows = torch.empty((*keep.shape[:-2], neurons), dtype=torch.int32, device=keep.device)
    count = torch.empty(keep.shape[:-2], dtype=torch.int32, device=keep.device)
    tokens = min(triton.next_power_of_2(max(len(slots), 1)), tuning.MAX_TOKENS)
    block = min(tuning.PLAN_CELLS // tokens, tuning.PLAN_BLOCK, triton.next_power_of_2(neurons))
    kernels.plan_rows[(layers, triton.cdiv(neurons, block))](
        tables, slots, rows, count, len(slots), num_slots, neurons, TOKENS=tokens, BLOCK=block, num_warps=16
    )
    return RowPlan(rows, count)


def griffin_ff(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, row_plan: RowPlan, out: Tensor | None) -> Tensor:
    """As reference.griffin_ff, for T > 0 tokens."""
    call = Call(x, ff, slots)
    grid = (triton.cdiv(call.width, call.up.rows), call.token_tiles)
    kernels.griffin_up[grid](
        *(
            x,
            ff.gate_up_plus,
            ff.gate_up_bias,
            keep.contiguous().view(torch.uint8),
            slots,
            row_plan.rows,
            row_plan.count,
        ),
        *(call.z, call.arrived, call.down_programs, *call.sizes),
        **call.up_options,
    )
    return call.down(out, row_plan)


def cats_ff(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor, out: Tensor | None, kept: Tensor) -> Tensor:
    """y of reference.cats_ff, for T > 0 tokens; counts are added to `kept`."""
    call = Call(x, ff, slots)
    tiles = triton.cdiv(ff.num_neurons, call.up.rows) + triton.cdiv(ff.rank, call.up.rows)
    kernels.cats_up[(tiles, call.token_tiles)](
        *(x, ff.gate_up_plus, ff.gate_up_bias, tau, slots, call.z, kept, ff.scale),
        *(call.arrived, call.down_programs, *call.sizes),
        SCALED=ff.scale is not None,
        TOTAL=not kept.dim(),
        **call.up_options,
    )
    return call.down(out)


class Call:
    """What the kernels of one call share: sizes, tiles, and z [T, F + r]."""

    def __init__(self, x: Tensor, ff: PackedFF, slots: Tensor):
        tokens, depth = x.shape
        self.x, self.ff, self.slots, self.width = x, ff, slots, ff.num_neurons + ff.rank
        self.sizes = (tokens, depth, ff.num_neurons, ff.rank)
        self.up, self.down_tile = tuning.up_tile(tokens), tuning.down_tile(tokens)
        self.tile = tuning.tokens_tile(tokens)
        self.token_tiles = triton.cdiv(tokens, self.tile)
        # Tile sizes are for 2-byte elements; wider elements get fewer columns.
        self.shrink = x.element_size() // 2
        self.down_programs = triton.cdiv(depth, self.down_tile.columns // self.shrink) * self.token_tiles
        self.z = x.new_empty(tokens, self.width)
        # How many parts of each sum `down` has finished; the kernel before it, of gate and up, sets it to zero.
        self.arrived = torch.empty(self.down_programs, dtype=torch.int32, device=x.device)
        dependent = tuning.dependent_launch(x.device)
        self.dependent = {"DEPENDENT": dependent} | ({"launch_pdl": True} if dependent else {})
        self.up_options = {
            "ARRIVED": triton.next_power_of_2(self.down_programs),
            **self.dependent,
            "ACT": ff.activation,
            "GATED": ff.gate is not None,
            "BIASED": ff.gate_up_bias is not None,
            **self._options(self.up),
        }

    def _options(self, tile: tuning.Tile) -> dict[str, int | bool]:
        return {
            "TOKENS": self.tile,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns // self.shrink,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }

    def down(self, out: Tensor | None, row_plan: RowPlan | None = None) -> Tensor:
        """y [T, D], in `out` if there is one."""
        tokens, depth = self.x.shape
        splits = tuning.splits(self.down_programs, self.width, self.down_tile, self.x.device)
        partial = torch.empty(splits, tokens, depth, dtype=torch.float32, device=self.x.device)
        y = torch.empty_like(self.x) if out is None else out
        assert y.is_contiguous(), "out is contiguous"
        count, listed_z = None, None
        if row_plan is None:  # each program lists the rows that it needs
            rows = torch.empty(self.down_programs, self.width, dtype=torch.int32, device=self.x.device)
            listed_z = self.x.new_empty(self.down_programs, min(tokens, self.tile), self.width)
        else:
            rows, count = row_plan.rows, row_plan.count
        kernels.down[(self.down_programs // self.token_tiles, splits, self.token_tiles)](
            *(
                self.z,
                self.ff.down_plus,
                self.ff.down_bias,
                rows,
                count,
                listed_z,
                self.slots,
                partial,
                self.arrived,
                y,
            ),
            *self.sizes,
            LISTED=row_plan is not None,
            BIASED=self.ff.down_bias is not None,
            BLOCK=tuning.LIST_BLOCK,
            **self.dependent,
            **self._options(self.down_tile),
            maxnreg=tuning.DOWN_REGISTERS,
        )
        return y
