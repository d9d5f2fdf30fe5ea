"""The FF block inside vLLM: prompt rows run vLLM's own layers, generated rows the sparse block with L and R."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caprese_kernels.adapters import Adapters
from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF
from caprese_kernels.reference import griffin_count

from .architectures import Block
from .requests import RequestTable, Step
from .statistics import Statistics

STATE = "caprese"  # our key in vLLM's per-engine forward context


@dataclass
class State:
    """Everything Caprese knows about one engine in this process."""

    method: Method
    requests: RequestTable
    num_layers: int
    kernels: Backend
    blocks: list[SparseFF] = field(default_factory=list)
    step: Step | None = None  # None: profiling or a dummy batch, all rows dense

    def begin(self, step: Step) -> None:
        for block in self.blocks:
            block.reserve(self.requests.num_slots)
        self.step = step

    def finish(self, request_id: str) -> None:
        slot = self.requests.finish(request_id)
        if slot is not None:
            for block in self.blocks:
                block.statistics.forget(slot)

    def report(self) -> dict[str, Any]:
        """What GET /caprese shows. The share is of all FF weights of the model, in replaced blocks or not."""
        tokens = self.blocks[0].generated_tokens
        read = sum(block.weights_read() for block in self.blocks)
        total = self.num_layers * self.blocks[0].num_weights * tokens
        untouched = (self.num_layers - len(self.blocks)) * self.blocks[0].num_weights * tokens
        return {
            "enabled": True,
            "method": self.method.name,
            "density": self.method.density,
            "rank": self.method.rank,
            "layers": list(self.method.layers),
            "kernel": self.kernels.NAME,
            "live_requests": len(self.requests),
            "generated_tokens": tokens,
            "ff_weights_read": (untouched + read) / total if tokens else None,
        }


class SparseFF:
    """One replaced FF block: packed weights, per-request statistics and selections, counters."""

    def __init__(self, block: Block, packed: PackedFF, method: Method, state: State):
        self.block, self.layer, self.method, self.state = block, block.layer, method, state
        self.packed = packed
        self.num_neurons = self.packed.num_neurons
        self.num_weights = packed.num_matrices * self.num_neurons * self.packed.hidden_size
        self.statistics = Statistics(method, self.packed, state.kernels)
        # Row s is slot s: GRIFFIN's selection [slots, F] bool, or CATS's threshold [slots] float32.
        griffin, device = method.name == "griffin", self.packed.up_plus.device
        self.selections = torch.zeros(
            (0, self.num_neurons) if griffin else 0, dtype=torch.bool if griffin else torch.float32, device=device
        )
        self.generated_tokens = 0
        self._neurons_kept = torch.zeros((), dtype=torch.int64, device=device)

    def run(self, x: Tensor, out: Tensor) -> None:
        """out[rows] = FF(x[rows]); rows past the step's end are padding and are left as they are."""
        step = self.state.step
        if step is None:
            out.copy_(self.block.run(x)[0])
            return
        if len(step.dense_rows):
            rows = _rows(step, step.dense_rows)
            out[rows] = self._prompt(x[rows], step)
        if len(step.off_rows):
            rows = _rows(step, step.off_rows)
            out[rows] = self.state.kernels.dense_ff(x[rows], self.packed)
        if len(step.sparse_rows):
            rows = _rows(step, step.sparse_rows)
            out[rows] = self._sparse(x[rows], step.sparse_slots)

    def _prompt(self, x: Tensor, step: Step) -> Tensor:
        y, z, gate_up = self.block.run(x)
        ended, selections = self.statistics.observe(step.chunks, z, gate_up)
        if selections is not None:
            self.selections[ended] = selections
        return y

    def _sparse(self, x: Tensor, slots: Tensor) -> Tensor:
        self.generated_tokens += len(slots)
        if self.method.name == "griffin":
            return self.state.kernels.griffin_ff(x, self.packed, self.selections, slots)
        y, kept = self.state.kernels.cats_ff(x, self.packed, self.selections, slots)
        self._neurons_kept += kept.sum()
        return y

    def reserve(self, num_slots: int) -> None:
        """Make room for slots; tables double, so that requests that come one by one copy little."""
        if num_slots > len(self.selections):
            size = max(num_slots, 2 * len(self.selections))
            more = self.selections.new_zeros(size, *self.selections.shape[1:])
            more[: len(self.selections)] = self.selections
            self.selections = more

    def weights_read(self) -> int:
        """FF weights that the generated tokens so far needed: kept neurons, and L and R once a token.

        CATS needs every row of the gate (W_1 where there is none) to know its neurons, GRIFFIN only the kept ones.
        """
        depth, matrices, tokens = self.packed.hidden_size, self.packed.num_matrices, self.generated_tokens
        low_rank = 2 * self.method.rank * depth * tokens
        if self.method.name == "griffin":
            return matrices * depth * tokens * griffin_count(self.method.density, self.num_neurons) + low_rank
        return depth * ((matrices - 1) * int(self._neurons_kept) + self.num_neurons * tokens) + low_rank

    def fill_adapter(self, adapters: Adapters | None) -> None:
        """Once weights are loaded: check that they still lie in packed storage, and copy L and R beside them."""
        up, down = self.block.up, self.block.down
        views = (
            (up.weight, self.packed.gate_up_plus),
            (down.weight, self.packed.down_plus),
            (up.bias, self.packed.gate_up_bias),
            (down.bias, self.packed.down_bias),
        )
        for weight, packed in views:
            if weight is not None and (packed is None or weight.data_ptr() != packed.data_ptr()):
                raise CapreseError(
                    f"FF block of layer {self.layer}",
                    expected="its weights in packed storage after loading",
                    found="weights that the loader moved",
                    fix="use the default --load-format",
                )
        if adapters is not None:
            left, right = adapters.left[self.layer], adapters.right[self.layer]
            self.packed.up_plus[self.num_neurons :].copy_(left.t())
            self.packed.down_plus[self.num_neurons :].copy_(right)


def _rows(step: Step, rows: Tensor) -> Tensor | slice:
    """All of the step's rows as a view, some as indices."""
    return slice(0, step.num_rows) if len(rows) == step.num_rows else rows
