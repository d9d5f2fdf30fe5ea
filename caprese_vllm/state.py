"""What Caprese keeps for one engine in one process: the requests' slots and selections, the current step, counters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caprese_kernels.adapters import Adapters
from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.self_check import SelfCheck, check_block

from .counters import Counters, block_sums, merge_sums
from .ff import SparseFF, StepView
from .memory import MemoryNeeds
from .pages import COMMANDS, Commands
from .requests import RequestTable, Scheduled, Step
from .selections import BINS, RecentSelections, binned, find_named
from .statistics import ChunkPlan

STATE = "caprese"  # our key in vLLM's per-engine forward context


def state_of(vllm_config: Any) -> State | None:
    """The engine's state; None where Caprese is off, while another engine of this process may have it on."""
    return vllm_config.compilation_config.static_forward_context.get(STATE)


@dataclass
class State:
    """Everything that Caprese knows about one engine in this process.

    All of its tables have their size and address from start-up on, so that CUDA graphs can read them.
    """

    method: Method
    requests: RequestTable
    num_layers: int
    kernels: Backend
    built_in: Backend | None = None  # the kernels that are checked at start-up: those of an extension differ on purpose
    weights: str | None = None  # the adapter file
    digest: str | None = None  # its SHA-256 when the front end checked it
    start_up_check: bool = True
    tensor_parallel_size: int = 1
    show_selections: bool = False  # whether selections of finished requests are kept for a while
    graph_rows: int = 0  # the most rows of a full CUDA graph
    reselect_interval: int | None = None  # of requests that do not say; None: none selects anew, no statistic is kept
    needs: MemoryNeeds | None = None
    blocks: list[SparseFF] = field(default_factory=list)
    commands: Mapping[str, Commands] = field(default_factory=dict)  # the scheduler's, for the next step
    view: StepView | None = None  # of the current step; None: profiling or a dummy batch, all rows dense
    scheduled: int = 0  # generated tokens that the scheduler sent to sparse blocks
    rounds: int = 0  # of reselection

    def __post_init__(self) -> None:
        # GRIFFIN's selections [layers, slots, F] bool or CATS's thresholds [layers, slots] float32; see `allocate`.
        self.table = torch.empty(0)
        self.counters = Counters()
        self.recent = RecentSelections()
        # Where requests reselect, the statistics that these were made from: [layers, slots, F] float32 (GRIFFIN) or
        # [layers, slots, NUM_MAGNITUDES] int32 or int64 (CATS); else of no layer.
        self.statistics = torch.empty(0, self.requests.num_slots, 0)
        # Request key -> table[:, slot] and statistics[:, slot] of a slot that it had to give up.
        self.parked: dict[int, tuple[Tensor, Tensor]] = {}
        # Row of a decode batch -> slot, -1 for padding; what captured kernels read. int64 [graph_rows].
        self.decode_slots = torch.full((self.graph_rows,), -1, device=self.requests.device)
        # Generated tokens that the first block computed sparse. The device counts them, inside of CUDA graphs too: a
        # graph that replays dense blocks counts none.
        self.computed = torch.zeros((), dtype=torch.int64, device=self.requests.device)

    @property
    def step(self) -> Step | None:
        """The current step; None outside of a real or captured batch."""
        return None if self.view is None else self.view.step

    @property
    def measured_layer(self) -> int:
        """The middle one of the sparse layers: there the prompts' activation mass outside of the core is measured."""
        return self.method.layers[len(self.method.layers) // 2]

    @property
    def generated_tokens(self) -> int:
        """Tokens that ran sparse; in a pipeline stage without a sparse block, those that ran sparse in another one."""
        return int(self.computed) if self.blocks else self.scheduled

    def allocate(self) -> None:
        """Make the slot table once all blocks are there; each block gets its layer's view."""
        griffin, slots = self.method.name == "griffin", self.requests.num_slots
        neurons = max((block.num_neurons for block in self.blocks), default=0)  # a pipeline stage may have no block
        assert all(block.num_neurons == neurons for block in self.blocks), "FF blocks of one size"
        neurons = neurons if self.method.needs_statistic else 0  # nothing is a request's own
        shape = (len(self.blocks), slots, neurons) if griffin else (len(self.blocks), slots)
        dtype = torch.bool if griffin else torch.float32
        self.table = torch.zeros(shape, dtype=dtype, device=self.requests.device)
        for index, (block, selections) in enumerate(zip(self.blocks, self.table, strict=True)):
            block.index, block.selections = index, selections
        if self.reselect_interval is not None:
            first = self.blocks[0].statistics
            shape, dtype = (len(self.blocks), slots, first.width), first.kept_dtype
            self.statistics = torch.zeros(shape, dtype=dtype, device=self.requests.device)
            for block, kept in zip(self.blocks, self.statistics, strict=True):
                block.statistics.kept = kept

    def receive(self, commands: Mapping[str, Commands]) -> None:
        """The scheduler's commands for the next step: rounds of reselection begin before its batch is put together."""
        self.commands = commands
        for request_id, command in commands.items():
            if command.length is not None:
                self.requests.begin_round(request_id, command.length)

    def fill_adapters(self) -> None:
        """Once weights are loaded: L, R and priors of the adapter file into every block."""
        adapters = Adapters.load(self.weights) if self.weights else None
        if adapters is not None and self.digest is not None and adapters.digest != self.digest:
            raise CapreseError(
                f"adapter {self.weights}",
                expected="the file that start-up checked",
                found="another one in its place",
                fix="start again, and replace files only while nobody loads them",
            )
        for block in self.blocks:
            block.fill_adapter(adapters)
            if block.core is not None and block.layer == self.measured_layer and block.prompt_mass is None:
                block.prompt_mass = torch.zeros(2, dtype=torch.float64, device=self.requests.device)

    def warm_up(self) -> None:
        """Compile what takes a prompt's statistic: no dummy batch runs it, so the first user's prompt would wait."""
        if self.blocks and self.method.needs_statistic:
            self.blocks[0].warm_up()  # blocks of one size: the same kernels

    def check_kernels(self, all_blocks: bool = False) -> dict[int, SelfCheck]:
        """The first block's, or every block's, output against plain arithmetic on its weights, by layer."""
        assert self.built_in is not None
        blocks = self.blocks if all_blocks else self.blocks[:1]
        return {b.layer: check_block(self.built_in, b.method, b.packed, b.core, b.tail) for b in blocks}

    def begin(self, scheduled: Iterable[Scheduled]) -> None:
        """Before the forward pass of a real batch, eager or replayed: everything that the step changes outside of it.

        The batch's rows are the given requests' tokens, one request after another.
        """
        step = self.requests.begin(scheduled, self.commands)
        for key, slot in step.parked:
            self.parked[key] = self.table[:, slot].clone(), self.statistics[:, slot].clone()
        for key, slot in step.restored:
            self.table[:, slot], self.statistics[:, slot] = self.parked.pop(key)
        self.rounds += sum(chunk.round and chunk.last for chunk in step.chunks)
        self.scheduled += len(step.sparse_rows)
        self.counters.count(step)
        self._set_view(step, ChunkPlan.of(step.chunks, self.requests.device) if step.chunks else None)
        if self.can_replay(step):
            self.decode_slots[: step.num_rows] = step.sparse_slots
            self.decode_slots[step.num_rows :] = -1

    def can_replay(self, step: Step) -> bool:
        """Whether a full CUDA graph computes this step: it has generated tokens only."""
        return step.decode and step.num_rows <= self.graph_rows

    def begin_dummy_decode(self, num_rows: int) -> None:
        """Make the step that full CUDA graphs capture, and that a dummy batch replays: decoding, every row padding.

        It runs the kernels that decoding runs, on the buffer that `begin` will refill, and touches no slot.
        """
        if num_rows > self.graph_rows:
            raise RuntimeError(f"a full CUDA graph of {num_rows} rows, but room for {self.graph_rows} only")
        self.decode_slots.fill_(-1)
        none = self.decode_slots[:0]
        rows = torch.arange(num_rows, device=self.requests.device)
        self._set_view(Step(num_rows, [], rows, self.decode_slots[:num_rows], none, none), None)

    def end_step(self) -> None:
        """What runs until the next `begin` is profiling or a dummy batch: all of its rows are dense."""
        self.view = None

    def _set_view(self, step: Step, chunks: ChunkPlan | None) -> None:
        self.view = StepView(step, chunks, self.kernels, self.table, self.computed)

    def finish_request(self, request_id: str) -> None:
        """Free what a finished request holds: its slot, its parked selection, its statistics."""
        if self.show_selections and (selection := self._selection(request_id)) is not None:
            self.recent.add(request_id, selection.clone())
        key = self.requests.finish(request_id)
        if key is not None:
            self.parked.pop(key, None)
            for block in self.blocks:
                block.statistics.forget(key)

    def _selection(self, request_id: str | None) -> Tensor | None:
        """table[:, slot] of a live request; None without such a request, or while its prompt is not done."""
        if request_id is None or request_id not in self.requests.ids:
            return None
        key, slot = self.requests.place(request_id)
        if slot is not None:
            return self.table[:, slot]
        return self.parked[key][0] if key in self.parked else None

    def selections(self, name: str) -> dict[str, Any] | None:
        """This process's part of GET /caprese/selections/NAME (`merge_selections`).

        None for an unknown request, and for any where selections are not shown.

        GRIFFIN: for each layer, and each of its bins of neurons, the share that is in the core, and in the request's
        tail. CATS chooses neurons for each token, so a request has only its threshold. Where all requests share one
        selection, any name has it.
        """
        if not self.show_selections:
            return None
        selection = self._selection(find_named(self.requests.ids, name))
        selection = self.recent.find(name) if selection is None else selection
        if selection is None and self.method.needs_statistic:
            return None
        layers: dict[int, dict[str, Any]] = {}
        for block in self.blocks:
            own = None if selection is None or not self.method.needs_statistic else selection[block.index]
            if self.method.name == "griffin":
                bins = BINS // block.ranks.size
                shares = (binned(mask, bins) for mask in block.selected(own))
                layers[block.layer] = {"neurons": block.num_neurons, **dict(zip(("core", "tail"), shares, strict=True))}
            else:
                assert own is not None
                layers[block.layer] = {"threshold": float(own)}
        rank = self.blocks[0].ranks.rank if self.blocks else 0
        return {"rank": rank, "method": self.method.name, "layers": layers}

    def report(self) -> dict[str, Any]:
        """This process's part of what GET /caprese shows (`merge`).

        The share is of all FF weights of the model: blocks not replaced, or of other pipeline stages, count as read.
        """
        tokens = self.generated_tokens
        untouched = self.num_layers - len(self.blocks)
        masses = [block.prompt_mass for block in self.blocks if block.prompt_mass is not None]
        sums = block_sums(self.blocks, tokens)
        read = sums["ff_bytes_needed"] / sums["ff_bytes_dense"] if sums["ff_bytes_dense"] else 0.0  # of our blocks
        return {
            "enabled": True,
            "method": self.method.name,
            "density": self.method.density,
            "densities": None if self.method.densities is None else list(self.method.densities),
            "rank": self.method.rank,
            "score": self.method.score,
            "prior": self.method.prior,
            "core": self.method.core,
            "layers": list(self.method.layers),
            "kernel": self.kernels.NAME,
            "tensor_parallel_size": self.tensor_parallel_size,
            "live_requests": len(self.requests),
            "reselect_interval": self.reselect_interval,
            "reselections": self.rounds,
            "generated_tokens": tokens,
            "off_tokens": self.counters.off_tokens,
            "ff_weights_read": (untouched + read * len(self.blocks)) / self.num_layers if tokens else None,
            **sums,
            "statistics_pages": max((block.statistics.num_pages for block in self.blocks), default=0),
            "pages_written": self.counters.pages_written,
            "pages_read": self.counters.pages_read,
            "prompt_mass": masses[0].tolist() if masses else [0.0, 0.0],  # this rank's part: outside of the core, all
        }


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of the whole model from those of every rank, which saw the same requests.

    The ranks of one pipeline stage hold equal parts of its layers, so their savings are averaged; stages add theirs.
    """
    whole = dict(reports[0])
    whole["generated_tokens"] = min(report["generated_tokens"] for report in reports)
    if whole["generated_tokens"]:
        spared = sum(1 - report["ff_weights_read"] for report in reports) / whole["tensor_parallel_size"]
        whole["ff_weights_read"] = 1 - spared
    outside, total = (sum(masses) for masses in zip(*(report["prompt_mass"] for report in reports), strict=True))
    whole |= merge_sums(reports)
    whole["statistics_pages"] = max(report["statistics_pages"] for report in reports)
    whole["prompt_mass"] = [outside, total]
    whole["prompt_mass_outside_core"] = outside / total if total else None
    return whole


def reload_weights(original: Callable[..., Any], vllm_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap what loads weights again, all or some: it finds them in the order of checkpoints."""
    state: State | None = getattr(model, "caprese", None)
    if state is None:
        return original(vllm_config, model, *args, **kwargs)
    for block in state.blocks:
        block.restore_order()
    try:
        return original(vllm_config, model, *args, **kwargs)
    finally:
        state.fill_adapters()


def run_step(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap a runner's method that runs one step: hand over the scheduler's commands, and end the step in any case.

    What runs between two steps is a dummy batch.
    """
    state = state_of(self.vllm_config)
    if state is None:
        return original(self, *args, **kwargs)
    scheduler_output = args[0] if args else kwargs.get("scheduler_output")
    state.receive(getattr(scheduler_output, COMMANDS, {}))
    try:
        return original(self, *args, **kwargs)
    finally:
        state.end_step()
