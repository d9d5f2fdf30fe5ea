"""What a distillation does, with every setting resolved for one model and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caprese_kernels.config import BaseModelInfo, Method

from .data.batches import Batch
from .data.samples import Sample
from .end_to_end.train import Recipe
from .layer_wise.adam import AdamSettings
from .selection import Priors


@dataclass(frozen=True)
class Work:
    """The stages and their inputs.

    `priors` are given, or made first (`collects_priors`); without either the method must need none. The layer-wise
    stage is the closed form, or Adam if `adam` is given; with `weighting` (closed form only) the closed form follows a
    second time, weighted by the gradient. The end-to-end stage follows if `recipe` is given.
    """

    samples: Sequence[Sample]
    info: BaseModelInfo
    method: Method
    recipe: Recipe | None = None
    adam: AdamSettings | None = None
    weighting: bool = False
    priors: Priors | None = None
    collects_priors: bool = False

    def __post_init__(self) -> None:
        assert self.priors or self.collects_priors or not self.method.needs_prior
        assert not (self.weighting and self.adam), "only the closed form is weighted"


@dataclass(frozen=True)
class RemainingWork:
    """The parts of a `Work` that a killed run left to do."""

    batches: Sequence[Batch]  # to feed to the original model, layer-wise
    layers: Sequence[int]  # to solve in closed form
    steps: Sequence[Sequence[Sample]]  # to train end to end
    evaluations: int  # of the held-out error, end to end
    resumed: bool  # whether an earlier run did a part
    prior: Sequence[Batch] = ()  # to feed to the original model, for the priors
    weighted: Sequence[Batch] = ()  # to feed to original and student, for the weighted closed form
    files: Sequence[Path] = ()  # what that run left, from which this one goes on
