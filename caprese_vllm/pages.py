"""Which page of statistics belongs to which prefix of tokens: no vLLM in here.

A page holds what a prefix's tokens left behind for choosing (GRIFFIN's s^2 or CATS's histogram, of every replaced
layer). Statistics add up, so a prompt whose prefix is cached begins with that prefix's page and adds the rest. The
index lives with the scheduler; the pages themselves lie on the workers, and every step tells them what to do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

COMMANDS = "caprese_pages"  # attribute of SchedulerOutput: request id -> Commands


class Commands(NamedTuple):
    """What one request's prompt tokens of one step do with pages, and whether a round of reselection begins."""

    load: int | None = None  # begin with this page's statistic instead of nothing
    saves: tuple[tuple[int, int], ...] = ()  # (length of a prefix, the page that takes its statistic), ascending
    length: int | None = None  # a round: from this step on, so many of the request's first tokens run dense, and count


@dataclass
class PageIndex:
    """Keys of prefixes to pages, least recently used first.

    What a step reserves is filled when that step runs; steps run in order, so the next one may load it. A page that
    this step touched is not given away in it: the workers load before they save.
    """

    num_pages: int

    def __post_init__(self) -> None:
        self.clear()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._pages

    def begin_step(self) -> None:
        self._touched.clear()

    def get(self, key: Hashable) -> int | None:
        """The page of `key`, now the most recently used; None without one."""
        if key not in self._pages:
            return None
        self._pages.move_to_end(key)
        self._touched.add(key)
        return self._pages[key]

    def reserve(self, key: Hashable) -> int | None:
        """A page for the new `key`, the least recently used one's if none is free; None if this step touched all."""
        assert key not in self._pages
        if self._free:
            page = self._free.pop()
        elif self._pages and (oldest := next(iter(self._pages))) not in self._touched:
            page = self._pages.pop(oldest)
        else:
            return None
        self._pages[key] = page
        self._touched.add(key)
        return page

    def drop(self, key: Hashable) -> None:
        """Free the page of `key`, if there is one that this step did not touch."""
        if key in self._pages and key not in self._touched:
            self._free.append(self._pages.pop(key))

    def clear(self) -> None:
        """Forget all pages: the weights changed, or the user resets the prefix cache."""
        self._pages: OrderedDict[Hashable, int] = OrderedDict()
        self._touched: set[Hashable] = set()
        self._free = list(reversed(range(self.num_pages)))
