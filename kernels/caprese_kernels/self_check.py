"""One FF block's kernels against plain arithmetic on the block's own weights: what would be served, is it right?

The expected output is equations 9 and 10 in float32, dense with masks, a few neurons at a time. It shares nothing with
the kernels, nor with `reference`, but the weights: a kernel that is miscompiled, reads the wrong rows or lost its L and
R differs by more than rounding, in any layer. What takes a prompt's statistic, and selects by it, is compared likewise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Backend
from .config import Method
from .errors import CapreseError
from .packed import CoreFF, PackedFF
from .reference import NUM_MAGNITUDES, down_norms, griffin_count, magnitudes

# Each runs other code somewhere: a token alone, CATS's tile for two, gathered rows for a few, matrix products for many.
# One expectation serves all of them, so that start-up checks as many as `caprese doctor`.
BATCHES = (1, 2, 3, 65)
TOKENS = max(BATCHES)
CHUNK = 1024  # neurons whose weights are converted at a time
# Relative error of a token's output that rounding explains, many times over: products of float32 may run as TF32.
TOLERANCES = {torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
BORDERLINE = 0.02  # CATS: neurons this close to the threshold may fall on either side of it
RANKS = 0.01  # CATS: a threshold may be the quantile this far from the one wanted
SELECTION_TOLERANCE = 1e-3  # statistics are float32 sums of a few tokens whatever the model's dtype


@dataclass(frozen=True)
class SelfCheck:
    """The largest relative errors over batches and tokens, ||y - y_expected|| / ||y_expected||, and what is allowed.

    `selection` is the error of a prompt's statistic (GRIFFIN) or threshold (CATS), of which `SELECTION_TOLERANCE` is
    allowed; infinite for another selection than the statistic's.
    """

    sparse: float
    dense: float
    selection: float
    tolerance: float

    @property
    def passed(self) -> bool:
        outputs = self.sparse <= self.tolerance and self.dense <= self.tolerance  # each False for NaN
        return outputs and self.selection <= SELECTION_TOLERANCE


def check_block(
    kernels: Backend, method: Method, ff: PackedFF, core: CoreFF | None, tail: PackedFF | None
) -> SelfCheck:
    """Run the kernels of generated tokens, of requests with Caprese off, and of prompts' statistics on random tokens.

    `core` and `tail` divide `ff` as the engine does: views of the same storage, the core's neurons last.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, ff.hidden_size, generator=generator, dtype=torch.float32).to(ff.up_plus)
    slots = torch.arange(TOKENS, device=x.device)
    slots[2] = 0  # two of the first three share a selection; many tokens have one each
    slack = torch.zeros(TOKENS, dtype=torch.float32, device=x.device)
    gate, g, z = _activations(x.float(), ff)
    if method.name == "griffin":
        own = 0 if core is None else core.num_neurons
        masks = _random_masks(griffin_count(method.density, ff.num_neurons), own, ff.num_neurons, generator)
        keep = masks.to(x.device)
        kept = keep[slots]
        selection = max(_statistic_error(kernels, method, z.to(x.dtype), ff), _select_error(kernels, method, ff))
    else:
        sizes = magnitudes(g, ff.scale)
        tau = sizes.flatten().kthvalue(max(1, round((1 - method.density) * sizes.numel()))).values.repeat(TOKENS)
        kept = sizes >= tau[0]
        borderline = (sizes - tau[0]).abs() <= BORDERLINE * tau[0]
        slack = _expected(x, ff, borderline, low_rank=False, bias=False).norm(dim=1)
        selection = _threshold_error(kernels, method, gate.to(x.dtype), ff)
    wanted, wanted_dense = _expected(x, ff, kept), _expected(x, ff, torch.ones_like(kept), low_rank=False)
    none = torch.zeros_like(slack)
    sparse, dense = [], []
    for n in BATCHES:
        rows, places = x[:n], slots[:n]
        if method.name == "griffin":
            got = _griffin(kernels, rows, keep, places, core, tail)
        else:
            got = kernels.cats_ff(rows, ff, tau, places)[0]
        sparse.append(_error(got, wanted[:n], slack[:n]))
        dense.append(_error(kernels.dense_ff(rows, ff), wanted_dense[:n], none[:n]))
        if (prompt := kernels.prompt_ff(rows, ff, observed=True)) is not None:
            dense.append(_error(prompt[0], wanted_dense[:n], none[:n]))
    return SelfCheck(_worst(sparse), _worst(dense), selection, TOLERANCES[x.dtype])


