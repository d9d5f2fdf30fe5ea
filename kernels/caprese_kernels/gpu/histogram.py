# mypy: allow-untyped-defs
"""CATS's histogram, counted in shared memory by CUDA C++ (`histogram.cu`): Triton's shared memory has no atomics.

For 2,048 prompt tokens of 13,824 neurons, one atomic in L2 for each of 28 million magnitudes takes at least 13% of the
FF block's time (estimated). Here each multiprocessor counts its part, and adds some thousands of bins to the histogram.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..packed import ACTIVATION_FUNCTIONS
from ..reference import NUM_MAGNITUDES
from . import nvrtc, tuning
from .arithmetic import activate

cats_threshold = reference.cats_threshold  # torch alone, without synchronization

SOURCE = Path(__file__).with_suffix(".cu")
NAME = "count_magnitudes"
VALUES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {name: i for i, name in enumerate(ACTIVATION_FUNCTIONS)}  # in the order of histogram.cu's macro
COUNTER_BYTES = 4  # a block counts fewer than 2^32 magnitudes in a call
LEAST_VALUES = 8192  # of a block: fewer do not pay for clearing and reading its bins


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. wide: all rows are aligned for loads of 16 bytes; bins: counters of a block."""

    dtype: torch.dtype
    activation: str
    wide: bool
    scaled: bool
    bins: int

    @classmethod
    def of(cls, gate: Tensor, activation: str, scale: Tensor | None, bins: int) -> Variant:
        vector = 16 // gate.element_size()
        wide = all(n % vector == 0 for n in (gate.shape[1], gate.stride(0))) and gate.data_ptr() % 16 == 0
        return cls(gate.dtype, activation, wide, scale is not None, bins)

    @property
    def macros(self) -> dict[str, int]:
        return {
            "VALUE": VALUES[self.dtype],
            "ACTIVATION": ACTIVATIONS[self.activation],
            "WIDE": int(self.wide),
            "SCALED": int(self.scaled),
            "BINS": self.bins,
        }

    @property
    def shared_bytes(self) -> int:
        return COUNTER_BYTES * self.bins


def kernel(variant: Variant, device: torch.device) -> nvrtc.Launch | None:
    """`variant` compiled for `device`; None, with a warning once, where that is not possible."""
    launch = _compiled(variant, device)
    if isinstance(launch, nvrtc.Unavailable):
        _warn_once(str(launch).split("\n")[0])
        return None
    return launch


@functools.cache
def _compiled(variant: Variant, device: torch.device) -> nvrtc.Launch | nvrtc.Unavailable:
    major, minor = torch.cuda.get_device_capability(device)
    try:
        code = nvrtc.compile_source(SOURCE.read_text(), variant.macros, f"sm_{major}{minor}")
        return nvrtc.load(code, NAME, variant.shared_bytes, device)
    except nvrtc.Unavailable as error:
        return error


@functools.cache
def _warn_once(reason: str) -> None:
    logging.getLogger("vllm.caprese").warning(
        "Caprese: CATS counts prompts' magnitudes in global memory, not in shared memory, which is slower: %s", reason
    )


@functools.cache
def bins_that_fit(device: torch.device) -> int:
    """Counters of a block: those of all magnitudes if a multiprocessor's shared memory holds them, else half of them.

    128 KiB fit an A100 (163 KiB), an H100 and a B200 (227 KiB); 64 KiB any other GPU that has bfloat16 (99 KiB).
    """
    properties: Any = torch.cuda.get_device_properties(device)
    fit = properties.shared_memory_per_block_optin // COUNTER_BYTES
    return NUM_MAGNITUDES if fit >= NUM_MAGNITUDES else NUM_MAGNITUDES // 2


def count(
    launch: nvrtc.Launch,
    variant: Variant,
    gate: Tensor,
    offsets: Tensor,
    slots: Tensor,
    histogram: Tensor,
    scale: Tensor | None = None,
    threads: int = 1024,
) -> None:
    """reference.cats_observe by `variant`, of at least one token and one segment."""
    tokens, neurons = gate.shape
    groups = NUM_MAGNITUDES // variant.bins
    blocks = min(tuning.num_sms(gate.device), -(-tokens * neurons // LEAST_VALUES))
    launch(
        (max(1, blocks // groups), groups),
        *(threads, variant.shared_bytes, gate, offsets, slots, histogram, scale),
        *(nvrtc.Long(gate.stride(0)), nvrtc.Long(histogram.stride(0)), len(slots), tokens, neurons),
    )


def cats_observe(
    gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor, scale: Tensor | None = None
) -> None:
    """As reference.cats_observe; gate's rows may be strided.

    In shared memory where CUDA C++ can be compiled. Elsewhere by one integer atomic in L2 a magnitude: Triton's
    histogram in registers is for a few hundred bins.
    """
    tokens, neurons = gate.shape
    segments = len(slots)
    if not tokens or not segments:
        return
    if gate.is_cuda:
        variant = Variant.of(gate, activation, scale, bins_that_fit(gate.device))
        launch = kernel(variant, gate.device)
        if launch is not None:
            count(launch, variant, gate, offsets, slots, histogram, scale)
            return
    _count[(tokens, triton.cdiv(neurons, tuning.COUNT_BLOCK))](
        *(gate, offsets, slots, histogram, scale, gate.stride(0), histogram.stride(0), segments, neurons),
        ACT=activation,
        SCALED=scale is not None,
        BORDERS=tuning.segments_tile(segments + 1),
        BLOCK=tuning.COUNT_BLOCK,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["segments"])
def _count(
    gate,
    offsets,
    slots,
    histogram,
    scale,
    gate_stride,
    histogram_stride,
    segments,
    F,
    ACT: tl.constexpr,
    SCALED: tl.constexpr,
    BORDERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts BLOCK neurons of one token."""
    t = tl.program_id(0).to(tl.int64)
    border = tl.arange(0, BORDERS)
    begins = tl.load(offsets + border, mask=border <= segments, other=0)
    mine = tl.sum(((begins <= t) & (border <= segments)).to(tl.int32)) - 1
    if (mine < 0) | (mine >= segments):
        return
    slot = tl.load(slots + mine)
    if slot < 0:
        return
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(gate + t * gate_stride + j, mask=j < F, other=0.0)
    g = activate(u.to(tl.float32), ACT).to(u.dtype)
    if SCALED:
        g = tl.abs(g.to(tl.float32)) * tl.load(scale + j, mask=j < F, other=0.0)
    g = g.to(tl.bfloat16)
    magnitude = (g.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32)
    # Integers: their sum has one value in any order.
    one = tl.full([BLOCK], 1, tl.int64)
    tl.atomic_add(histogram + slot * histogram_stride + magnitude, one, mask=j < F, sem="relaxed")
