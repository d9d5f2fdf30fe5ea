"""Which neurons a sample's generated tokens keep, by the definitions that serving uses.

Shapes: B samples of up to T tokens, N generated tokens of a batch; F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caprese_kernels.config import Method
from caprese_kernels.reference import CatsStatistic, griffin_count, griffin_select, griffin_statistic

from .data.batches import Batch


def select(method: Method, batch: Batch, g: Tensor | None, z: Tensor) -> Tensor:
    """What each sample's prompt chooses, by the definitions that serving uses: GRIFFIN's neurons, [B, F] bool,
    from z [B, T, F]; or CATS's thresholds (paper, section 2.2), [B] float32, from g [B, T, F].
    """
    lengths = [s.prompt_length for s in batch.samples]
    if method.name == "griffin":
        k = griffin_count(method.density, z.shape[-1])
        return torch.stack([griffin_select(griffin_statistic(z[b, :p]), k) for b, p in enumerate(lengths)])
    assert g is not None
    thresholds = []
    for b, p in enumerate(lengths):
        statistic = CatsStatistic(p * g.shape[-1], g.dtype)
        statistic.add(g[b, :p])
        thresholds.append(statistic.threshold(method.density))
    return torch.stack(thresholds)


def keep_mask(method: Method, batch: Batch, selection: Tensor, g: Tensor | None) -> Tensor:
    """Neurons kept by the batch's generated tokens, [N, F] bool, given `selection` and (CATS) g [B, T, F]."""
    owners = batch.owners()
    if method.name == "griffin":
        return selection[owners]
    assert g is not None
    return g.flatten(0, 1)[batch.rows()].abs().float() >= selection[owners, None]
