"""Which neurons a sample's generated tokens keep, by the definitions that serving uses.

Shapes: B samples of up to T tokens, N generated tokens of a batch; F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.selection import LayerSelector

from .checkpoint import digest
from .data.batches import Batch
from .placement import aligned, device_of

Selectors = Mapping[int, LayerSelector]  # by layer
Priors = Mapping[int, Tensor]  # p [F] float32 by layer


def neuron_norms(block: Any) -> Tensor:
    """||w2_j|| of each neuron of a gated FF block: float32 [F], as `caprese_kernels.reference.down_norms` has it."""
    with aligned(block.down_proj):
        return block.down_proj.weight.detach().float().norm(dim=0)


def selectors_of(
    blocks: Mapping[int, nn.Module], method: Method, priors: Priors | None = None
) -> dict[int, LayerSelector]:
    """One selector a layer, on the layer's device. `priors` are needed where the method needs them."""
    found = {}
    for i in method.layers:
        scale = neuron_norms(blocks[i]) if method.weighted else None
        prior = priors[i].to(device_of(blocks[i])) if priors and method.needs_prior else None
        neurons: Any = blocks[i].down_proj
        found[i] = LayerSelector(method.at(i), neurons.in_features, scale, prior)
    return found


def uniform_priors(info: BaseModelInfo, method: Method) -> dict[int, Tensor]:
    """Priors of a run that has none yet, to time its stages: any prior makes the same work."""
    return {i: torch.full((info.intermediate_size,), 1 / info.intermediate_size) for i in method.layers}


def selection_settings(method: Method, priors: Priors | None) -> dict[str, Any]:
    """All that a selection depends on beside the model and the samples, as JSON values."""
    named = {str(i): priors[i] for i in method.layers} if priors else {}
    return {
        "method": method.name,
        "density": method.density,
        **({} if method.densities is None else {"densities": list(method.densities)}),
        "layers": list(method.layers),
        "score": method.score,
        "prior": method.prior,
        "core": method.core,
        "values of the prior": digest(named) if named else None,
    }


def fixed_neurons(selector: LayerSelector, block: Any) -> Tensor | None:
    """The neurons that all generated tokens keep, ascending [k] int64, where the data alone decides; else None.

    None, too, for a block that accelerate places: its weights may not be in memory, so that a copy of some is no gain.
    """
    if selector.method.needs_statistic or any(hasattr(part, "_hf_hook") for part in block.modules()):
        return None
    return selector.core.nonzero()[:, 0]


def select(selector: LayerSelector, batch: Batch, g: Tensor | None, z: Tensor) -> Tensor:
    """What each sample's prompt chooses: GRIFFIN's neurons, [B, F] bool, from z [B, T, F]; or CATS's thresholds
    (paper, section 2.2), [B] float32, from g [B, T, F].
    """
    lengths = [s.prompt_length for s in batch.samples]
    return torch.stack([selector.from_prompt(None if g is None else g[b, :p], z[b, :p]) for b, p in enumerate(lengths)])


def keep_mask(selector: LayerSelector, batch: Batch, selection: Tensor, g: Tensor | None) -> Tensor:
    """Neurons kept by the batch's generated tokens, [N, F] bool, given `selection` and (CATS) g [B, T, F]."""
    return selector.keeps(selection[batch.owners()], None if g is None else g.flatten(0, 1)[batch.rows()])
