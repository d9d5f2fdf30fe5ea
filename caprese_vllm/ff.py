"""The FF block inside vLLM: prompt rows run vLLM's own layers, generated rows the sparse block with L and R."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from .pages import Commands
from .ranks import Ranks
from .requests import RequestTable, Scheduled, Step
from .statistics import Plan, Statistics

STATE = "caprese"  # our key in vLLM's per-engine forward context


@dataclass
class State:
    """Everything Caprese knows about one engine in this process.

    All of its tables have their size and address from start-up on, so that CUDA graphs can read them.
    """

    method: Method
    requests: RequestTable
    num_layers: int
    kernels: Backend
    num_pages: int = 0  # of statistics of cached prefixes
    max_tokens: int = 0  # of a prompt
    tensor_parallel_size: int = 1
    graph_rows: int = 0  # the most rows of a full CUDA graph
    blocks: list[SparseFF] = field(default_factory=list)
    commands: Mapping[str, Commands] = field(default_factory=dict)  # the scheduler's for the next step
    prompts: Plan | None = None  # of the step
    step: Step | None = None  # None: profiling or a dummy batch, all rows dense
    scheduled: int = 0  # generated tokens that are to run sparse

    def __post_init__(self) -> None:
        # GRIFFIN's selections [layers, slots, F] bool or CATS's thresholds [layers, slots] float32; see `allocate`.
        self.table = torch.empty(0)
        self.parked: dict[int, Tensor] = {}  # request key -> table[:, slot] of a slot that it had to give up
        # Row of a decode batch -> slot, -1 for padding; what captured kernels read. int64 [graph_rows].
        self.decode_slots = torch.full((self.graph_rows,), -1, device=self.requests.device)
        self._plan: Any = None
        # Generated tokens that the first block computed sparse. Counted by the device, inside of CUDA graphs too: one
        # that replays dense blocks counts none.
        self.computed = torch.zeros((), dtype=torch.int64, device=self.requests.device)

    @property
    def generated_tokens(self) -> int:
        """That ran sparse; of a pipeline stage without a sparse block, that did elsewhere."""
        return int(self.computed) if self.blocks else self.scheduled

    def allocate(self) -> None:
        """Make the slot table once all blocks are there; each block has its layer's view."""
        griffin, slots = self.method.name == "griffin", self.requests.num_slots
        neurons = max((block.num_neurons for block in self.blocks), default=0)  # a pipeline stage may have no block
        assert all(block.num_neurons == neurons for block in self.blocks), "FF blocks of one size"
        shape = (len(self.blocks), slots, neurons) if griffin else (len(self.blocks), slots)
        dtype = torch.bool if griffin else torch.float32
        self.table = torch.zeros(shape, dtype=dtype, device=self.requests.device)
        for block, selections in zip(self.blocks, self.table, strict=True):
            block.selections = selections

    def begin(self, scheduled: Iterable[Scheduled]) -> None:
        """Before the forward pass of a real batch, eager or replayed: all that the step changes outside of it.

        Its rows are the given requests' tokens, one request after another.
        """
        step = self.requests.begin(scheduled, self.commands)
        for key, slot in step.parked:
            self.parked[key] = self.table[:, slot].clone()
        for key, slot in step.restored:
            self.table[:, slot] = self.parked.pop(key)
        self.scheduled += len(step.sparse_rows)
        self.step = step
        self.prompts = Plan.of(step.chunks, self.requests.device) if step.chunks else None
        if self.can_replay(step):
            self.decode_slots[: step.num_rows] = step.sparse_slots
            self.decode_slots[step.num_rows :] = -1

    def can_replay(self, step: Step) -> bool:
        """Whether a full CUDA graph computes this step: it knows generated tokens only."""
        return step.decode and step.num_rows <= self.graph_rows

    def begin_dummy_decode(self, num_rows: int) -> None:
        """Make the step that full CUDA graphs capture, and that a dummy batch replays: decoding, every row padding.

        It runs the kernels that decoding runs, on the buffer that `begin` will refill, and touches no slot.
        """
        if num_rows > self.graph_rows:
            raise RuntimeError(f"a full CUDA graph of {num_rows} rows, where at most {self.graph_rows} were foreseen")
        self.decode_slots.fill_(-1)
        none = self.decode_slots[:0]
        rows = torch.arange(num_rows, device=self.requests.device)
        self.step = Step(num_rows, [], rows, self.decode_slots[:num_rows], none, none)

    def planned(self, block: SparseFF, slots: Tensor) -> dict[str, Any]:
        """What griffin_ff needs beside the block's selections: of kernels that plan, the plan.

        No selection changes in a step that only decodes, so its first block plans for all of them, in one launch.
        """
        assert self.step is not None
        if not self.step.decode or not hasattr(self.kernels, "plan_layers"):
            return {}
        if block is self.blocks[0]:
            self._plan = self.kernels.plan_layers(self.table, slots)
        return {} if self._plan is None else {"plan": self._plan[self.blocks.index(block)]}

    def finish(self, request_id: str) -> None:
        key = self.requests.finish(request_id)
        if key is not None:
            self.parked.pop(key, None)
            for block in self.blocks:
                block.statistics.forget(key)

    def report(self) -> dict[str, Any]:
        """This process's part of what GET /caprese shows (`merge`).

        The share is of all FF weights of the model: blocks not replaced, or of other pipeline stages, count as read.
        """
        tokens = self.generated_tokens
        untouched = self.num_layers - len(self.blocks)
        read = (
            sum(block.weights_read(tokens) / (block.num_weights * tokens) for block in self.blocks) if tokens else 0.0
        )
        return {
            "enabled": True,
            "method": self.method.name,
            "density": self.method.density,
            "rank": self.method.rank,
            "layers": list(self.method.layers),
            "kernel": self.kernels.NAME,
            "tensor_parallel_size": self.tensor_parallel_size,
            "live_requests": len(self.requests),
            "generated_tokens": tokens,
            "ff_weights_read": (untouched + read) / self.num_layers if tokens else None,
        }


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of the whole model from those of every rank, which saw the same requests.

    Ranks of one pipeline stage hold equal parts of its layers, so what they spared is averaged; stages add theirs.
    """
    whole = dict(reports[0])
    whole["generated_tokens"] = min(report["generated_tokens"] for report in reports)
    if whole["generated_tokens"]:
        spared = sum(1 - report["ff_weights_read"] for report in reports) / whole["tensor_parallel_size"]
        whole["ff_weights_read"] = 1 - spared
    return whole


class SparseFF:
    """One replaced FF block, or this rank's share of it: packed weights, statistics and selections, counters."""

    def __init__(self, block: Block, packed: PackedFF, ranks: Ranks, method: Method, state: State):
        self.block, self.layer, self.method, self.state = block, block.layer, method, state
        self.packed, self.ranks = packed, ranks
        self.num_neurons = self.packed.num_neurons
        self.num_weights = packed.num_matrices * self.num_neurons * self.packed.hidden_size
        self.statistics = Statistics(method, self.packed, state.kernels, ranks, state.num_pages, state.max_tokens)
        self.selections = torch.empty(0)  # this layer's part of State.table: row s is slot s
        self._neurons_kept = torch.zeros((), dtype=torch.int64, device=packed.up_plus.device)

    def run(self, x: Tensor, out: Tensor) -> None:
        """out[rows] = FF(x[rows]), this rank's part of it; rows past the step's end are padding, and zero.

        A quantized layer that scales by the largest value of all rows must not meet what lay there.
        """
        step = self.state.step
        if step is None:
            out.copy_(self.block.run(x)[0])
            return
        if step.num_rows < len(out):
            out[step.num_rows :].zero_()
        if len(step.dense_rows):
            rows = _rows(step, step.dense_rows)
            out[rows] = self._prompt(x[rows])
        if len(step.off_rows):
            rows = _rows(step, step.off_rows)
            out[rows] = self.state.kernels.dense_ff(x[rows], self.packed)
        if len(step.sparse_rows):
            rows = _rows(step, step.sparse_rows)
            out[rows] = self._sparse(x[rows], step.sparse_slots)

    def _prompt(self, x: Tensor) -> Tensor:
        y, z, gate_up = self.block.run(x)
        prompts = self.state.prompts
        if prompts is not None:
            selections = self.statistics.observe(prompts, z, gate_up)
            if selections is not None:
                self.selections[prompts.slots] = selections
        return y

    def _sparse(self, x: Tensor, slots: Tensor) -> Tensor:
        if self is self.state.blocks[0]:
            self.state.computed += (slots >= 0).sum()
        if self.method.name == "griffin":
            planned = self.state.planned(self, slots)
            return self.state.kernels.griffin_ff(x, self.packed, self.selections, slots, **planned)
        y, kept = self.state.kernels.cats_ff(x, self.packed, self.selections, slots)
        self._neurons_kept += kept.sum()
        return y

    def weights_read(self, tokens: int) -> int:
        """FF weights that the `tokens` generated so far needed: kept neurons, and L and R once a token.

        CATS needs every row of the gate (W_1 where there is none) to know its neurons, GRIFFIN only the kept ones.
        """
        depth, matrices = self.packed.hidden_size, self.packed.num_matrices
        low_rank = 2 * self.packed.rank * depth * tokens
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
            (None if self.ranks.rank else down.bias, self.packed.down_bias),
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
            for packed, whole in ((self.packed.up_plus, left.t()), (self.packed.down_plus, right)):
                share = self.ranks.share(whole, self.packed.rank)
                rows = packed[self.num_neurons :].zero_()  # r may not divide by the ranks: rows of zeros add nothing
                rows[: len(share)].copy_(share)


def _rows(step: Step, rows: Tensor) -> Tensor | slice:
    """All of the step's rows as a view, some as indices."""
    return slice(0, step.num_rows) if len(rows) == step.num_rows else rows
