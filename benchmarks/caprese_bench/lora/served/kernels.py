"""The two sparse halves of eq. 11 apart, with LoRA's own products between them: plain torch, C++ and Triton.

    z = act(x W~_g + low_g) * (x W~_1 + low_1)      `up`,   low_g = x A_g B_g, low_1 = x A_1 B_1
    y = z W~_2                                      `down`, to which LoRA adds z A_2 B_2

`up` returns z, and what `down` takes of it: z itself, or in another form.

W~ are the weights with the columns of W_g, W_1 and rows of W_2 of neurons that a token does not keep set to zero; z has
all F neurons, because LoRA's products do. Only kept rows are read, by what the product's own kernels read them with.
Shapes: x [T, D], low [2, T, F], z [T, F], keep [S, F] bool, slots [T] int64, -1 for padding, where z and y are zero.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caprese_kernels import cpu
from caprese_kernels.backend import Backend, RowPlan
from caprese_kernels.cpu.build import compiled
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF


def up(
    backend: Backend,
    x: Tensor,
    low: Tensor,
    ff: PackedFF,
    keep: Tensor,
    slots: Tensor,
    row_plan: RowPlan | None = None,
) -> tuple[Tensor, Any]:
    """z and what `down` takes, by the implementation for `backend`; `row_plan` is what its griffin_ff takes."""
    return _implementation(backend).up(x, low, ff, keep, slots, row_plan)


def down(backend: Backend, given: Any, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    """y without LoRA's part, of what `up` gave."""
    return _implementation(backend).down(given, ff, keep, slots)


def check(ff: PackedFF) -> None:
    """CapreseError for blocks that eq. 11 does not speak of."""
    if ff.gate is None or ff.gate_up_bias is not None or ff.down_bias is not None or ff.rank:
        found = "no gate" if ff.gate is None else "a low-rank layer" if ff.rank else "biases"
        raise CapreseError(
            "LoRA", expected="FF blocks with a gate, no biases and no L, R", found=found, fix="serve another model"
        )


def equal_rank(depth: int, neurons: int, rank: int) -> int:
    """The r' whose 3 r' (D + F) parameters come nearest to the 2 D r of L and R; at least 1."""
    return max(1, round(2 * depth * rank / (3 * (depth + neurons))))


class Reference:
    """Every weight is read."""

    @staticmethod
    def up(
        x: Tensor, low: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, row_plan: object = None
    ) -> tuple[Tensor, Tensor]:
        kept = keep[slots]
        assert ff.gate is not None
        gate = ff.act(torch.where(kept, F.linear(x, ff.gate), 0) + low[0])
        z = gate * (torch.where(kept, F.linear(x, ff.up_plus), 0) + low[1])
        z = torch.where(slots[:, None] >= 0, z, 0)
        return z, z

    @staticmethod
    def down(z: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
        return torch.where(keep[slots] & (slots[:, None] >= 0), z, 0) @ ff.down_plus


class Cpu:
    """C++, up to cpu.rows.h's TOKENS tokens at once; more go in parts."""

    TOKENS = 64

    @classmethod
    def up(
        cls, x: Tensor, low: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, row_plan: object = None
    ) -> tuple[Tensor, Tensor]:
        z = x.new_empty(len(x), ff.num_neurons)
        for first in range(0, len(x), cls.TOKENS):
            part = slice(first, first + cls.TOKENS)
            rows, some = x[part], low[:, part].contiguous()
            described = cpu.described(rows, ff, None, slots[part], keep=keep)
            _library().lora_up(*described, _pointer(some), _pointer(z[part]), torch.get_num_threads())
        return z, z

    @classmethod
    def down(cls, z: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
        y = z.new_empty(len(z), ff.hidden_size)
        for first in range(0, len(z), cls.TOKENS):
            part = slice(first, first + cls.TOKENS)
            described = cpu.described(y[part], ff, y[part], slots[part], keep=keep)
            _library().lora_down(*described, _pointer(z[part]), torch.get_num_threads())
        return y


@cache
def _library() -> Any:
    return compiled("lora", [Path(__file__).with_name("lora.cpp")])


def _pointer(tensor: Tensor) -> Any:
    import ctypes

    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _implementation(backend: Backend) -> Any:
    if backend.NAME == "cpu":
        return Cpu
    if backend.NAME == "triton":
        return _triton()
    return Reference


def _triton() -> ModuleType:
    from . import triton_kernels

    return triton_kernels
