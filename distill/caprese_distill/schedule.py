"""The learning rate's schedule, the same for both stages (paper, appendix E, table 6)."""

from __future__ import annotations

import math


def linear_schedule(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor at `step` (from 0): up to 1 over the share `warmup` of the `total`, then down to 0.

    Unlike in transformers' schedule, the factor of the first step is above 0: with one step, nothing would be learnt.
    """
    first = max(1, math.ceil(warmup * total))
    return min((step + 1) / first, (total - step) / max(1, total - first))
