"""What one layer's prompt selects: score, prior and core put together. Trainer and server share it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .reference import CatsStatistic, core_count, griffin_blend, griffin_core, griffin_count, griffin_select_tail

if TYPE_CHECKING:
    from .backend import Backend
    from .config import Method


@dataclass(frozen=True, eq=False)
class LayerSelector:
    """Selections of one FF block's neurons, or of the part of them that one device holds.

    scale  [F] float32, ||w2_j||: of a weighted score (`reference.down_norms`), else None
    prior  [F] float32, p_j: None where the method needs none
    """

    method: Method
    num_neurons: int
    scale: Tensor | None = None
    prior: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.scale is not None) == self.method.weighted
        assert self.prior is not None or not self.method.needs_prior

    @property
    def kept(self) -> int:
        """k, how many neurons a generated token keeps under GRIFFIN."""
        return griffin_count(self.method.density, self.num_neurons)

    @property
    def core_size(self) -> int:
        """Neurons that every request keeps: floor(kappa k); all k where the prior alone decides."""
        return self.kept if self.method.prior == 1.0 else core_count(self.method.core, self.kept)

    @cached_property
    def core(self) -> Tensor:
        """Mask, bool [F], of the neurons that every request keeps."""
        if self.prior is None:
            device = None if self.scale is None else self.scale.device
            return torch.zeros(self.num_neurons, dtype=torch.bool, device=device)
        return griffin_core(self.prior, self.core_size)

    def order(self) -> Tensor:
        """The permutation [F] int64 that puts the core last; each part keeps its order, so that ties fall as before."""
        return torch.cat([(~self.core).nonzero()[:, 0], self.core.nonzero()[:, 0]])

    def permuted(self, order: Tensor) -> LayerSelector:
        """The same for neurons in another order: neuron order[j] in place j."""
        scale, prior = (None if part is None else part[order] for part in (self.scale, self.prior))
        return LayerSelector(self.method, self.num_neurons, scale, prior)

    def select(self, statistics: Tensor, kernels: Backend | None = None) -> Tensor:
        """GRIFFIN's masks, bool, from s^2 [F] or [n, F] float32: k neurons a row, core and tail.

        `kernels` find the k largest; the reference by default.
        """
        find = (reference if kernels is None else kernels).griffin_select
        blended = griffin_blend(statistics, self.prior, self.method.prior)
        if not self.core_size:
            return find(blended, self.kept)
        return griffin_select_tail(blended, self.kept, self.core, find)

    def from_prompt(self, g: Tensor | None, z: Tensor) -> Tensor:
        """What a prompt's g, z [T, F] select: GRIFFIN's mask [F] bool, or CATS's threshold, a float32 scalar."""
        if self.method.name == "griffin":
            return self.select(reference.griffin_statistic(z, scale=self.scale))
        assert g is not None
        statistic = CatsStatistic(g.numel(), g.dtype, self.scale)
        statistic.add(g)
        return statistic.threshold(self.method.density)

    def keeps(self, selection: Tensor, g: Tensor | None) -> Tensor:
        """Neurons kept, bool [N, F]: by GRIFFIN's masks [N, F], or CATS's thresholds [N] with g [N, F]."""
        if self.method.name == "griffin":
            return selection
        assert g is not None
        return reference.magnitudes(g, self.scale) >= selection[:, None]
