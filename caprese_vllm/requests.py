"""Which row of a batch belongs to which request, and what that row may do: no vLLM in here.

A token is a *prompt token* if its index in the request is below the prompt's length, else a
*generated token*. That alone decides its path, so chunked prefill, mixed batches, preemption
(prompt and generated tokens recomputed together) and one-token prompts need no cases of their own.

A round of reselection makes generated tokens prompt tokens: the length that decides grows to the round's end, and the
tokens up to there run, count and select as the rest of a longer prompt would.
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
    slot: int  # for the selection and its statistic, -1 in a prompt that goes on
    length: int  # of the prompt; in a round, of the text up to the round's end
    begin: int
    end: int
    first: bool  # its statistic starts from nothing, or from the page `load`
    last: bool  # ends the prompt or the round: select afterwards
    load: int | None = None  # page of the cached prefix before this chunk
    saves: tuple[tuple[int, int], ...] = ()  # (entry of dense_rows, page that takes the statistic before that entry)
    round: bool = False  # its statistic goes on from the one that the last selection was made from

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
class _Moves:
    """Which selections change places in a step."""

    batch: set[str]  # its requests
    parked: list[tuple[int, int]] = field(default_factory=list)
    restored: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Request:
    key: int
    length: int  # of its prompt, or of the text up to the end of its last round
    slot: int | None = None  # of its selection; None: it has none yet, or it is parked
    seen: int = 0  # tokens that the statistic holds, of the first `length`
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
        moves = _Moves({one.request_id for one in scheduled})
        chunks: list[PromptChunk] = []
        sparse_rows: list[int] = []
        sparse_slots: list[int] = []
        dense_rows: list[int] = []
        off_rows: list[int] = []
        row = 0
        for request_id, prompt_len, start, count, dense in scheduled:
            boundary = row + min(max(self.dense_length(request_id, prompt_len) - start, 0), count)
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
            request = self._requests.get(request_id) or self._add(request_id, prompt_len)
            if boundary > row and request.seen < request.length:
                pages = commands.get(request_id, Commands())
                chunks += self._chunk(request_id, request, start, boundary - row, begin, pages, moves)
            if boundary < row + count:
                if not request.selected:
                    raise RuntimeError(f"request {request_id} generates, but its prompt was never seen whole")
                slot = self._slot(request_id, request, moves)
                sparse_rows.extend(range(boundary, row + count))
                sparse_slots.extend([slot] * (row + count - boundary))
            row += count
        rows, slots = self._tensor(sparse_rows), self._tensor(sparse_slots)
        prompts = self._tensor(dense_rows)
        return Step(row, chunks, rows, slots, prompts, self._tensor(off_rows), moves.parked, moves.restored)

    def dense_length(self, request_id: str, prompt_len: int) -> int:
        """How many of the request's first tokens run dense: its prompt, and what rounds have made exact."""
        request = self._requests.get(request_id)
        return prompt_len if request is None else max(prompt_len, request.length)

    def begin_round(self, request_id: str, length: int) -> None:
        """From the next step on, the request's first `length` tokens run dense, and count."""
        self._requests[request_id].length = length

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

    def _add(self, request_id: str, prompt_len: int) -> _Request:
        request = self._requests[request_id] = _Request(self._created, prompt_len)
        self._created += 1
        return request

    def _slot(self, request_id: str, request: _Request, moves: _Moves) -> int:
        """The request's slot; if it has none, a free one, or that of the longest holder that is not in the batch."""
        if request.slot is not None:
            return request.slot
        if not self._free:
            absent = (slot for slot, holder in self._holders.items() if holder not in moves.batch)
            slot = next(absent, None)
            if slot is None:
                raise RuntimeError(f"more than {self.num_slots} requests in one batch")
            loser = self._requests[self._holders.pop(slot)]
            loser.slot = None
            moves.parked.append((loser.key, slot))
            self._free.append(slot)
        request.slot = self._free.pop()
        self._holders[request.slot] = request_id
        if request.selected:
            moves.restored.append((request.key, request.slot))
        return request.slot

    def _chunk(
        self, request_id: str, request: _Request, start: int, count: int, begin: int, pages: Commands, moves: _Moves
    ) -> list[PromptChunk]:
        """The part of the dense tokens [start, start + count) that the statistic does not hold yet: one chunk, or none.

        Entry `begin` of dense_rows is token `start`. A prompt that was preempted halfway starts its statistic again; a
        round that was goes on, and counts no token twice.
        """
        again = request.selected
        first = not again and (start == 0 or pages.load is not None)
        if first:
            request.seen = start
        if start > request.seen or (start < request.seen and not again):
            raise RuntimeError(f"request {request_id}: prompt tokens {request.seen} to {start} were skipped")
        end = min(start + count, request.length)
        if end <= request.seen:
            return []
        entries = begin + request.seen - start, begin + end - start
        request.seen = end
        last = end == request.length
        slot = self._slot(request_id, request, moves) if last or again else -1
        request.selected |= last
        saves = tuple((begin + length - start, page) for length, page in pages.saves)
        return [PromptChunk(request.key, slot, request.length, *entries, first, last, pages.load, saves, again)]

    def _tensor(self, values: list[int]) -> Tensor:
        return index_tensor(values, self.device)


def index_tensor(values: list[int], device: torch.device) -> Tensor:
    """int64, without waiting for the device, nor for what it still does with an earlier step's tensors."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
