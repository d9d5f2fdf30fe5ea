"""Which path a batch takes: gather only the rows it needs, or read every row with cuBLAS and mask."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

Path = Literal["gather", "masked"]

# The most tokens for which gathering is at least as fast, by (device name, method); written by measurement alone.
MEASURED: dict[tuple[str, str], int] = {}
# For devices without an entry; estimated, not measured. At density 0.5, 2, 3 and 4 independent selections together need
# 75, 88 and 94% of the rows, and gathering is faster by that only if it reaches as much of the bandwidth as cuBLAS:
# beyond 3 (CATS, which also reads the whole gate: beyond 2) too little is left to bet on. Samples of one prompt, which
# share a selection, count as independent: how many share one is not known when a CUDA graph is captured.
DEFAULT = {"griffin": 3, "cats": 2}


def choose(method: str, tokens: int, device: torch.device) -> Path:
    """The faster path for a batch of so many tokens, as far as measured."""
    return "gather" if tokens <= most_gathered(method, device) else "masked"


@cache
def most_gathered(method: str, device: torch.device) -> int:
    """The most tokens for which gathering is at least as fast."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return MEASURED.get((name, method), DEFAULT[method])
