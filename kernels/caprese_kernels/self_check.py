"""One FF block's kernels against plain arithmetic on the block's own weights: what would be served, is it right?

The expected output is equations 9 and 10 in float32, dense with masks, a few neurons at a time. It shares nothing with
the kernels, nor with `reference`, but the weights: a kernel that is miscompiled, reads the wrong rows or lost its L and
R differs by more than rounding, in any layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Backend
from .config import Method
from .errors import CapreseError
from .packed import CoreFF, PackedFF
from .reference import griffin_count, magnitudes

TOKENS = 3
CHUNK = 1024  # neurons whose weights are converted at a time
# Relative error of a token's output that rounding explains, many times over: products of float32 may run as TF32.
TOLERANCES = {torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
BORDERLINE = 0.02  # CATS: neurons this close to the threshold may fall on either side of it


@dataclass(frozen=True)
class SelfCheck:
    """The largest relative errors over tokens, ||y - y_expected|| / ||y_expected||, and what is allowed."""

    sparse: float
    dense: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.sparse <= self.tolerance and self.dense <= self.tolerance  # each False for NaN


def check_block(
    kernels: Backend, method: Method, ff: PackedFF, core: CoreFF | None, tail: PackedFF | None
) -> SelfCheck:
    """Run the kernels that generated tokens run, and those of requests with Caprese off, on random tokens.

    `core` and `tail` divide `ff` as the engine does: views of the same storage, the core's neurons last.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, ff.hidden_size, generator=generator).to(ff.up_plus)
    slots = torch.arange(TOKENS, device=x.device) % 2
    slack = torch.zeros(TOKENS, device=x.device)
    g, _ = _activations(x.float(), ff)
    if method.name == "griffin":
        own = 0 if core is None else core.num_neurons
        masks = _random_masks(griffin_count(method.density, ff.num_neurons), own, ff.num_neurons, generator)
        keep = masks.to(x.device)
        got = _griffin(kernels, x, keep, slots, core, tail)
        kept = keep[slots]
    else:
        sizes = magnitudes(g, ff.scale)
        tau = sizes.flatten().kthvalue(max(1, round((1 - method.density) * sizes.numel()))).values.repeat(2)
        got = kernels.cats_ff(x, ff, tau, slots)[0]
        kept = sizes >= tau[0]
        borderline = (sizes - tau[0]).abs() <= BORDERLINE * tau[0]
        slack = _expected(x, ff, borderline, low_rank=False, bias=False).norm(dim=1)
    sparse = _error(got, _expected(x, ff, kept), slack)
    everything = torch.ones_like(kept)
    dense = _error(kernels.dense_ff(x, ff), _expected(x, ff, everything, low_rank=False), torch.zeros_like(slack))
    return SelfCheck(sparse, dense, TOLERANCES[x.dtype])


def refuse(check: SelfCheck, kernel: str, layer: int) -> None:
    """Raise CapreseError unless the check has passed."""
    if not check.passed:
        raise CapreseError(
            f"kernel {kernel!r} on layer {layer}",
            expected=f"the FF block's output within a relative error of {check.tolerance:g}",
            found=f"{check.sparse:.3g} for generated tokens, {check.dense:.3g} for those with Caprese off",
            fix="run `caprese doctor`, report what it prints, and serve with kernel 'reference' until then",
        )


def _griffin(
    kernels: Backend, x: Tensor, keep: Tensor, slots: Tensor, core: CoreFF | None, tail: PackedFF | None
) -> Tensor:
    own = keep.clone()
    if core is None:
        assert tail is not None
        return kernels.griffin_ff(x, tail, own, slots)
    shared = kernels.core_ff(x, core, slots)
    own[:, -core.num_neurons :] = False
    return shared if tail is None else shared + kernels.griffin_ff(x, tail, own, slots)


def _random_masks(k: int, core: int, neurons: int, generator: torch.Generator) -> Tensor:
    """Two masks bool [2, F] of k neurons: the last `core` ones, and others at random."""
    masks = torch.zeros(2, neurons, dtype=torch.bool)
    masks[:, neurons - core :] = True
    for mask in masks:
        mask[torch.randperm(neurons - core, generator=generator)[: k - core]] = True
    return masks


def _activations(x: Tensor, ff: PackedFF) -> tuple[Tensor, Tensor]:
    """g and z of all neurons [T, F] float32."""
    up = _product(x, ff.up_plus[: ff.num_neurons], ff.up_bias)
    if ff.gate is None:
        g = ff.act(up)
        return g, g
    g = ff.act(_product(x, ff.gate, ff.gate_bias))
    return g, g * up


def _product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.cat([x @ part.float().t() for part in rows.split(CHUNK)], dim=1)
    return y if bias is None else y + bias.float()


def _expected(x: Tensor, ff: PackedFF, kept: Tensor, low_rank: bool = True, bias: bool = True) -> Tensor:
    x = x.float()
    _, z = _activations(x, ff)
    z = torch.where(kept, z, 0.0)
    y = torch.zeros_like(x)
    for part, rows in zip(z.split(CHUNK, dim=1), ff.down_plus[: ff.num_neurons].split(CHUNK), strict=True):
        y += part @ rows.float()
    if low_rank and ff.rank:
        y += _product(x, ff.up_plus[ff.num_neurons :], None) @ ff.down_plus[ff.num_neurons :].float()
    return y if ff.down_bias is None or not bias else y + ff.down_bias.float()


def _error(got: Tensor, expected: Tensor, slack: Tensor) -> float:
    """The largest over tokens; NaN where either is not finite, 0 where both are zero."""
    distance = ((got.float() - expected).norm(dim=1) - slack).clamp(min=0)
    size = expected.norm(dim=1)
    relative = torch.where(size > 0, distance / size, torch.where(distance > 0, torch.inf, 0.0))
    relative = torch.where(distance.isfinite() & size.isfinite(), relative, torch.nan)
    return float(relative.max()) if bool(relative.isfinite().all()) else float("nan")
