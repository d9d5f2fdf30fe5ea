"""Sparse FF blocks with any correction, in one form for training, held-out errors and decoding.

A correction is a module that computes FF~(x) from the block, x, u = x W_g, v = x W_1 and a mask `keep` of the neurons
that the method keeps. The same object is used for eq. 7 (`LayerWise`), eq. 8 (`EndToEnd`) and greedy decoding
(`DecodedFF`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from caprese_distill.blocks import find_blocks
from caprese_distill.data.batches import Batch, make_batches
from caprese_distill.data.samples import Sample
from caprese_distill.selection import keep_mask, select, selectors_of
from caprese_distill.student import SharedModel, frozen
from caprese_kernels.config import BaseModelInfo, Method

from .decoding import SparseFF


class LowRank(nn.Module):
    """Eq. 9 and 10: the kept neurons plus x L R, with L [D, r] and R [r, D] in any dtype. r = 0 is the plain method."""

    def __init__(self, left: Tensor, right: Tensor):
        super().__init__()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def forward(self, block: Any, x: Tensor, u: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """FF~(x) [..., D] from x [..., D], u, v [..., F] and keep [..., F] bool."""
        z = torch.where(keep, block.act_fn(u) * v, 0)
        return block.down_proj(z) + x @ self.left.to(x.dtype) @ self.right.to(x.dtype)


class LayerWise(SharedModel):
    """Eq. 7 for all layers at once: FF(x) and FF~(x) of the original model's x, the layers side by side, [N, layers D].

    The loss is the sum of the layers' squared errors, and each layer's parameters affect only its own: each layer is
    trained independently.
    """

    title = "layer-wise"

    def __init__(self, model: Any, info: BaseModelInfo, method: Method, ff: Mapping[int, nn.Module]):
        super().__init__(model, method)
        self.ff, self.blocks = ff, find_blocks(model, info, method.layers)
        self.selectors = selectors_of(self.blocks, method)
        self.rows: dict[int, tuple[Tensor, ...]] = {}

    def __enter__(self) -> LayerWise:
        self.handles = [handle for i, block in self.blocks.items() for handle in self._hooks(i, block)]
        self.all_layers = self.decoder.layers
        self.decoder.layers = self.all_layers[: max(self.blocks) + 1]  # later layers do not affect these
        return self

    def __exit__(self, *_: object) -> None:
        self.decoder.layers = self.all_layers
        for handle in self.handles:
            handle.remove()

    def parameters(self) -> list[nn.Parameter]:
        return [p for ff in self.ff.values() for p in ff.parameters()]

    @torch.no_grad()
    def original(self, batch: Batch) -> Tensor:
        """FF(x) of eq. 7."""
        self.batch = batch
        self.decoder(input_ids=batch.ids(), use_cache=False)
        return torch.cat([self.rows[i][-1] for i in self.blocks], dim=1)

    def __call__(self, batch: Batch) -> Tensor:
        """FF~(x); `batch` must be the one last given to `original`."""
        assert batch is self.batch
        return torch.cat([self.ff[i](block, *self.rows[i][:-1]) for i, block in self.blocks.items()], dim=1)

    def _hooks(self, layer: int, block: Any) -> list[Any]:
        seen: dict[str, Tensor] = {}

        def see(name: str, _: nn.Module, __: object, output: Tensor) -> None:
            seen[name] = output

        def take(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            assert self.batch is not None
            u, v = seen.pop("u"), seen.pop("v")
            g = block.act_fn(u)
            selector = self.selectors[layer]
            keep = keep_mask(selector, self.batch, select(selector, self.batch, g, g * v), g)
            rows = self.batch.rows()
            self.rows[layer] = (*(t.flatten(0, 1)[rows] for t in (args[0], u, v)), keep, y.flatten(0, 1)[rows])

        return [
            block.gate_proj.register_forward_hook(partial(see, "u")),
            block.up_proj.register_forward_hook(partial(see, "v")),
            block.register_forward_hook(take),
        ]


class EndToEnd(SharedModel):
    """Eq. 8: prompt tokens run the original blocks, generated tokens FF~, as in `caprese_distill.student.Student`."""

    title = "end-to-end"

    def __init__(self, model: Any, info: BaseModelInfo, method: Method, ff: Mapping[int, nn.Module]):
        super().__init__(model, method)
        self.ff, self.blocks = ff, find_blocks(model, info, method.layers)
        self.selectors = selectors_of(self.blocks, method)

    def __enter__(self) -> EndToEnd:
        for i, block in self.blocks.items():
            block.forward = partial(self._forward, i, block)
        return self

    def __exit__(self, *_: object) -> None:
        for block in self.blocks.values():
            del block.forward  # its class's forward is back

    def parameters(self) -> list[nn.Parameter]:
        return [p for ff in self.ff.values() for p in ff.parameters()]

    def _forward(self, layer: int, block: Any, x: Tensor) -> Tensor:
        assert self.batch is not None
        u, v = block.gate_proj(x), block.up_proj(x)
        g = block.act_fn(u)
        if not self.sparse:
            z = g * v
            self.selections[layer] = select(self.selectors[layer], self.batch, g, z)
            return block.down_proj(z)
        rows = self.batch.rows()
        generated = torch.zeros(x.shape[:2].numel(), dtype=torch.bool, device=x.device)
        generated[rows] = True
        keep = keep_mask(self.selectors[layer], self.batch, self.selections[layer], g)
        x, u, v, g = (t.flatten(0, 1) for t in (x, u, v, g))
        y = torch.empty_like(x)
        y[~generated] = block.down_proj((g * v)[~generated])
        y[rows] = self.ff[layer](block, x[rows], u[rows], v[rows], keep)
        return y.view(*self.batch.ids().shape, -1)


class DecodedFF(SparseFF):
    """FF~ for `decoding.decode`; prompts select neurons as in SparseFF."""

    def __init__(self, method: Method, ff: nn.Module):
        super().__init__(method)
        self.ff = ff

    def token(self, block: Any, x: Tensor) -> Tensor:
        u, v = block.gate_proj(x), block.up_proj(x)
        return self.ff(block, x, u, v, self.keep(block.act_fn(u)))


@torch.no_grad()
def held_out_errors(
    model: Any, samples: Sequence[Sample], info: BaseModelInfo, method: Method, ff: Mapping[int, nn.Module]
) -> tuple[float, float]:
    """The held-out samples' errors: ||FF - FF~||^2 / ||FF||^2 of eq. 7, mean over layers, each with the original
    model's x; and ||M - M_student||^2 / ||M||^2 of eq. 8.
    """
    batches = [batch for batch in make_batches(samples, next(model.parameters()).device) if batch.held_out]
    with frozen(model, gradient_checkpointing=False):
        with LayerWise(model, info, method, ff) as layer_wise:
            ratios = _ratios(layer_wise, batches, len(method.layers))
        with EndToEnd(model, info, method, ff) as end_to_end:
            return float(ratios.mean()), float(_ratios(end_to_end, batches, 1))


def _ratios(student: SharedModel, batches: Sequence[Batch], parts: int) -> Tensor:
    """Squared error / squared target for each of `parts` equal slices of the last dimension, [parts] float64."""
    sums = torch.zeros(2, parts, dtype=torch.float64)
    for batch in batches:
        target = student.original(batch).double()
        error = student(batch).double() - target
        sums += torch.stack([t.square().unflatten(1, (parts, -1)).sum(dim=(0, 2)).cpu() for t in (error, target)])
    return sums[0] / sums[1]
