"""Triton's interpreter with a bfloat16 like the hardware's.

numpy has no bfloat16. The interpreter keeps its bits as uint16, which `tl.dot` then multiplies as integers, and it cuts
float32's low bits off instead of rounding to nearest even.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16: to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, bits).astype(np.uint16)


def mend() -> None:
    """Replace InterpreterBuilder's casts and products where bfloat16 takes part. Needed as of triton 3.9."""
    cast_impl, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return TensorHandle(widened(src.data), tl.float32)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(narrowed(src.data), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(widened(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h for h in (a, b))
        return create_dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


@contextmanager
def reads(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """How often each element of some contiguous tensors is loaded, int64."""
    counts = [torch.zeros(t.numel(), dtype=torch.int64) for t in tensors]
    load = InterpreterBuilder.create_masked_load

    def spy(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        addresses = np.broadcast_to(ptrs.data, np.shape(mask.data))[np.asarray(mask.data)].astype(np.int64)
        for tensor, count in zip(tensors, counts, strict=True):
            elements = (addresses - tensor.data_ptr()) // tensor.element_size()
            inside = elements[(elements >= 0) & (elements < tensor.numel())]
            count.index_add_(0, torch.from_numpy(inside), torch.ones(len(inside), dtype=torch.int64))
        return load(self, ptrs, mask, *rest)

    InterpreterBuilder.create_masked_load = spy
    try:
        yield [count.view(t.shape) for t, count in zip(tensors, counts, strict=True)]
    finally:
        InterpreterBuilder.create_masked_load = load
