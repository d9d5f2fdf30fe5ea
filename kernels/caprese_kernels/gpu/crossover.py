"""Which path a batch takes: gather only the rows it needs, or read every row with cuBLAS and mask."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

Path = Literal["gather", "masked"]

# The most tokens for which gathering is at least as fast, by (device name, method); written by measurement alone.
MEASURED: dict[tuple[str, str], int] = {}
# For devices without an entry; estimated, not measured. At density 0.5, 2, 4 and 8 independent tokens of CATS together
# need 75, 94 and 99.6% of the rows: beyond 2 little is left to save. GRIFFIN's prompts overlap more, and
# samples of one prompt share a selection; 16 tokens fill one tile of the tensor cores, and 3 tokens cost as much.
DEFAULT = {"griffin": 16, "cats": 2}


def choose(method: str, tokens: int, device: torch.device) -> Path:
    """The faster path for a batch of so many tokens, as far as measured."""
    return "gather" if tokens <= most_gathered(method, device) else "masked"


@cache
def most_gathered(method: str, device: torch.device) -> int:
    """The most tokens for which gathering is at least as fast."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return MEASURED.get((name, method), DEFAULT[method])
