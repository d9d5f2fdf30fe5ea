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
from torch import Tensor

from ..packed import ACTIVATION_FUNCTIONS
from ..reference import NUM_MAGNITUDES
from . import nvrtc, tuning

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
