"""Statistics of prompts at one FF block, and the selections made from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from caprese_kernels.backend import Backend
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_kernels.reference import EXACT_VALUES, NUM_MAGNITUDES, CatsStatistic, magnitude_bins
from caprese_kernels.selection import LayerSelector

from .ranks import Ranks
from .requests import PromptChunk, index_tensor


def page_dtype(method: Method, num_neurons: int, max_tokens: int) -> torch.dtype:
    """The dtype of a page of up to `max_tokens` tokens: float32 for s^2; for counts int32 if they fit, else int64."""
    if method.name == "griffin":
        return torch.float32
    return torch.int32 if max_tokens * num_neurons < 2**31 else torch.int64


def page_width(method: Method, num_neurons: int) -> int:
    """Values of a page in one layer."""
    return num_neurons if method.name == "griffin" else NUM_MAGNITUDES


def page_nbytes(method: Method, num_neurons: int, max_tokens: int, model_dtype: torch.dtype) -> int:
    """Bytes of one page in all layers, including the values that CATS may keep in a float32 model."""
    width = page_width(method, num_neurons)
    values = 4 * EXACT_VALUES if keeps_values(method, model_dtype) else 0
    return len(method.layers) * (width * page_dtype(method, num_neurons, max_tokens).itemsize + values)


def keeps_values(method: Method, model_dtype: torch.dtype) -> bool:
    """Whether prompts of up to EXACT_VALUES magnitudes keep them (CatsStatistic.exact)."""
    return method.name == "cats" and model_dtype == torch.float32


@dataclass
class Round:
    """At most one part of each chunk: entries [offsets[2i], offsets[2i + 1]) of dense_rows add to row rows[2i + 1].

    offsets [2n + 1] int64 and rows [2n] int64 as the kernels' `observe` take them; a row of -1 skips the entries
    between two parts, which belong to other chunks.
    """

    offsets: Tensor
    rows: Tensor
    saved_rows: Tensor  # rows whose statistic is saved as a page after this round
    saved_pages: Tensor


@dataclass
class ChunkPlan:
    """A step's prompt chunks as index tensors, made once for all layers, so that no layer waits for the device.

    A chunk is cut where a prefix ends that leaves a page behind, and its parts follow each other in rounds. Every part
    goes on from the sum before it, whether that comes from a page, an earlier chunk or an earlier round: kernels that
    add token by token give a prompt's sum the same bits, however it was cut.
    """

    chunks: list[PromptChunk]
    rounds: list[Round]
    loaded_rows: Tensor  # chunks that begin with a page
    loaded_pages: Tensor
    last_rows: Tensor  # chunks that end their prompt or round,
    slots: Tensor  # and where their selections go
    round_rows: Tensor  # chunks of rounds,
    round_slots: Tensor  # and the slots of the statistics that they go on from
    kept_rows: Tensor  # both kinds,
    kept_slots: Tensor  # and the slots that keep their statistics
    unfinished: list[int]  # keys of the others,
    unfinished_rows: Tensor  # and their rows

    @classmethod
    def of(cls, chunks: list[PromptChunk], device: torch.device) -> ChunkPlan:
        def tensor(values: Iterable[int]) -> Tensor:
            return index_tensor(list(values), device)

        rounds = []
        for parts in zip_longest(*(chunk.parts() for chunk in chunks)):
            offsets, rows, saved = [0], [], []
            for row, part in enumerate(parts):
                if part is not None:
                    begin, end, page = part
                    offsets += [begin, end]
                    rows += [-1, row]
                    saved += [] if page is None else [(row, page)]
            saves = (tensor(row for row, _ in saved), tensor(page for _, page in saved))
            rounds.append(Round(tensor(offsets), tensor(rows), *saves))
        loaded = [(row, chunk.load) for row, chunk in enumerate(chunks) if chunk.load is not None]
        again = [(row, chunk.slot) for row, chunk in enumerate(chunks) if chunk.round]
        kept = [(row, chunk.slot) for row, chunk in enumerate(chunks) if chunk.round or chunk.last]
        rest = [(row, chunk.key) for row, chunk in enumerate(chunks) if not (chunk.round or chunk.last)]
        return cls(
            chunks,
            rounds,
            tensor(row for row, _ in loaded),
            tensor(page for _, page in loaded),
            tensor(row for row, chunk in enumerate(chunks) if chunk.last),
            tensor(chunk.slot for chunk in chunks if chunk.last),
            tensor(row for row, _ in again),
            tensor(slot for _, slot in again),
            tensor(row for row, _ in kept),
            tensor(slot for _, slot in kept),
            [key for _, key in rest],
            tensor(row for row, _ in rest),
        )


class Statistics:
    """GRIFFIN's s^2 [F] float32 or CATS's histogram [NUM_MAGNITUDES] int64 of each unfinished prompt, by request key.

    Under tensor parallelism they cover this rank's F neurons. GRIFFIN needs each token's norm over all ranks when the
    token is observed; CATS the sum of all ranks' histograms (or all values) when a prompt ends.

    `num_pages` of them are kept for cached prefixes (`pages`) of up to `max_tokens` tokens. Float32 models keep the
    values themselves of prompts short enough (CatsStatistic); so do their pages.

    Where requests reselect, `kept` [slots, ...] has the statistic behind every slot's selection (`State.allocate`).
    """

    def __init__(
        self, method: Method, packed: PackedFF, kernels: Backend, ranks: Ranks, num_pages: int = 0, max_tokens: int = 0
    ):
        self.method, self.packed, self.kernels, self.ranks = method, packed, kernels, ranks
        self.griffin = method.name == "griffin"
        self.width = page_width(method, packed.num_neurons)
        self._dtype = torch.float32 if self.griffin else torch.int64
        kept = page_dtype(method, packed.num_neurons, max_tokens)
        self._pages = torch.empty(num_pages, self.width, dtype=kept, device=packed.up_plus.device)
        # Scales and priors come with the weights (`SparseFF.fill_adapter`).
        self.selector = LayerSelector(Method(method.name, method.density, method.layers, 0), packed.num_neurons)
        self.kept: Tensor | None = None  # None: no request reselects
        self._rows: dict[int, Tensor] = {}
        self._exact: dict[int, CatsStatistic] = {}
        self._exact_pages: dict[int, list[Tensor]] = {}

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of `kept`: as of pages, which hold statistics of as many tokens."""
        return self._pages.dtype

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self._pages.nbytes

    def forget(self, key: int) -> None:
        """Drop the statistic of a finished request."""
        self._rows.pop(key, None)
        self._exact.pop(key, None)

    def observe(self, plan: ChunkPlan, z: Tensor, gate_up: Tensor) -> Tensor | None:
        """Add a step's prompt chunks; z [P, F] and gate_up [P, 2F] (or [P, F]) are of its dense rows.

        Returns what the prompts that ended selected, in the order of plan.slots: masks [n, F] bool (GRIFFIN) or
        thresholds [n] float32 (CATS); None if none ended.
        """
        gate = gate_up[:, : self.packed.num_neurons]
        if self.griffin or not keeps_values(self.method, gate.dtype):
            return self._observe(plan, z if self.griffin else gate)
        counted = ChunkPlan.of([chunk for chunk in plan.chunks if not self._add_exactly(chunk, gate)], gate.device)
        thresholds = self._observe(counted, gate)
        ended: Iterator[Tensor] = iter([] if thresholds is None else thresholds)
        last = [chunk for chunk in plan.chunks if chunk.last]  # in the order of rows, as every rank does
        selected = [
            self._exact_threshold(self._exact[chunk.key]) if chunk.key in self._exact else next(ended) for chunk in last
        ]
        if self.kept is None:
            for chunk in last:
                self._exact.pop(chunk.key, None)
        return torch.stack(selected) if selected else None

    def _observe(self, plan: ChunkPlan, values: Tensor) -> Tensor | None:
        """By statistics of a fixed size: one row of a table a chunk, in rounds, between which pages are saved."""
        table = torch.zeros(len(plan.chunks), self.width, dtype=self._dtype, device=values.device)
        if len(plan.loaded_rows):
            table[plan.loaded_rows] = self._pages[plan.loaded_pages].to(self._dtype)
        for row, chunk in enumerate(plan.chunks):
            before = self._rows.pop(chunk.key, None)  # also of a pass that a preemption cut short
            if not (chunk.first or chunk.round):
                assert before is not None
                table[row].copy_(before)
        if len(plan.round_rows):
            assert self.kept is not None
            table[plan.round_rows] = self.kept[plan.round_slots].to(self._dtype)
        scale, norms = self.selector.scale, self._norms(values)  # a rank's collective comes before any round
        for part in plan.rounds:
            if self.griffin:
                self.kernels.griffin_observe(values, part.offsets, part.rows, table, norms, scale)
            else:
                self.kernels.cats_observe(values, self.packed.activation, part.offsets, part.rows, table, scale)
            if len(part.saved_rows):
                self._pages[part.saved_pages] = table[part.saved_rows].to(self._pages.dtype)
        if self.kept is not None and len(plan.kept_rows):
            self.kept[plan.kept_slots] = table[plan.kept_rows].to(self.kept.dtype)
        if plan.unfinished:
            # A copy: views of the whole table would keep it alive.
            self._rows |= zip(plan.unfinished, table[plan.unfinished_rows], strict=True)
        return self._select(table[plan.last_rows]) if len(plan.last_rows) else None

    def mass(self, z: Tensor) -> Tensor:
        """s^2 [F] float32 of all tokens of z [P, F] together, of which nothing is kept. A collective, as `observe`."""
        total = torch.zeros(1, self.width, dtype=torch.float32, device=z.device)
        offsets, rows = (index_tensor(values, z.device) for values in ([0, len(z)], [0]))
        self.kernels.griffin_observe(z, offsets, rows, total, self._norms(z), self.selector.scale)
        return total[0]

    def _norms(self, z: Tensor) -> Tensor | None:
        """Each token's norm over all ranks, where this rank's z are not all."""
        if not self.griffin or self.ranks.size == 1:
            return None
        return self.ranks.norms(self.kernels.griffin_norms(z, self.selector.scale))

    def _select(self, statistics: Tensor) -> Tensor:
        if self.griffin:
            return self.selector.select(statistics, self.kernels)
        return self.kernels.cats_threshold(self.ranks.counts(statistics), self.method.density)

    def _exact_threshold(self, statistic: CatsStatistic) -> Tensor:
        if self.ranks.size > 1:
            statistic = replace(statistic, values=[self.ranks.gather(torch.cat(statistic.values)).flatten()])
        return statistic.threshold(self.method.density)

    def _num_values(self, chunk: PromptChunk) -> int:
        return chunk.length * self.packed.num_neurons * self.ranks.size

    def _add_exactly(self, chunk: PromptChunk, gate: Tensor) -> bool:
        if chunk.first:
            self._exact.pop(chunk.key, None)
            statistic = CatsStatistic(self._num_values(chunk), gate.dtype, self.selector.scale)
            if statistic.exact:
                self._exact[chunk.key] = statistic
                if chunk.load is not None:
                    statistic.values = list(self._exact_pages[chunk.load])
        if chunk.round and chunk.key in self._exact:
            self._exact[chunk.key].num_values = self._num_values(chunk)
            if not self._exact[chunk.key].exact:  # the text outgrew it: counts from now on
                assert self.kept is not None
                bins = magnitude_bins(torch.cat(self._exact.pop(chunk.key).values))
                self.kept[chunk.slot] = torch.bincount(bins, minlength=NUM_MAGNITUDES).to(self.kept.dtype)
        if chunk.key not in self._exact:
            return False
        for begin, end, page in chunk.parts():
            self._exact[chunk.key].add(self.packed.act(gate[begin:end]))
            if page is not None:
                self._exact_pages[page] = list(self._exact[chunk.key].values)
        return True
