"""The FF blocks of a decode step for each variant: by the served kernels, by the reference, and dense."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from caprese_kernels.packed import PackedFF

from ..kernels.agreement import check, check_cats
from ..kernels.cases import independent, thresholds
from ..kernels.dense import DenseWeights, Forward, candidates
from ..kernels.floor import step_bytes
from ..lora.served import kernels as lora_kernels
from ..lora.served.engine import Lora, draw
from .decode_model import DecodeModel, FeedForward
from .variants import TAILED, Variant


def dense_candidates(model: DecodeModel) -> dict[str, FeedForward]:
    """The implementations of kernels/dense.py, on a copy of W_2 in vLLM's layout, and one on W_2 as it is packed."""
    f = model.sizes.neurons
    inputs = [block.gate_up_plus[: 2 * f] for block in model.blocks]
    packed = [block.down_plus[:f] for block in model.blocks]
    weights = [DenseWeights(a, b.t().contiguous()) for a, b in zip(inputs, packed, strict=True)]
    made = {
        name: [make(each) for each in weights]
        for name, make in candidates(model.device, "silu", compiled=False).items()
    }
    found: dict[str, FeedForward] = {name: partial(_of_layer, runs) for name, runs in made.items()}
    found["packed"] = lambda layer, x: model.gated(F.linear(x, inputs[layer])) @ packed[layer]
    return found


def _of_layer(runs: list[Forward], layer: int, x: Tensor) -> Tensor:
    return runs[layer](x)


