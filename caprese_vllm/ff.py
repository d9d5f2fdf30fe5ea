"""The FF block inside vLLM: prompt rows run vLLM's own layers, generated rows the sparse block with L and R."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from caprese_kernels.adapters import Adapters
from caprese_kernels.backend import Backend, RowPlan
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import CoreFF, PackedFF
from caprese_kernels.reference import EXACT_VALUES, down_norms, griffin_count
from caprese_kernels.selection import LayerSelector

from .architectures import Block
from .ranks import Ranks
from .requests import PromptChunk, Step
from .statistics import ChunkPlan, Statistics, keeps_values


@dataclass
class StepView:
    """What the FF blocks need to know about one step: whose rows these are, the selections, and the kernels."""

    step: Step
    chunks: ChunkPlan | None  # of prompts; None: the step has none that still counts for a statistic
    kernels: Backend
    table: Tensor  # all blocks' selections, State.table
    computed: Tensor  # [] int64, generated tokens that ran sparse so far
    _row_plan: RowPlan | None = None

    def begin_sparse(self, index: int) -> None:
        """Count the step's generated tokens, once: in the first block."""
        if index == 0:
            self.computed += (self.step.sparse_slots >= 0).sum()

    def row_plan(self, index: int) -> RowPlan | None:
        """The rows of weights that block `index` needs; None: `griffin_ff` finds them itself.

        No selection changes in a step that only decodes, so the first block plans for all of them, in one launch. It
        does so each time that it runs: a CUDA graph must hold the launch too.
        """
        if not self.step.decode:
            return None
        if index == 0:
            self._row_plan = self.kernels.plan_layers(self.table, self.step.sparse_slots)
        return None if self._row_plan is None else self._row_plan[index]


