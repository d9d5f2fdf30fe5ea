"""How much the next token's distribution suffers from the neurons that a layer drops, at several densities at once.

If layer i alone drops the neurons j outside of its selection at density d, the output of its FF block lacks

    e_n(d) = sum_j z_nj w2_j   at generated token n.

To second order the divergence of the distributions is half the square of <g_n, e_n> in the mean, where g_n is the
gradient of log p(y) at that output, y drawn from the original's own distribution p of every generated token's successor
(the Fisher information). With u_nj = <g_n, w2_j>, the gradient at z_nj, no product with W_2 is needed:

    H_i(d) = 1/(2 N) sum_n ( sum over dropped j of z_nj u_nj )^2      nats a token, N generated tokens

One pass of the original model forward and backward gives all layers and densities; no activation is stored beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from caprese_kernels.config import Method

from ..data.batches import Batch, pack
from ..data.samples import Sample
from ..head import LOGIT_ROWS, Head
from ..placement import device_of, return_freed
from ..progress import progress_bar
from ..selection import Priors, Selectors, keep_mask, select, selectors_of
from ..student import check_gradient, frozen
from .allocate import density_of, grid

Harms = dict[int, dict[int, float]]  # by layer and k, the number of neurons kept


class Sensitivity:
    """Sums of squares over the generated tokens of the batches that pass through the blocks."""

    def __init__(self, blocks: Mapping[int, nn.Module], selectors: Mapping[int, Selectors]):
        """`selectors` has those of all layers by k."""
        self.selectors = selectors
        self.sums = {
            i: torch.zeros(len(selectors), dtype=torch.float64, device=device_of(block)) for i, block in blocks.items()
        }
        self.batch: Batch | None = None
        self.handles = [handle for i, block in blocks.items() for handle in self._hooks(i, block)]

    def __enter__(self) -> Sensitivity:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def add(self, layer: int, z: Tensor, g: Tensor | None, gradient: Tensor) -> None:
        """Add a batch: z, g and the gradient at z, [B, T, F] each."""
        assert self.batch is not None
        batch = replace(self.batch, device=z.device)  # layers may be on several devices
        rows = batch.rows()
        parts = z.flatten(0, 1)[rows].float() * gradient.flatten(0, 1)[rows].float()
        check_gradient(parts, layer, batch)
        for index, selectors in enumerate(self.selectors.values()):
            selector = selectors[layer]
            keep = keep_mask(selector, batch, select(selector, batch, g, z), g)
            self.sums[layer][index] += parts.masked_fill(keep, 0).sum(dim=1).square().sum(dtype=torch.float64)

    def harms(self, tokens: int) -> Harms:
        """H_i of each layer by k, over that many generated tokens."""
        return {
            i: dict(zip(self.selectors, (sums / (2 * tokens)).tolist(), strict=True)) for i, sums in self.sums.items()
        }

    def _hooks(self, layer: int, block: Any) -> list[Any]:
        seen: dict[str, Tensor] = {}
        cats = next(iter(self.selectors.values()))[layer].method.name == "cats"

        def see_activation(_: nn.Module, __: object, output: Tensor) -> None:
            seen["g"] = output

        def watch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            z = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # the first of them
            return (_Watched.apply(z, seen.pop("g", None), self, layer),)

        handles = [block.down_proj.register_forward_pre_hook(watch)]
        return [*handles, block.act_fn.register_forward_hook(see_activation)] if cats else handles


class _Watched(torch.autograd.Function):
    """z itself. Its gradient, with z and g, goes to the sums: both are saved as autograd saves them, so that gradient
    checkpointing holds one layer's."""

    @staticmethod
    def forward(context: Any, z: Tensor, g: Tensor | None, sums: Sensitivity, layer: int) -> Tensor:
        context.save_for_backward(z, g)
        context.sums, context.layer = sums, layer
        return z.view_as(z)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        z, g = context.saved_tensors
        context.sums.add(context.layer, z.detach(), None if g is None else g.detach(), gradient)
        return gradient, None, None, None


def measure_harms(
    model: Any,
    blocks: Mapping[int, nn.Module],
    samples: Sequence[Sample],
    method: Method,
    priors: Priors,
    seed: int = 0,
    console: Console | None = None,
) -> Harms:
    """H_i by layer and k, for the k of `grid` and F, where nothing is dropped. `seed` draws the successors."""
    neurons = next(iter(priors.values())).numel()
    selectors = {
        k: selectors_of(blocks, replace(method, density=density_of(k, neurons)), priors)
        for k in grid(method.density, neurons)
    }
    draw, head = torch.Generator().manual_seed(seed), Head(model)
    batches = pack(samples, device_of(model.get_input_embeddings()))
    with (
        frozen(model, gradient_checkpointing=True),
        Sensitivity(blocks, selectors) as sums,
        progress_bar(console, "batches/s") as bar,
    ):
        for batch in bar.track(batches, description="sensitivity"):
            sums.batch = batch
            with torch.enable_grad():
                hidden = model.get_decoder()(input_ids=batch.ids(), use_cache=False).last_hidden_state
                rows = hidden.flatten(0, 1)[batch.rows().to(hidden.device)]
                rows.backward(torch.cat([_score(part, head, draw) for part in rows.detach().split(LOGIT_ROWS)]))
            return_freed()
    harms = sums.harms(sum(s.num_rows for s in samples))
    return {i: by_count | {neurons: 0.0} for i, by_count in harms.items()}


def _score(hidden: Tensor, head: Head, draw: torch.Generator) -> Tensor:
    """d log p(y) / d hidden of some tokens, [N, D], with y drawn from p for each of them."""
    hidden = hidden.requires_grad_()
    likely = F.log_softmax(head(hidden), dim=-1)
    # The inverse of the cumulative distribution at a number drawn on the CPU: the same on every device.
    numbers = torch.rand(len(hidden), 1, generator=draw).to(likely.device)
    ends = likely.detach().exp().cumsum(dim=-1)
    y = torch.searchsorted(ends, numbers * ends[:, -1:]).clamp(max=ends.shape[1] - 1)
    return torch.autograd.grad(likely.gather(1, y).sum(), hidden)[0]
