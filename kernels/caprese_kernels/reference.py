"""Plain torch: the definition that every faster kernel is compared with.

Shapes: x [T, D]; g, z [T, F]; T tokens, D hidden size, F neurons, r rank.
Statistics are float32 whatever the model's dtype, and *add up* over chunks of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import PackedFF

NUM_MAGNITUDES = 1 << 15  # a bfloat16's bits without the sign
EXACT_VALUES = 1 << 20  # float32 magnitudes kept as they are, up to 4 MiB a layer; see CatsStatistic


def activations(x: Tensor, ff: PackedFF) -> tuple[Tensor, Tensor]:
    """g = act(x W_g) and z = g * (x W_1) (eq. 1), [T, F] each; without a gate z = g = act(x W_1)."""
    up = F.linear(x, ff.up_plus[: ff.num_neurons], ff.up_bias)
    if ff.gate is None:
        g = ff.act(up)
        return g, g
    g = ff.act(F.linear(x, ff.gate, ff.gate_bias))
    return g, g * up


def dense_ff(x: Tensor, ff: PackedFF) -> Tensor:
    """The original block, FF(x) = z W_2 (eq. 1-2): [T, D] -> [T, D]. L and R take no part."""
    _, z = activations(x, ff)
    y = z @ ff.down_plus[: ff.num_neurons]
    return y if ff.down_bias is None else y + ff.down_bias


def sparse_ff(x: Tensor, ff: PackedFF, keep: Tensor) -> Tensor:
    """The block of generated tokens with the low-rank layer (eq. 9-10), neurons chosen by a mask.

    y = z+ [W_2; R] with z+ = [keep * act(x W_g) * (x W_1), x L]: the r low-rank neurons are always
    active and have gate 1. `keep` [T, F] bool. Dense arithmetic with masks: every weight is read.
    """
    _, z = activations(x, ff)
    return _down_plus(x, torch.where(keep, z, 0), ff)


def griffin_ff(x: Tensor, ff: PackedFF, keep: Tensor) -> Tensor:
    """GRIFFIN for T generated tokens; `keep` [T, F] bool is each token's own request's selection."""
    return sparse_ff(x, ff, keep)


def cats_ff(x: Tensor, ff: PackedFF, tau: Tensor) -> tuple[Tensor, Tensor]:
    """CATS for T generated tokens; `tau` [T] float32 is each token's own request's threshold.

    A token keeps the neurons with |g| >= tau (eq. 5-6), compared in float32.
    Returns y [T, D] and the number of neurons kept [T].
    """
    g, z = activations(x, ff)
    keep = g.abs().float() >= tau[:, None]
    return _down_plus(x, torch.where(keep, z, 0), ff), keep.sum(dim=1)


def _down_plus(x: Tensor, z: Tensor, ff: PackedFF) -> Tensor:
    if ff.rank:
        z = torch.cat([z, F.linear(x, ff.up_plus[ff.num_neurons :])], dim=1)
    y = z @ ff.down_plus
    return y if ff.down_bias is None else y + ff.down_bias


def griffin_statistic(z: Tensor) -> Tensor:
    """s^2 of the tokens in z [T, F]: sum_i z_ij^2 / ||z_i||^2, float32 [F] (paper, section 2.2).

    A token with ||z_i|| = 0 adds nothing. Add the results of a prompt's chunks.
    """
    # Scaling by the largest entry first keeps the squares of half-precision outliers finite.
    z = z.float()
    largest = z.abs().amax(dim=1, keepdim=True)
    z = torch.where(largest > 0, z / largest, 0.0)
    squares = z.square()
    norms = squares.sum(dim=1, keepdim=True)
    return torch.where(norms > 0, squares / norms, 0.0).sum(dim=0)


def griffin_count(density: float, num_neurons: int) -> int:
    """k = floor(d F)."""
    return math.floor(density * num_neurons)


def griffin_select(statistic: Tensor, k: int) -> Tensor:
    """Mask [F] bool of the k largest of s^2 [F]; ties go to the lower index."""
    order = torch.sort(statistic, descending=True, stable=True).indices
    keep = torch.zeros_like(statistic, dtype=torch.bool)
    keep[order[:k]] = True
    return keep


@dataclass
class CatsStatistic:
    """The magnitudes |g| of a prompt's tokens at one layer; adds up over chunks.

    A histogram over the 32,768 magnitudes of bfloat16, exact for a bfloat16 model. A float32 model
    has finer magnitudes, so a short prompt (`num_values` = prompt tokens x F up to EXACT_VALUES)
    keeps the values themselves. Which of the two depends on the prompt's length alone, never on
    how it was cut into chunks.
    """

    num_values: int
    dtype: torch.dtype
    histogram: Tensor | None = None  # [NUM_MAGNITUDES] int64
    values: list[Tensor] = field(default_factory=list)  # float32

    def add(self, g: Tensor) -> None:
        """Add the tokens of g [T, F]."""
        magnitudes = g.detach().abs().float().flatten()
        if self.dtype == torch.float32 and self.num_values <= EXACT_VALUES:
            self.values.append(magnitudes)
            return
        # Non-negative bfloat16 numbers order as their bit patterns do.
        bins = magnitudes.to(torch.bfloat16).view(torch.int16).long()
        counts = torch.bincount(bins, minlength=NUM_MAGNITUDES)
        self.histogram = counts if self.histogram is None else self.histogram + counts

    def threshold(self, density: float) -> Tensor:
        """tau, the (1-d) quantile of all magnitudes added (linear between neighbours), float32 scalar.

        At density 1 nothing is dropped: tau = 0, below which no magnitude lies.
        """
        ordered: Tensor
        if self.histogram is not None:
            ends, device = self.histogram.cumsum(0), self.histogram.device
            total = int(ends[-1])
        else:
            ordered, device = torch.cat(self.values).sort().values, self.values[0].device
            total = len(ordered)
        if density >= 1.0:
            return torch.zeros((), device=device)
        rank = (1.0 - density) * (total - 1)
        low, high = math.floor(rank), math.ceil(rank)
        if self.histogram is not None:
            # The value of rank i is the first magnitude whose cumulative count exceeds i.
            bins = torch.searchsorted(ends, torch.tensor([low, high], device=device), right=True)
            below, above = bins.to(torch.int16).view(torch.bfloat16).float()
        else:
            below, above = ordered[low], ordered[high]
        return torch.lerp(below, above, rank - low)