def refuse(check: SelfCheck, kernel: str, layer: int) -> None:
    """Raise CapreseError unless the check has passed."""
    if not check.passed:
        raise CapreseError(
            f"kernel {kernel!r} on layer {layer}",
            expected=f"the FF block's output within a relative error of {check.tolerance:g}, "
            f"a prompt's statistic within {SELECTION_TOLERANCE:g}",
            found=f"{check.sparse:.3g} for generated tokens, {check.dense:.3g} for those with Caprese off, "
            f"{check.selection:.3g} for the statistic",
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
    """Masks bool [TOKENS, F] of k neurons: the last `core` ones, and others at random."""
    masks = torch.zeros(TOKENS, neurons, dtype=torch.bool)
    masks[:, neurons - core :] = True
    for mask in masks:
        mask[torch.randperm(neurons - core, generator=generator)[: k - core]] = True
    return masks


def _statistic_error(kernels: Backend, method: Method, z: Tensor, ff: PackedFF) -> float:
    """Of s^2 of a prompt with these z [T, F], relative to its norm."""
    scale = down_norms(ff) if method.weighted else None
    got = torch.zeros(1, ff.num_neurons, dtype=torch.float32, device=z.device)
    kernels.griffin_observe(z, *_one_prompt(z), got, None, scale)
    squares = (z.double() if scale is None else z.double() * scale).square()
    norms = squares.sum(dim=1, keepdim=True)
    wanted = torch.where((norms > 0) & norms.isfinite(), squares / norms, 0.0).sum(dim=0, keepdim=True).float()
    return _error(got, wanted, torch.zeros(1, dtype=torch.float32, device=z.device))


def _select_error(kernels: Backend, method: Method, ff: PackedFF) -> float:
    """0 if the k largest of a statistic without ties are found, else infinite."""
    neurons, k = ff.num_neurons, griffin_count(method.density, ff.num_neurons)
    generator = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randperm(neurons, generator=generator) for _ in range(2)]).to(ff.up_plus.device)
    got = kernels.griffin_select((places + 1).float() / neurons, k)
    return 0.0 if torch.equal(got, places >= neurons - k) else float("inf")


def _threshold_error(kernels: Backend, method: Method, gate: Tensor, ff: PackedFF) -> float:
    """Of the threshold of a prompt with these values before the activation [T, F], beyond what rounding explains."""
    neurons = ff.num_neurons
    strided = gate.repeat(1, 2)[:, :neurons]  # as beside up's, where vLLM has them
    histogram = torch.zeros(1, NUM_MAGNITUDES, dtype=torch.int64, device=gate.device)
    kernels.cats_observe(strided, ff.activation, *_one_prompt(gate), histogram, ff.scale)
    if int(histogram.sum()) != gate.numel():
        return float("inf")
    tau = float(kernels.cats_threshold(histogram, method.density)[0])
    if method.density >= 1.0:
        return 0.0 if tau == 0.0 else float("inf")
    ordered = magnitudes(ff.act(gate.float()), ff.scale).flatten().sort().values
    last = len(ordered) - 1
    ranks = (max(0.0, 1 - method.density - RANKS), min(1.0, 1 - method.density + RANKS))
    low, high = (float(ordered[round(rank * last)]) for rank in ranks)
    beyond = max((1 - BORDERLINE) * low - tau, tau - (1 + BORDERLINE) * high, 0.0)
    if not math.isfinite(tau) or not math.isfinite(high):
        return float("nan")
    return beyond / high if high > 0 else float(beyond > 0)


def _one_prompt(values: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and slots of all rows as one prompt's."""
    return torch.tensor([0, len(values)], device=values.device), torch.zeros(1, dtype=torch.int64, device=values.device)


def _worst(errors: list[float]) -> float:
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _activations(x: Tensor, ff: PackedFF) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the activation, g and z of all neurons: [T, F] float32 each."""
    up = _product(x, ff.up_plus[: ff.num_neurons], ff.up_bias)
    if ff.gate is None:
        g = ff.act(up)
        return up, g, g
    gate = _product(x, ff.gate, ff.gate_bias)
    g = ff.act(gate)
    return gate, g, g * up


def _product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.cat([x @ part.float().t() for part in rows.split(CHUNK)], dim=1)
    return y if bias is None else y + bias.float()


def _expected(x: Tensor, ff: PackedFF, kept: Tensor, low_rank: bool = True, bias: bool = True) -> Tensor:
    x = x.float()
    _, _, z = _activations(x, ff)
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
