"""Statistics of prompts on their way through one FF block, and the selections made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_kernels.reference import NUM_MAGNITUDES, CatsStatistic, griffin_count

from .requests import PromptChunk


class Statistics:
    """GRIFFIN's s^2 [F] float32 or CATS's histogram [NUM_MAGNITUDES] int64 of each request in mid-prompt, by key."""

    def __init__(self, method: Method, packed: PackedFF, kernels: Backend):
        self.method, self.packed, self.kernels = method, packed, kernels
        self._rows: dict[int, Tensor] = {}
        self._exact: dict[int, CatsStatistic] = {}  # float32 models: prompts short enough to keep the values themselves

    def forget(self, key: int) -> None:
        self._rows.pop(key, None)
        self._exact.pop(key, None)

    def observe(self, chunks: list[PromptChunk], z: Tensor, gate_up: Tensor) -> tuple[list[int], Tensor | None]:
        """Add a step's prompt chunks; z [P, F] and gate_up [P, 2F] are of its dense rows.

        Returns the slots whose prompts ended and what they selected: masks [n, F] bool (GRIFFIN) or thresholds [n].
        """
        griffin = self.method.name == "griffin"
        gate = gate_up[:, : self.packed.num_neurons]
        added = chunks if griffin else [chunk for chunk in chunks if not self._add_exactly(chunk, gate)]
        ended = [chunk for chunk in chunks if chunk.last]
        selected: dict[int, Tensor] = {}
        if added:
            table = self._add(added, z if griffin else gate, griffin)
            last = [i for i, chunk in enumerate(added) if chunk.last]
            if last:
                selections = self._select(table[last], griffin)
                selected = {added[i].key: selection for i, selection in zip(last, selections, strict=True)}
            # Copies: a view would keep the whole step's table alive.
            self._rows |= {chunk.key: row.clone() for chunk, row in zip(added, table, strict=True) if not chunk.last}
        for key in {chunk.key for chunk in ended} - set(selected):
            selected[key] = self._exact.pop(key).threshold(self.method.density)
        rows = torch.stack([selected[chunk.key] for chunk in ended]) if ended else None
        return [chunk.slot for chunk in ended], rows

    def _add(self, chunks: list[PromptChunk], values: Tensor, griffin: bool) -> Tensor:
        """The chunks' statistics with these chunks in them: one row a chunk."""
        width, dtype = (self.packed.num_neurons, torch.float32) if griffin else (NUM_MAGNITUDES, torch.int64)
        table = torch.zeros(len(chunks), width, dtype=dtype, device=values.device)
        offsets, rows = [0], []
        for i, chunk in enumerate(chunks):
            before = self._rows.pop(chunk.key, None)  # also of a pass that a preemption cut short
            if not chunk.first:
                assert before is not None
                table[i] = before
            offsets += [chunk.begin, chunk.end]  # what lies between two chunks is of requests with Caprese off
            rows += [-1, i]
        at, where = torch.tensor(offsets, device=values.device), torch.tensor(rows, device=values.device)
        if griffin:
            self.kernels.griffin_observe(values, at, where, table)
        else:
            self.kernels.cats_observe(values, self.packed.activation, at, where, table)
        return table

    def _select(self, statistics: Tensor, griffin: bool) -> Tensor:
        if griffin:
            return self.kernels.griffin_select(statistics, griffin_count(self.method.density, self.packed.num_neurons))
        return self.kernels.cats_threshold(statistics, self.method.density)

    def _add_exactly(self, chunk: PromptChunk, gate: Tensor) -> bool:
        if chunk.first:
            self._exact.pop(chunk.key, None)
            statistic = CatsStatistic(chunk.prompt_len * self.packed.num_neurons, gate.dtype)
            if statistic.exact:
                self._exact[chunk.key] = statistic
        if chunk.key not in self._exact:
            return False
        self._exact[chunk.key].add(self.packed.act(gate[chunk.begin : chunk.end]))
        return True
