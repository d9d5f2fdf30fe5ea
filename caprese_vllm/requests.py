"""Which row of a batch belongs to which request, and what that row may do: no vLLM in here.

A token is a *prompt token* if its index in the request is below the prompt's length, else a
*generated token*. That alone decides its path, so chunked prefill, mixed batches, preemption
(prompt and generated tokens recomputed together) and one-token prompts need no cases of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .pages import Commands


class Scheduled(NamedTuple):
    """What one request does in one step: `num_tokens` tokens from index `start` on."""

    request_id: str
    prompt_len: int
    start: int
    num_tokens: int
    dense: bool = False  # the client switched Caprese off for this request


class PromptChunk(NamedTuple):
    """Consecutive prompt tokens of one request: entries [begin, end) of the step's dense_rows."""

    key: int  # of its request, for the request's life
    slot: int  # for the selection, -1 unless last
    prompt_len: int
    begin: int
    end: int
    first: bool  # its statistic starts from nothing, or from the page `load`
    last: bool  # ends the prompt: select afterwards
    load: int | None = None  # page of the cached prefix before this chunk
    saves: tuple[tuple[int, int], ...] = ()  # (entry of dense_rows, page that takes the statistic before that entry)

    def parts(self) -> list[tuple[int, int, int | None]]:
        """(begin, end, page that takes the statistic then), in order, of its entries of dense_rows."""
        ends: list[tuple[int, int | None]] = list(self.saves)
        if not ends or ends[-1][0] < self.end:
            ends.append((self.end, None))
        begins = [self.begin, *(end for end, _ in ends)]
        return [(begin, end, page) for begin, (end, page) in zip(begins, ends, strict=False)]


@dataclass
class Step:
    """One batch; rows from num_rows on are padding."""

    num_rows: int
    chunks: list[PromptChunk]  # of requests without a selection; in row order
    sparse_rows: Tensor  # [S] int64, rows that hold generated tokens
    sparse_slots: Tensor  # [S] int64, the slot of each
    dense_rows: Tensor  # [P] int64, rows of prompt tokens
    off_rows: Tensor  # [O] int64, rows of generated tokens of requests with Caprese off
    parked: list[tuple[int, int]] = field(default_factory=list)  # (key, slot): selections to put aside, first
    restored: list[tuple[int, int]] = field(default_factory=list)  # (key, slot): and those to bring back, then

    @property
    def decode(self) -> bool:
        """Generated tokens alone: no prompt, no request with Caprese off."""
        return len(self.sparse_rows) == self.num_rows


@dataclass
class _Request:
    key: int
    slot: int | None = None  # of its selection; None: it has none yet, or it is parked
    seen: int = 0  # prompt tokens that the statistic holds
    selected: bool = False


