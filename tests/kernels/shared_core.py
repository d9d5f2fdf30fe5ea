"""What every backend must do with a core of neurons that all requests share: a check like those of `conformance`."""

from __future__ import annotations

import math

import torch

from caprese_kernels.backend import Backend
from tests.kernels.cases import Case
from tests.kernels.problem import Approx, assert_like, assert_output, assert_same_bits, assert_within, laid_out, problem


def check_core(backend: Backend, device: torch.device, case: Case) -> None:
    """Core, L and R by `core_ff`, the tail by `griffin_ff` of the rest: their sum is y with the core always kept.

    Bounds: each part is rounded to the model's dtype, then their sum.
    """
    p = problem(case, device)
    for count in sorted({0, 1, case.neurons // 3, case.neurons}):
        first = case.neurons - count
        core = torch.arange(case.neurons) >= first
        tail = p.keep & ~core.to(device)
        shared = backend.core_ff(p.x, p.ff.core(count), p.slots)
        own = backend.griffin_ff(p.x, p.ff.without_low_rank(), tail, p.slots)

        wanted_shared = p.output(core.expand_as(p.keep_rows)).where(p.valid)
        assert_output(shared, wanted_shared, p, f"core of {count} neurons")
        down_bias, p.down_bias = p.down_bias, None
        wanted_own = p.output(p.keep_rows & ~core, low_rank=False).where(p.valid)
        p.down_bias = down_bias
        total = Approx(
            wanted_shared.value + wanted_own.value,
            wanted_shared.bound + wanted_own.bound,
            torch.hypot(wanted_shared.scale, wanted_own.scale),
        )
        wanted = p.arithmetic.rounded(total)
        assert_like(own, (case.tokens, case.depth), case.dtype, device)
        assert_within(shared + own, wanted.value, wanted.error, f"y with a core of {count} neurons")


def check_core_padding(backend: Backend, device: torch.device, case: Case) -> None:
    """Padding's y is zero, whatever its x; it does not touch the others'."""
    p = problem(case, device)
    padding, core = p.slots < 0, p.ff.core(case.neurons // 2)
    spoilt, clean = (laid_out(torch.where(padding[:, None], value, p.x), case.layout) for value in (math.nan, 0.0))
    y = backend.core_ff(spoilt, core, p.slots)
    assert not y[padding].any()
    assert_same_bits(y, backend.core_ff(clean, core, p.slots), "core y beside padding")


CHECKS = (check_core, check_core_padding)
