"""The sparse model with L and R, as serving runs it. It shares the original's weights: one copy of most in memory.

Both are the same transformers model. Hooks on its FF blocks leave the original alone, or make it the student: prompt
tokens run the full block, generated ones only the neurons that their prompt chose, plus x L R (paper, eq. 9 and 10).
Attention is causal, so prompt tokens see none of that: the statistic of a prompt is the same in both, and the student
uses what the original's pass selected.

Where the data alone decides, all generated tokens keep the same neurons: their weights are copied once (3 D k values a
sparse layer), and generated tokens never compute the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError

from .data.batches import Batch
from .placement import device_of
from .selection import Selectors, fixed_neurons, keep_mask, select


class SharedModel(ABC):
    """A model that is its own teacher, for training: targets, the student's output, the student's parameters."""

    title: str  # of the training, in progress bars and errors

    def __init__(self, model: Any, method: Method):
        self.decoder, self.method, self.dtype = model.get_decoder(), method, model.dtype
        self.selections: dict[int, Tensor] = {}
        self.batch: Batch | None = None
        self.sparse = False

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, always in the same order."""

    def original(self, batch: Batch) -> Tensor:
        """M(x) of eq. 8: the original's last hidden state (after the final norm), [N, D], of the generated tokens."""
        self.sparse = False
        with torch.no_grad():
            return self._hidden(batch)

    def __call__(self, batch: Batch) -> Tensor:
        """M_student(x) of eq. 8, [N, D]; `batch` must be the one that went through `original` last."""
        assert batch is self.batch, "the original's pass over the same batch makes the selections"
        self.sparse = True
        return self._hidden(batch)

    def _hidden(self, batch: Batch) -> Tensor:
        self.batch = batch
        hidden = self.decoder(input_ids=batch.ids(), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[batch.rows().to(hidden.device)]


@dataclass(frozen=True)
class CoreBlock:
    """The FF block of the neurons that all generated tokens keep, k of F; its weights are a copy of their rows."""

    act: nn.Module
    gate: tuple[Tensor, Tensor | None]  # weight [k, D] and bias [k]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]  # weight [D, k] and bias [D]

    @classmethod
    def of(cls, block: Any, neurons: Tensor) -> CoreBlock:
        """`neurons` [k] int64 of a gated block."""
        gate, up = (
            (part.weight.detach()[neurons], None if part.bias is None else part.bias.detach()[neurons])
            for part in (block.gate_proj, block.up_proj)
        )
        bias = block.down_proj.bias
        down = block.down_proj.weight.detach()[:, neurons], None if bias is None else bias.detach()
        return cls(block.act_fn, gate, up, down)

    def __call__(self, x: Tensor) -> Tensor:
        """(act(x W_g) * (x W_1)) W_2 over these neurons, [N, D] -> [N, D]."""
        return F.linear(self.act(F.linear(x, *self.gate)) * F.linear(x, *self.up), *self.down)


class Student(SharedModel):
    """L [D, r], R [r, D] of each sparse layer, float32 parameters on their block's device, and the hooks that use them.

    They are rounded to the model's dtype at every use, as the adapter file rounds them: what is trained is what is
    served. They are float32 because a bfloat16 parameter does not move by a step below 1/256 of its size.
    """

    title = "end-to-end"

    def __init__(
        self,
        model: Any,
        blocks: Mapping[int, nn.Module],
        selectors: Selectors,
        left: Mapping[int, Tensor],
        right: Mapping[int, Tensor],
    ):
        super().__init__(model, next(iter(selectors.values())).method)
        self.selectors = selectors
        devices = {i: device_of(block) for i, block in blocks.items()}
        # Contiguous whether they come from a solver or a file, so that products are the same to the bit.
        self.left, self.right = (
            {
                i: nn.Parameter(
                    part[i].detach().to(devices[i], torch.float32).clone(memory_format=torch.contiguous_format)
                )
                for i in blocks
            }
            for part in (left, right)
        )
        self.handles: list[Any] = []
        self.replaced: list[Any] = []  # blocks with a forward of their own
        for i, block in blocks.items():
            neurons = fixed_neurons(selectors[i], block)
            if neurons is None:
                self.handles += self._hooks(i, block)
            else:
                self._replace(i, block, CoreBlock.of(block, neurons))

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for block in self.replaced:
            del block.forward  # its class's forward is back

    def parameters(self) -> list[nn.Parameter]:
        """L and R, layer by layer."""
        return [p for i in self.left for p in (self.left[i], self.right[i])]

    def _replace(self, layer: int, block: Any, core: CoreBlock) -> None:
        """Give the block a forward that runs generated tokens through the core alone."""
        original = block.forward

        def forward(x: Tensor) -> Tensor:
            if not self.sparse:
                return original(x)
            assert self.batch is not None
            flat, rows = x.flatten(0, 1), self.batch.rows().to(x.device)
            generated = torch.zeros(len(flat), dtype=torch.bool, device=x.device)
            generated[rows] = True
            rest = (~generated).nonzero()[:, 0]
            with torch.no_grad():  # L and R change nothing for prompt tokens
                dense = original(flat[rest])
            kept = flat[rows]
            y = core(kept) + self._low_rank(layer, kept)
            return torch.empty_like(flat).index_copy(0, rest, dense).index_copy(0, rows, y).view_as(x)

        block.forward = forward
        self.replaced.append(block)

    def _low_rank(self, layer: int, x: Tensor) -> Tensor:
        """x L R, [N, D] -> [N, D]."""
        return x @ self.left[layer].to(self.dtype) @ self.right[layer].to(self.dtype)

    def _hooks(self, layer: int, block: Any) -> list[Any]:
        selector = self.selectors[layer]
        seen: dict[str, Tensor] = {}

        def see_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["x"] = args[0]

        def see_activation(_: nn.Module, __: object, output: Tensor) -> None:
            seen["g"] = output

        def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            z, g = args[0], seen.get("g")
            assert self.batch is not None
            if not self.sparse:
                self.selections[layer] = select(selector, self.batch, g, z)
                return None
            batch = replace(self.batch, device=z.device)  # layers may be on several devices
            keep = torch.ones(z.shape[:2].numel(), z.shape[-1], dtype=torch.bool, device=z.device)
            keep[batch.rows()] = keep_mask(selector, batch, self.selections[layer], g)
            return (torch.where(keep.view_as(z), z, 0),)

        def correct(_: nn.Module, __: object, y: Tensor) -> Tensor | None:
            x = seen["x"]
            seen.clear()
            if not self.sparse:
                return None
            assert self.batch is not None
            rows = self.batch.rows().to(y.device)
            return y.flatten(0, 1).index_add(0, rows, self._low_rank(layer, x.flatten(0, 1)[rows])).view_as(y)

        handles = [
            block.register_forward_pre_hook(see_input),
            block.down_proj.register_forward_pre_hook(drop),
            block.register_forward_hook(correct),
        ]
        if self.method.name == "cats":
            handles.append(block.act_fn.register_forward_hook(see_activation))
        return handles


@contextmanager
def frozen(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Within it, the model's own weights have no gradients; with `gradient_checkpointing`, a layer's activations are
    recomputed in the backward pass instead of kept.

    Only the decoder layers themselves are in training mode, which turns checkpointing on; the modules inside them
    (dropout) stay in evaluation mode.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # else layers before the first L, R keep activations
        for layer in model.get_decoder().layers:
            layer.training = True
    try:
        yield
    finally:
        if gradient_checkpointing:
            model.gradient_checkpointing_disable()
            model.eval()
        for p in wanted:
            p.requires_grad_(True)


def check_gradient(gradient: Tensor, layer: int, batch: Batch) -> None:
    """Raise CapreseError for a gradient, or what was made of it, that is not finite."""
    if not torch.isfinite(gradient).all():
        raise CapreseError(
            f"gradient at layer {layer}",
            expected="finite values",
            found=f"NaN or Inf, samples of lines {[s.line for s in batch.samples]}",
            fix="use --dtype bfloat16 or float32",
        )
