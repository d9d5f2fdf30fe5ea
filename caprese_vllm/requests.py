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

    slot: int
    prompt_len: int
    begin: int
    end: int
    first: bool  # its statistic starts from nothing, or from the page `load`
    last: bool  # ends the prompt: select afterwards
    load: int | None = None  # page of the cached prefix before this chunk
    saves: tuple[
        tuple[int, int], ...
    ] = ()  # (entry of dense_rows, page): the statistic before that entry goes to that page


@dataclass
class Step:
    """One batch; rows from num_rows on are padding."""

    num_rows: int
    chunks: list[PromptChunk]  # of requests without a selection; in row order
    sparse_rows: Tensor  # [S] int64, rows that hold generated tokens
    sparse_slots: Tensor  # [S] int64, the slot of each
    dense_rows: Tensor  # [P] int64, rows of prompt tokens
    off_rows: Tensor  # [O] int64, rows of generated tokens of requests with Caprese off


@dataclass
class _Request:
    slot: int
    seen: int = 0  # prompt tokens that the statistic holds
    selected: bool = False


@dataclass
class RequestTable:
    """Slots of live requests. A slot, with its selection, is kept from the first token to the end, preempted or not."""

    device: torch.device
    num_slots: int = 0  # ever used: the size that slot tables need
    _requests: dict[str, _Request] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, scheduled: Iterable[Scheduled], commands: Mapping[str, Commands] = MappingProxyType({})) -> Step:
        """Plan the step whose rows are the given requests' tokens, one request after another.

        `commands` are the scheduler's, for requests whose statistic begins with a page or leaves some behind.
        """
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
            request = self._requests.get(request_id) or self._add(request_id)
            if boundary > row and not request.selected:
                pages = commands.get(request_id, Commands())
                chunks.append(self._chunk(request_id, request, prompt_len, start, begin, len(dense_rows), pages))
            if boundary < row + count:
                if not request.selected:
                    raise RuntimeError(f"request {request_id} generates, but its prompt was never seen whole")
                sparse_rows.extend(range(boundary, row + count))
                sparse_slots.extend([request.slot] * (row + count - boundary))
            row += count
        groups = (sparse_rows, sparse_slots, dense_rows, off_rows)
        return Step(row, chunks, *map(self._tensor, groups))

    def finish(self, request_id: str) -> int | None:
        """Free the request's slot and return it; None for a request that never ran."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        self._free.append(request.slot)
        return request.slot

    def _add(self, request_id: str) -> _Request:
        if not self._free:
            self._free.append(self.num_slots)
            self.num_slots += 1
        request = self._requests[request_id] = _Request(self._free.pop())
        return request

    def _chunk(
        self, request_id: str, request: _Request, prompt_len: int, start: int, begin: int, end: int, pages: Commands
    ) -> PromptChunk:
        first = start == 0 or pages.load is not None  # also after a preemption in mid-prompt
        if first:
            request.seen = start
        if start != request.seen:
            raise RuntimeError(f"request {request_id}: prompt tokens {request.seen} to {start} were skipped")
        request.seen = start + end - begin
        request.selected = request.seen == prompt_len
        saves = tuple((begin + length - start, page) for length, page in pages.saves)
        return PromptChunk(request.slot, prompt_len, begin, end, first, request.selected, pages.load, saves)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
