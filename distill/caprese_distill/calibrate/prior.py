"""The prior: each neuron's share of the statistic of the data's responses, under the original model.

p_j = sum_i z~_ij^2 / sum_j sum_i z~_ij^2 over the response tokens i of all samples, z~ as the method's score has it; a
float32 vector of F values for each sparse layer. It adds up over samples, batches and shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from caprese_kernels.config import Score
from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_statistic

from ..placement import aligned, device_of


def neuron_norms(block: Any) -> Tensor:
    """||w2_j|| of each neuron of a gated FF block: float32 [F], as `caprese_kernels.reference.down_norms` has it."""
    with aligned(block.down_proj):
        return block.down_proj.weight.detach().float().norm(dim=0)


class PriorSums:
    """The sums over response tokens, float64 [F] a layer; `watch` adds those of every forward pass within it."""

    def __init__(self, blocks: Mapping[int, nn.Module], score: Score):
        self.blocks = blocks
        self.scales = {i: neuron_norms(block) if score == "weighted" else None for i, block in blocks.items()}
        self.sums: dict[int, Tensor] = {}
        for i, block in blocks.items():
            linear: Any = block.down_proj
            self.sums[i] = torch.zeros(linear.in_features, dtype=torch.float64, device=device_of(block))
        self.tokens = 0

    @contextlib.contextmanager
    def watch(self, rows: Tensor) -> Iterator[None]:
        """Within it, a forward pass over [B, T] tokens adds its flattened rows `rows` [N] int64: response tokens."""
        handles = [
            block.down_proj.register_forward_pre_hook(self._adder(i, rows))  # type: ignore[union-attr]
            for i, block in self.blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.tokens += len(rows)

    def _adder(self, layer: int, rows: Tensor) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0].flatten(0, -2)[rows.to(args[0].device)]
            self.sums[layer] += griffin_statistic(z, scale=self.scales[layer])

        return add

    def priors(self) -> dict[int, Tensor]:
        """p [F] float32 of each layer, on the CPU. CapreseError for a layer in which no token counted."""
        found = {}
        for i, total in self.sums.items():
            if not float(total.sum()) > 0:
                raise CapreseError(
                    f"prior of layer {i}",
                    expected="response tokens with activations other than zero",
                    found=f"none among {self.tokens} tokens",
                    fix="give more data, or another --dtype",
                )
            found[i] = (total / total.sum()).float().cpu()
        return found