class SparseFF:
    """One replaced FF block, or this rank's share of it: packed weights, statistics and selections, counters."""

    def __init__(self, block: Block, packed: PackedFF, ranks: Ranks, method: Method, statistics: Statistics):
        self.block, self.layer, self.method = block, block.layer, method
        self.packed, self.ranks, self.statistics = packed, ranks, statistics
        self.num_neurons = self.packed.num_neurons
        self.num_weights = packed.num_matrices * self.num_neurons * self.packed.hidden_size
        # Once weights are loaded (`fill_adapter`): where a core is, its neurons come last.
        self.core: CoreFF | None = None
        self.tail: PackedFF | None = packed  # None: every request keeps the core, and nothing else
        self._order: Tensor | None = None  # the neuron of a checkpoint that is in each place; None: the same
        self.index = 0  # among this process's blocks; `State.allocate` sets it,
        self.selections = torch.empty(0)  # and this layer's part of State.table: row s is slot s
        # float64 [2], in the block that measures how well the prior fits (`State.fill_adapters`): the mass of the
        # prompts' activations outside of the core, and all of it. A token's is 1 over all ranks.
        self.prompt_mass: Tensor | None = None
        self._neurons_kept = torch.zeros((), dtype=torch.int64, device=packed.up_plus.device)

    def run(self, x: Tensor, out: Tensor, view: StepView | None) -> None:
        """out[rows] = FF(x[rows]), this rank's part of it; x, out [T, D]. Without a view all rows are dense.

        Rows past the step's end are padding, and zero: a quantized layer that scales by the largest value of all rows
        must not meet what the memory held before.
        """
        if view is None:
            out.copy_(self.block.run(x)[0])
            return
        step = view.step
        if step.num_rows < len(out):
            out[step.num_rows :].zero_()
        if len(step.dense_rows):
            rows = _rows(step, step.dense_rows)
            out[rows] = self._prompt(x[rows], view)
        if len(step.off_rows):
            _write(out, step, step.off_rows, lambda rows, y: view.kernels.dense_ff(x[rows], self.packed, out=y))
        if len(step.sparse_rows):
            _write(out, step, step.sparse_rows, lambda rows, y: self._sparse(x[rows], view, y))

    def _prompt(self, x: Tensor, view: StepView) -> Tensor:
        chunks, measures = view.chunks, self.prompt_mass is not None
        # `gate` is [P, F] where a kernel computes, [P, 2F] from the model's own layers.
        y, z, gate = view.kernels.prompt_ff(x, self.packed, chunks is not None or measures) or self.block.run(x)
        if self.prompt_mass is not None and self.core is not None:
            assert z is not None
            mass = self.statistics.mass(z)
            self.prompt_mass += torch.stack([mass[: self.num_neurons - self.core.num_neurons].sum(), mass.sum()])
        if chunks is not None:
            assert z is not None
            assert gate is not None
            selections = self.statistics.observe(chunks, z, gate)
            if selections is not None:
                if self.core is not None:  # which no kernel gathers
                    selections[:, self.num_neurons - self.core.num_neurons :] = False
                self.selections[chunks.slots] = selections
        return y

    def warm_up(self) -> None:
        """Observe a prompt of zeros, and select by it; nothing is left behind.

        Of one token, but for CATS of as many as make it count: a float32 model keeps a shorter prompt's values instead.
        """
        packed = self.packed
        tokens = 1 if self.method.name == "griffin" else EXACT_VALUES // (self.num_neurons * self.ranks.size) + 1
        tokens = tokens if keeps_values(self.method, packed.down_plus.dtype) else 1
        gate_up = packed.down_plus.new_zeros(tokens, len(packed.gate_up_plus) - packed.rank)
        chunk = PromptChunk(key=-1, slot=0, length=tokens, begin=0, end=tokens, first=True, last=True)
        plan = ChunkPlan.of([chunk], gate_up.device)
        self.statistics.observe(plan, gate_up[:, : self.num_neurons].contiguous(), gate_up)

    def _sparse(self, x: Tensor, view: StepView, out: Tensor | None) -> Tensor:
        view.begin_sparse(self.index)
        slots = view.step.sparse_slots
        if self.method.name == "griffin":
            if self.tail is None:
                assert self.core is not None
                return view.kernels.core_ff(x, self.core, slots, out=out)
            plan = view.row_plan(self.index)
            own = view.kernels.griffin_ff(x, self.tail, self.selections, slots, row_plan=plan, out=out)
            return own if self.core is None else own.add_(view.kernels.core_ff(x, self.core, slots))
        return view.kernels.cats_ff(x, self.packed, self.selections, slots, out=out, kept=self._neurons_kept)[0]

    def neurons_kept(self, tokens: int) -> int:
        """Neurons that the `tokens` generated so far kept, in all. CATS counts them on the device."""
        if self.method.name == "griffin":
            return tokens * griffin_count(self.method.density, self.num_neurons)
        return int(self._neurons_kept)

    def weights_read(self, tokens: int, kept: int) -> int:
        """FF weights that the `tokens` generated so far needed: those of `kept` neurons, and L and R, once a token.

        With m matrices a block, GRIFFIN reads m k D + 2 r D a token. CATS reads every row of the gate (of W_1 where
        there is none) to know its neurons, and the other matrices' rows of the kept ones.
        """
        depth, matrices = self.packed.hidden_size, self.packed.num_matrices
        low_rank = 2 * self.packed.rank * depth * tokens
        if self.method.name == "griffin":
            return matrices * depth * kept + low_rank
        return depth * ((matrices - 1) * kept + self.num_neurons * tokens) + low_rank

    def fill_adapter(self, adapters: Adapters | None) -> None:
        """Once the weights are loaded: check that they still are in packed storage, and copy L and R beside them.

        `adapters` None: the plain baseline. Raises CapreseError for weights that the loader moved.
        """
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
        if adapters is not None and adapters.config.rank:
            left, right = adapters.left[self.layer], adapters.right[self.layer]
            for packed, whole in ((self.packed.up_plus, left.t()), (self.packed.down_plus, right)):
                share = self.ranks.share(whole, self.packed.rank)
                rows = packed[self.num_neurons :].zero_()  # r may not divide by the ranks: rows of zeros add nothing
                rows[: len(share)].copy_(share)
        self.arrange(None if adapters is None else adapters.prior.get(self.layer))

    def selected(self, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """(core, tail) of a GRIFFIN selection, bool [F] each, in the order of checkpoints.

        `own` [F] is a request's row of `selections`; None where all requests share the core and nothing else.
        """
        core = torch.zeros(self.num_neurons, dtype=torch.bool, device=self.packed.up_plus.device)
        tail = torch.zeros_like(core) if own is None else own.clone()
        if self.core is not None:
            core[self.num_neurons - self.core.num_neurons :] = True
        if self._order is not None:
            core, tail = (torch.zeros_like(mask).index_copy_(0, self._order, mask) for mask in (core, tail))
        return core, tail

    def restore_order(self) -> None:
        """Put the neurons where checkpoints have them, before weights are loaded again; `fill_adapter` follows."""
        if self._order is not None:
            self.packed.permute(torch.argsort(self._order))
            self._order = None

    def arrange(self, prior: Tensor | None) -> None:
        """Put the core's neurons last, in place, and divide the block into core and tail. `prior` [F] of all ranks."""
        method, packed = self.method, self.packed
        if prior is not None:
            prior = self.ranks.share(prior, self.num_neurons).to(packed.up_plus.device)
        scale = down_norms(packed) if method.weighted else None
        selector = LayerSelector(method, self.num_neurons, scale, prior if method.needs_prior else None)
        if selector.core_size:
            self._order = selector.order()
            packed.permute(self._order)
            selector = selector.permuted(self._order)
            self.core = packed.core(selector.core_size)
            self.tail = packed.without_low_rank() if selector.core_size < selector.kept else None
        if method.name == "cats":
            packed.scale, packed.native = selector.scale, None
        self.statistics.selector = selector


def _write(out: Tensor, step: Step, rows: Tensor, compute: Callable[[Tensor | slice, Tensor | None], Tensor]) -> None:
    """out[rows] = compute(rows, its place), which is None where the rows are scattered: then they are copied there."""
    where = _rows(step, rows)
    if isinstance(where, slice):
        place = out[where]
        y = compute(where, place)
        if y is not place:  # kernels of an extension may make a tensor of their own
            place.copy_(y)
    else:
        out[where] = compute(where, None)


def _rows(step: Step, rows: Tensor) -> Tensor | slice:
    """All of the step's rows as a view, some as indices."""
    return slice(0, step.num_rows) if len(rows) == step.num_rows else rows