@dataclass
class RequestTable:
    """Live requests, and which of `num_slots` slots holds whose selection.

    A request takes a slot when its prompt ends and keeps it, preempted or not, until it is finished or another request
    needs the slot: then the selection of one that is not in the batch is parked, and restored when its request is
    scheduled again. So `num_slots` requests a batch suffice, however many are alive. Where no request selects, all are
    in slot 0, which holds nothing.
    """

    device: torch.device
    num_slots: int
    selects: bool = True  # False: no request has a selection of its own, and no prompt is followed
    _requests: dict[str, _Request] = field(default_factory=dict)
    _holders: dict[int, str] = field(default_factory=dict)  # slot -> request, in the order in which they took it
    _created: int = 0

    def __post_init__(self) -> None:
        self._free = list(reversed(range(self.num_slots)))

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, scheduled: Iterable[Scheduled], commands: Mapping[str, Commands] = MappingProxyType({})) -> Step:
        """Plan the step whose rows are the given requests' tokens, one request after another.

        `commands` are the scheduler's, for requests whose statistic begins with a page or leaves some behind.
        """
        scheduled = list(scheduled)
        parked: list[tuple[int, int]] = []
        restored: list[tuple[int, int]] = []
        chunks: list[PromptChunk] = []
        sparse_rows: list[int] = []
        sparse_slots: list[int] = []
        dense_rows: list[int] = []
        off_rows: list[int] = []
        row = 0
        for request_id, prompt_len, start, count, dense in scheduled:
            boundary = row + min(max(prompt_len - start, 0), count)
            begin = len(dense_rows)
            dense_rows.extend(range(row, boundary))
            if dense:
                off_rows.extend(range(boundary, row + count))
                row += count
                continue
            if not self.selects:
                sparse_rows.extend(range(boundary, row + count))
                sparse_slots.extend([0] * (row + count - boundary))
                row += count
                continue
            request = self._requests.get(request_id) or self._add(request_id)
            if boundary > row and not request.selected:
                pages = commands.get(request_id, Commands())
                first = start == 0 or pages.load is not None  # also after a preemption in mid-prompt
                self._see(request_id, request, prompt_len, start, boundary - row, first)
                last = request.selected
                into = self._take(request_id, request, scheduled, parked) if last else -1
                saves = tuple((begin + length - start, page) for length, page in pages.saves)
                ends = (begin, len(dense_rows))
                chunks.append(PromptChunk(request.key, into, prompt_len, *ends, first, last, pages.load, saves))
            if boundary < row + count:
                if not request.selected:
                    raise RuntimeError(f"request {request_id} generates, but its prompt was never seen whole")
                slot = request.slot
                if slot is None:
                    slot = self._take(request_id, request, scheduled, parked)
                    restored.append((request.key, slot))
                sparse_rows.extend(range(boundary, row + count))
                sparse_slots.extend([slot] * (row + count - boundary))
            row += count
        rows, slots = self._tensor(sparse_rows), self._tensor(sparse_slots)
        return Step(row, chunks, rows, slots, self._tensor(dense_rows), self._tensor(off_rows), parked, restored)

    @property
    def ids(self) -> Iterable[str]:
        """The live requests."""
        return self._requests

    def place(self, request_id: str) -> tuple[int, int | None]:
        """A live request's key, and the slot of its selection: None while it has none, or is parked."""
        request = self._requests[request_id]
        return request.key, request.slot

    @property
    def slots_in_use(self) -> list[int]:
        """The slots that hold a live request's selection."""
        return sorted(self._holders)

    def finish(self, request_id: str) -> int | None:
        """Forget the request, free its slot, and return its key; None for a request that never ran."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if request.slot is not None:
            self._free.append(request.slot)
            del self._holders[request.slot]
        return request.key

    def _add(self, request_id: str) -> _Request:
        request = self._requests[request_id] = _Request(self._created)
        self._created += 1
        return request

    def _take(self, request_id: str, request: _Request, batch: list[Scheduled], parked: list[tuple[int, int]]) -> int:
        """A slot for the request; if none is free, that of the longest holder that is not in the batch."""
        if not self._free:
            present = {one.request_id for one in batch}
            absent = (slot for slot, holder in self._holders.items() if holder not in present)
            slot = next(absent, None)
            if slot is None:
                raise RuntimeError(f"more than {self.num_slots} requests in one batch")
            loser = self._requests[self._holders.pop(slot)]
            loser.slot = None
            parked.append((loser.key, slot))
            self._free.append(slot)
        request.slot = self._free.pop()
        self._holders[request.slot] = request_id
        return request.slot

    def _see(self, request_id: str, request: _Request, prompt_len: int, start: int, count: int, first: bool) -> None:
        """Note the prompt tokens [start, start + count); the statistic of those before comes from a page if `first`."""
        if first:
            request.seen = start
        if start != request.seen:
            raise RuntimeError(f"request {request_id}: prompt tokens {request.seen} to {start} were skipped")
        request.seen = start + count
        request.selected = request.seen == prompt_len

    def _tensor(self, values: list[int]) -> Tensor:
        return index_tensor(values, self.device)


def index_tensor(values: list[int], device: torch.device) -> Tensor:
    """int64, without waiting for the device, nor for what it still does with an earlier step's tensors."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
