"""The sparse model with L and R, as serving runs it. It shares every weight with the original: one copy in memory.

Both are the same transformers model. Hooks on its FF blocks leave the original alone, or make it the student: prompt
tokens run the full block, generated ones only the neurons that their prompt chose, plus x L R (paper, eq. 9 and 10).
Attention is causal, so prompt tokens see none of that: the statistic of a prompt is the same in both, and the student
uses what the original's pass selected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from caprese_kernels.config import Method

from .data.batches import Batch
from .placement import device_of
from .selection import keep_mask, select


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
        method: Method,
        left: Mapping[int, Tensor],
        right: Mapping[int, Tensor],
    ):
        super().__init__(model, method)
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
        self.handles = [handle for i, block in blocks.items() for handle in self._hooks(i, block)]

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def parameters(self) -> list[nn.Parameter]:
        """L and R, layer by layer."""
        return [p for i in self.left for p in (self.left[i], self.right[i])]

    def _hooks(self, layer: int, block: Any) -> list[Any]:
        seen: dict[str, Tensor] = {}

        def see_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["x"] = args[0]

        def see_activation(_: nn.Module, __: object, output: Tensor) -> None:
            seen["g"] = output

        def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            z, g = args[0], seen.get("g")
            assert self.batch is not None
            if not self.sparse:
                self.selections[layer] = select(self.method, self.batch, g, z)
                return None
            batch = replace(self.batch, device=z.device)  # layers may be on several devices
            keep = torch.ones(z.shape[:2].numel(), z.shape[-1], dtype=torch.bool, device=z.device)
            keep[batch.rows()] = keep_mask(self.method, batch, self.selections[layer], g)
            return (torch.where(keep.view_as(z), z, 0),)

        def correct(_: nn.Module, __: object, y: Tensor) -> Tensor | None:
            x = seen["x"]
            seen.clear()
            if not self.sparse:
                return None
            assert self.batch is not None
            rows = self.batch.rows().to(y.device)
            low = x.flatten(0, 1)[rows] @ self.left[layer].to(self.dtype) @ self.right[layer].to(self.dtype)
            return y.flatten(0, 1).index_add(0, rows, low).view_as(y)

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