class DecodeBlocks:
    """The requests' selections, and each variant's FF blocks with them.

    Each request has a random GRIFFIN mask of its own; with a core, which is the last neurons, a random tail. CATS'
    thresholds are chosen so that the tokens of this very step keep the wanted share. `dense` computes the layers that
    are not sparse, and all layers of Full.
    """

    def __init__(self, model: DecodeModel, backend: Backend, density: float, dense: FeedForward):
        self.model, self.backend, self.dense = model, backend, dense
        sizes, batch = model.sizes, len(model.x)
        generator = torch.Generator().manual_seed(1)
        count = reference.griffin_count(density, sizes.neurons)

        def masks(neurons: int, count: int) -> Tensor:
            drawn = [independent(batch, neurons, count, generator) for _ in range(sizes.layers)]
            return torch.stack(drawn).to(model.device)

        self.keep = masks(sizes.neurons, count)
        self.slots = torch.arange(batch, device=model.device)
        self.kept = torch.zeros((), dtype=torch.int64, device=model.device)  # CATS counts here, as in the engine
        # By the core's share: neurons in it, and tails [layers, B, F], which keep none of them.
        self.core_counts = {share: reference.core_count(share, count) for share in (1.0, TAILED)}
        self.tails = {
            share: F.pad(masks(sizes.neurons - core, count - core), (0, core))
            for share, core in self.core_counts.items()
        }
        self.inputs: list[Tensor] = []  # x [B, D] of each FF block, in the original model
        self.bare = [model.plain(layer) for layer in range(sizes.layers)]
        model.step(lambda layer, x: reference.dense_ff(x, self.bare[layer]), self.inputs)
        self.tau = torch.stack(
            [thresholds(reference.activations(x, ff)[0], density) for x, ff in zip(self.inputs, self.bare, strict=True)]
        )
        self.cats_union = self._cats_union()
        self.lora: dict[int, Lora] = {}

    def sparse(self, variant: Variant) -> range:
        """The variant's sparse layers."""
        return variant.sparse_layers(self.model.sizes.layers)

    def packed(self, variant: Variant, layer: int) -> PackedFF:
        """The layer's weights, with L and R for a Caprese variant."""
        return self.model.blocks[layer] if variant.correction == "caprese" else self.bare[layer]

    def feed_forward(self, variant: Variant) -> FeedForward:
        """(layer, x) -> y. As in the engine, GRIFFIN's first layer plans for all its layers in one launch."""
        if variant.core is not None:
            return self._with_core(variant, variant.core)
        sparse = self.sparse(variant)
        if variant.correction == "lora" and not self.lora:
            self.lora = draw({layer: self.bare[layer] for layer in sparse}, self.model.rank)
        plans: Any = None

        def ff(layer: int, x: Tensor) -> Tensor:
            nonlocal plans
            if layer not in sparse:
                return self.dense(layer, x)
            if variant.method == "cats":
                block, tau = self.packed(variant, layer), self.tau[layer]
                return self.backend.cats_ff(x, block, tau, self.slots, kept=self.kept)[0]
            if layer == 0:
                plans = self.backend.plan_layers(self.keep[: len(sparse)], self.slots)
            plan = None if plans is None else plans[layer]
            if variant.correction == "lora":
                return self.lora[layer].forward(self.backend, x, self.keep[layer], self.slots, plan)
            keep = self.keep[layer]
            return self.backend.griffin_ff(x, self.packed(variant, layer), keep, self.slots, plan)

        return ff

    def _with_core(self, variant: Variant, share: float) -> FeedForward:
        """As the engine's blocks with a core: a dense slice for all requests, and each request's tail beside it."""
        sparse, count, tails = self.sparse(variant), self.core_counts[share], self.tails[share]
        cores = [self.packed(variant, layer).core(count) for layer in sparse]
        rests = [self.packed(variant, layer).without_low_rank() for layer in sparse]
        plans: Any = None

        def ff(layer: int, x: Tensor) -> Tensor:
            nonlocal plans
            if layer not in sparse:
                return self.dense(layer, x)
            shared = self.backend.core_ff(x, cores[layer], self.slots)
            if share == 1.0:
                return shared
            if layer == 0:
                plans = self.backend.plan_layers(tails[: len(sparse)], self.slots)
            plan = None if plans is None else plans[layer]
            return self.backend.griffin_ff(x, rests[layer], tails[layer], self.slots, plan).add_(shared)

        return ff

    def selection(self, variant: Variant) -> Tensor:
        """GRIFFIN's masks [layers, B, F], core and tail together."""
        if variant.core is None:
            return self.keep
        whole = self.tails[variant.core].clone()
        whole[..., self.model.sizes.neurons - self.core_counts[variant.core] :] = True
        return whole

    def check(self, variant: Variant, ff: FeedForward) -> float:
        """The largest relative error of a token's y in any layer, compared with the reference on the same x.

        Raises CapreseError if it exceeds the kernels' tolerance (kernels/agreement.py).
        """
        worst = 0.0
        for layer, x in enumerate(self.inputs):
            block, y = self.packed(variant, layer), ff(layer, x)
            if layer not in self.sparse(variant):
                worst = max(worst, check(y, reference.dense_ff(x, block)))
            elif variant.method == "cats":
                g, z = reference.activations(x, block)
                expected = reference.cats_ff(x, block, self.tau[layer], self.slots)
                worst = max(worst, check_cats((y, expected[1]), expected, g, z, self.tau[layer], block))
            else:
                worst = max(worst, check(y, self._reference(variant, layer, x)))
        return worst

    def bytes(self, variant: Variant, context: int, batch: int) -> float:
        """The bytes that a step must read."""
        sizes = self.model.sizes
        added = 0
        if variant.correction == "caprese":
            added = 2 * sizes.hidden_size * self.model.rank
        elif variant.correction == "lora":
            rank = lora_kernels.equal_rank(sizes.hidden_size, sizes.neurons, self.model.rank)
            added = 3 * rank * (sizes.hidden_size + sizes.neurons)
        kept = self.cats_union
        if variant.method != "cats":
            kept = float(self.selection(variant).any(dim=1).float().mean())
        sparse = len(self.sparse(variant))
        return step_bytes(sizes.weights(), variant.method, sparse, kept, added, context, batch, itemsize=2)

    def _reference(self, variant: Variant, layer: int, x: Tensor) -> Tensor:
        keep, block = self.selection(variant)[layer], self.packed(variant, layer)
        if variant.correction != "lora":
            return reference.griffin_ff(x, block, keep, self.slots)
        return self.lora[layer].forward(reference, x, keep, self.slots)

    def _cats_union(self) -> float:
        """Share of neurons that at least one token keeps under CATS, mean over layers."""
        shares = []
        for x, ff, tau in zip(self.inputs, self.bare, self.tau, strict=True):
            magnitudes = reference.activations(x, ff)[0].abs().float()
            shares.append(float((magnitudes >= tau[:, None]).any(dim=0).float().mean()))
        return sum(shares) / len(shares)
