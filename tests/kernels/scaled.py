"""What every backend must do with neurons' scales (weighted score, scaled CATS): checks like those of `conformance`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from tests.kernels.cases import Case
from tests.kernels.observation import Segments, cats_rows, griffin_rows
from tests.kernels.problem import DEVIATIONS, FLOAT32, assert_same_bits, laid_out, problem


def scale_of(case: Case) -> Tensor:
    """Powers of two from 1/4 to 4, one a neuron: products with them are exact."""
    generator = torch.Generator().manual_seed(case.seed)
    return 2.0 ** torch.randint(-2, 3, (case.neurons,), generator=generator).float()


def check_scaled_statistic(backend: Backend, device: torch.device, case: Case) -> None:
    """s^2 and norms with a scale are those of z_ij scale_j, given in float32.

    Bounds: the sums are the same, but other memory layouts may add them in another order (as `check_griffin_observe`).
    """
    s = Segments(case, device)
    scale = scale_of(case) + 0.125  # no powers of two: the product is rounded, once
    values = griffin_rows(s).float().clamp(-1e37, 1e37).to(case.dtype)
    z, scaled = s.rows(values), s.rows(values.float() * scale)
    steps = sum(min(n, DEVIATIONS * math.sqrt(n)) for n in (case.neurons, max(case.tokens, 3))) + 12
    bounds = {"rtol": steps * FLOAT32, "atol": s.count * torch.finfo(torch.float32).tiny}
    norms = backend.griffin_norms(scaled)
    torch.testing.assert_close(backend.griffin_norms(z, scale.to(device)), norms, **bounds, equal_nan=True)
    for given in (None, norms):
        found, wanted = (torch.zeros(s.table, case.neurons, device=device) for _ in range(2))
        backend.griffin_observe(z, s.offsets, s.slots, found, given, scale.to(device))
        backend.griffin_observe(scaled, s.offsets, s.slots, wanted, given)
        torch.testing.assert_close(found, wanted, **bounds)


def check_scaled_histogram(backend: Backend, device: torch.device, case: Case) -> None:
    """relu is exact, and so are these products: the reference's counts."""
    case = replace(case, activation="relu")
    s, scale = Segments(case, device), scale_of(case)
    values = cats_rows(s).float().clamp(-1e4, 1e4).to(case.dtype)
    found, wanted = (torch.zeros(s.table, reference.NUM_MAGNITUDES, dtype=torch.int64) for _ in range(2))
    found = found.to(device)
    backend.cats_observe(s.rows(values), "relu", s.offsets, s.slots, found, scale.to(device))
    reference.cats_observe(values, "relu", s.offsets.cpu(), s.slots.cpu(), wanted, scale)
    assert_same_bits(found.cpu(), wanted, "histogram with a scale")


def check_scaled_cats(backend: Backend, device: torch.device, case: Case) -> None:
    """Integers, whose sums are exact: y and counts of the reference, for thresholds that cut between the magnitudes."""
    if not case.integers:
        return
    p = problem(case, device)
    ff = replace(p.ff, scale=scale_of(case).to(device))
    plain = replace(ff, **{name: _on_cpu(getattr(ff, name)) for name in _TENSORS})
    slots = p.slots.cpu()
    tau = torch.arange(int(slots.max()) + 1 if len(slots) else 0).float() % 5 / 2 + 0.25
    tau = torch.cat([tau, torch.zeros(1)])  # a table has a row
    y, kept = backend.cats_ff(p.x, ff, tau.to(device), p.slots)
    wanted_y, wanted_kept = reference.cats_ff(laid_out(p.x.cpu(), "plain"), plain, tau, slots)
    assert_same_bits(kept.cpu(), wanted_kept, "neurons kept with a scale")
    assert bool((y.cpu() == wanted_y).all()), "cats y with a scale"


_TENSORS = ("gate_up_plus", "down_plus", "gate_up_bias", "down_bias", "scale")


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


CHECKS = (check_scaled_statistic, check_scaled_histogram, check_scaled_cats)
