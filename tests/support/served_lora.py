"""Blocks and batches for the kernels of served LoRA: odd shapes, every dtype, shared and own selections, padding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from caprese_kernels.packed import PackedFF


@dataclass(frozen=True)
class Problem:
    """Sizes of one block and batch. `table` is the kind of selection."""

    depth: int
    neurons: int
    tokens: int
    dtype: torch.dtype
    table: str = "own"  # or shared, padded, all padding, none kept

    def __str__(self) -> str:
        return f"D{self.depth}-F{self.neurons}-T{self.tokens}-{str(self.dtype)[6:]}-{self.table}"


CASES = [
    Problem(40, 75, 1, torch.float32),
    Problem(33, 64, 1, torch.bfloat16),
    Problem(64, 33, 1, torch.float16),
    Problem(17, 130, 5, torch.float32, "padded"),
    Problem(96, 100, 17, torch.bfloat16, "shared"),
    Problem(40, 77, 70, torch.float16, "padded"),
    Problem(40, 77, 3, torch.float32, "all padding"),
    Problem(40, 77, 2, torch.bfloat16, "none kept"),
]


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem."""

    x: Tensor
    low: Tensor
    ff: PackedFF
    keep: Tensor
    slots: Tensor


def problem(case: Problem, device: torch.device) -> Inputs:
    """Random tensors of these sizes."""
    generator = torch.Generator().manual_seed(case.depth)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, case.dtype)

    depth, neurons, tokens = case.depth, case.neurons, case.tokens
    gate, up = (random(neurons, depth, scale=depth**-0.5) for _ in range(2))
    ff = PackedFF.pack(gate, up, random(depth, neurons, scale=neurons**-0.5), "silu")
    keep = torch.rand(tokens, neurons, generator=generator) < (0.0 if case.table == "none kept" else 0.5)
    slots = torch.randperm(tokens, generator=generator)
    if case.table == "shared":
        slots = torch.full((tokens,), tokens - 1)
    elif case.table == "padded":
        slots[1::3] = -1
    elif case.table == "all padding":
        slots = torch.full((tokens,), -1)
    return Inputs(random(tokens, depth), random(2, tokens, neurons), ff, keep.to(device), slots.to(device))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the order of sums: a handful of roundings of values below 8, each at most half of 8 eps."""
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
