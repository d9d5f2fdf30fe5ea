"""Statistics of prompts on their way through one FF block, and the selections made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_kernels.reference import EXACT_VALUES, NUM_MAGNITUDES, CatsStatistic, griffin_count

from .ranks import Ranks
from .requests import PromptChunk


def page_dtype(method: Method, num_neurons: int, max_tokens: int) -> torch.dtype:
    """What a page of `max_tokens` tokens at most is kept in: s^2 as it is, counts in 32 bits where they fit."""
    if method.name == "griffin":
        return torch.float32
    return torch.int32 if max_tokens * num_neurons < 2**31 else torch.int64


def page_nbytes(method: Method, num_neurons: int, max_tokens: int, model_dtype: torch.dtype) -> int:
    """Bytes of one page, all layers; of a float32 model under CATS with the values that it may keep."""
    width = num_neurons if method.name == "griffin" else NUM_MAGNITUDES
    values = 4 * EXACT_VALUES if keeps_values(method, model_dtype) else 0
    return len(method.layers) * (width * page_dtype(method, num_neurons, max_tokens).itemsize + values)


def keeps_values(method: Method, model_dtype: torch.dtype) -> bool:
    """Whether prompts of up to EXACT_VALUES magnitudes keep them (CatsStatistic.exact)."""
    return method.name == "cats" and model_dtype == torch.float32


class Statistics:
    """GRIFFIN's s^2 [F] float32 or CATS's histogram [NUM_MAGNITUDES] int64 of each request in mid-prompt, by its key.

    Under tensor parallelism they are of this rank's F neurons. GRIFFIN needs the tokens' norms over all ranks as they
    come; CATS the sum of all ranks' histograms (or all values) when a prompt ends.

    `num_pages` of them are kept for cached prefixes (`pages`) of up to `max_tokens` tokens. Float32 models keep the
    values themselves of prompts short enough (CatsStatistic); so do their pages.
    """

    def __init__(
        self, method: Method, packed: PackedFF, kernels: Backend, ranks: Ranks, num_pages: int = 0, max_tokens: int = 0
    ):
        self.method, self.packed, self.kernels, self.ranks = method, packed, kernels, ranks
        self.griffin = method.name == "griffin"
        self._width = packed.num_neurons if self.griffin else NUM_MAGNITUDES
        self._dtype = torch.float32 if self.griffin else torch.int64
        kept = page_dtype(method, packed.num_neurons, max_tokens)
        self._pages = torch.empty(num_pages, self._width, dtype=kept, device=packed.up_plus.device)
        self._rows: dict[int, Tensor] = {}
        self._exact: dict[int, CatsStatistic] = {}
        self._exact_pages: dict[int, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return self._pages.nbytes

    def forget(self, key: int) -> None:
        self._rows.pop(key, None)
        self._exact.pop(key, None)

    def observe(self, chunks: list[PromptChunk], z: Tensor, gate_up: Tensor) -> tuple[list[int], Tensor | None]:
        """Add a step's prompt chunks; z [P, F] and gate_up [P, 2F] are of its dense rows.

        Returns the slots whose prompts ended and what they selected: masks [n, F] bool (GRIFFIN) or thresholds [n].
        """
        gate = gate_up[:, : self.packed.num_neurons]
        added = chunks if self.griffin else [chunk for chunk in chunks if not self._add_exactly(chunk, gate)]
        ended = [chunk for chunk in chunks if chunk.last]
        selected: dict[int, Tensor] = {}
        if added:
            table = self._add(added, z if self.griffin else gate)
            last = [i for i, chunk in enumerate(added) if chunk.last]
            if last:
                selections = self._select(table[last])
                selected = {added[i].key: selection for i, selection in zip(last, selections, strict=True)}
            # Copies: a view would keep the whole step's table alive.
            self._rows |= {chunk.key: row.clone() for chunk, row in zip(added, table, strict=True) if not chunk.last}
        for key in (chunk.key for chunk in ended):  # in the order of rows, as every rank does
            if key not in selected:
                selected[key] = self._exact_threshold(self._exact.pop(key))
        rows = torch.stack([selected[chunk.key] for chunk in ended]) if ended else None
        return [chunk.slot for chunk in ended], rows

    def _add(self, chunks: list[PromptChunk], values: Tensor) -> Tensor:
        """The chunks' statistics with these chunks in them: one row a chunk.

        A chunk is counted in parts, cut where a prefix ends that leaves a page behind, and the parts are summed in
        order: a prompt that begins with that page sums what a prompt that computes all of it sums.
        """
        parts = [_parts(chunk) for chunk in chunks]
        table = torch.zeros(sum(map(len, parts)), self._width, dtype=self._dtype, device=values.device)
        offsets, rows = [0], []
        ends = []  # each chunk's last row
        row = 0
        for chunk, own in zip(chunks, parts, strict=True):
            before = self._rows.pop(chunk.key, None)  # also of a pass that a preemption cut short
            if chunk.load is not None:
                table[row] = self._pages[chunk.load]
            elif not chunk.first:
                assert before is not None
                table[row] = before
            for begin, end, _ in own:
                offsets += [begin, end]  # what lies between two chunks is of requests with Caprese off
                rows += [-1, row]
                row += 1
            ends.append(row - 1)
        at, where = torch.tensor(offsets, device=values.device), torch.tensor(rows, device=values.device)
        if self.griffin:
            norms = self.ranks.norms(self.kernels.griffin_norms(values)) if self.ranks.size > 1 else None
            self.kernels.griffin_observe(values, at, where, table, norms)
        else:
            self.kernels.cats_observe(values, self.packed.activation, at, where, table)
        for last, own in zip(ends, parts, strict=True):
            for row, (_, _, page) in enumerate(own, last + 1 - len(own)):
                if page is not None:
                    self._pages[page] = table[row]
                if row < last:
                    table[row + 1] += table[row]
        return table[ends]

    def _select(self, statistics: Tensor) -> Tensor:
        if self.griffin:
            return self.kernels.griffin_select(statistics, griffin_count(self.method.density, self.packed.num_neurons))
        return self.kernels.cats_threshold(self.ranks.counts(statistics), self.method.density)

    def _exact_threshold(self, statistic: CatsStatistic) -> Tensor:
        if self.ranks.size > 1:
            statistic.values = [self.ranks.gather(torch.cat(statistic.values)).flatten()]
        return statistic.threshold(self.method.density)

    def _add_exactly(self, chunk: PromptChunk, gate: Tensor) -> bool:
        if chunk.first:
            self._exact.pop(chunk.key, None)
            num_values = chunk.prompt_len * self.packed.num_neurons * self.ranks.size
            statistic = CatsStatistic(num_values, gate.dtype)
            if statistic.exact:
                self._exact[chunk.key] = statistic
                if chunk.load is not None:
                    statistic.values = list(self._exact_pages[chunk.load])
        if chunk.key not in self._exact:
            return False
        for begin, end, page in _parts(chunk):
            self._exact[chunk.key].add(self.packed.act(gate[begin:end]))
            if page is not None:
                self._exact_pages[page] = list(self._exact[chunk.key].values)
        return True


def _parts(chunk: PromptChunk) -> list[tuple[int, int, int | None]]:
    """(begin, end, page that takes the statistic then) of the chunk's entries of dense_rows."""
    ends: list[tuple[int, int | None]] = list(chunk.saves)
    if not ends or ends[-1][0] < chunk.end:
        ends.append((chunk.end, None))
    return [(begin, end, page) for begin, (end, page) in zip([chunk.begin, *(e for e, _ in ends)], ends, strict=False)]
