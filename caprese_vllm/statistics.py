"""Statistics of prompts on their way through one FF block, and the selections made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_kernels.reference import NUM_MAGNITUDES, CatsStatistic, griffin_count

from .ranks import Ranks
from .requests import PromptChunk


class Statistics:
    """GRIFFIN's s^2 [F] float32 or CATS's histogram [NUM_MAGNITUDES] int64 of each slot in mid-prompt.

    Under tensor parallelism they are of this rank's F neurons. GRIFFIN needs the tokens' norms over all ranks as they
    come; CATS the sum of all ranks' histograms (or all values) when a prompt ends.
    """

    def __init__(self, method: Method, packed: PackedFF, kernels: Backend, ranks: Ranks):
        self.method, self.packed, self.kernels, self.ranks = method, packed, kernels, ranks
        self._rows: dict[int, Tensor] = {}
        self._exact: dict[int, CatsStatistic] = {}  # float32 models: prompts short enough to keep the values themselves

    def forget(self, slot: int) -> None:
        self._rows.pop(slot, None)
        self._exact.pop(slot, None)

    def observe(self, chunks: list[PromptChunk], z: Tensor, gate_up: Tensor) -> tuple[list[int], Tensor | None]:
        """Add a step's prompt chunks; z [P, F] and gate_up [P, 2F] are of its dense rows.

        Returns the slots whose prompts ended and what they selected: masks [n, F] bool (GRIFFIN) or thresholds [n].
        """
        griffin = self.method.name == "griffin"
        gate = gate_up[:, : self.packed.num_neurons]
        added = chunks if griffin else [chunk for chunk in chunks if not self._add_exactly(chunk, gate)]
        ended = [chunk.slot for chunk in chunks if chunk.last]
        selected: dict[int, Tensor] = {}
        if added:
            table = self._add(added, z if griffin else gate, griffin)
            last = [i for i, chunk in enumerate(added) if chunk.last]
            if last:
                selections = self._select(table[last], griffin)
                selected = {added[i].slot: selection for i, selection in zip(last, selections, strict=True)}
            # Copies: a view would keep the whole step's table alive.
            self._rows |= {chunk.slot: row.clone() for chunk, row in zip(added, table, strict=True) if not chunk.last}
        for slot in ended:  # in the order of rows, as every rank does
            if slot not in selected:
                selected[slot] = self._exact_threshold(self._exact.pop(slot))
        return ended, torch.stack([selected[slot] for slot in ended]) if ended else None

    def _add(self, chunks: list[PromptChunk], values: Tensor, griffin: bool) -> Tensor:
        """The chunks' statistics with these chunks in them: one row a chunk."""
        width, dtype = (self.packed.num_neurons, torch.float32) if griffin else (NUM_MAGNITUDES, torch.int64)
        table = torch.zeros(len(chunks), width, dtype=dtype, device=values.device)
        offsets, rows = [0], []
        for i, chunk in enumerate(chunks):
            before = self._rows.pop(chunk.slot, None)  # also of a pass that a preemption cut short
            if not chunk.first:
                assert before is not None
                table[i] = before
            offsets += [chunk.begin, chunk.end]  # what lies between two chunks is of requests with Caprese off
            rows += [-1, i]
        at, where = torch.tensor(offsets, device=values.device), torch.tensor(rows, device=values.device)
        if griffin:
            norms = self.ranks.norms(self.kernels.griffin_norms(values)) if self.ranks.size > 1 else None
            self.kernels.griffin_observe(values, at, where, table, norms)
        else:
            self.kernels.cats_observe(values, self.packed.activation, at, where, table)
        return table

    def _select(self, statistics: Tensor, griffin: bool) -> Tensor:
        if griffin:
            return self.kernels.griffin_select(statistics, griffin_count(self.method.density, self.packed.num_neurons))
        return self.kernels.cats_threshold(self.ranks.counts(statistics), self.method.density)

    def _exact_threshold(self, statistic: CatsStatistic) -> Tensor:
        if self.ranks.size > 1:
            statistic.values = [self.ranks.gather(torch.cat(statistic.values)).flatten()]
        return statistic.threshold(self.method.density)

    def _add_exactly(self, chunk: PromptChunk, gate: Tensor) -> bool:
        if chunk.first:
            self._exact.pop(chunk.slot, None)
            num_values = chunk.prompt_len * self.packed.num_neurons * self.ranks.size
            statistic = CatsStatistic(num_values, gate.dtype)
            if statistic.exact:
                self._exact[chunk.slot] = statistic
        if chunk.slot not in self._exact:
            return False
        self._exact[chunk.slot].add(self.packed.act(gate[chunk.begin : chunk.end]))
        return True
