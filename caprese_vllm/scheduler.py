"""Prefix caching that changes no result: vLLM's schedulers, which reuse only what a prompt would compute itself.

KV entries of tokens that ran sparse are never published, and a request that goes on generating after a preemption
reuses blocks of its prompt only: the same tokens in another request's prompt have other KV entries.

Where requests select for themselves, a prefix is reused only as far as its statistics reach: a request needs those of
its whole prompt, also of tokens that it finds in the KV cache. They are kept as pages (`pages.PageIndex`) of prefixes
that end
- at multiples of `statistics_page` tokens,
- at a prompt's last full block, where the next turn of a conversation, or another sample of the prompt, goes on,
- where a later prompt left the known one: plain vLLM would have reused blocks up to there, so the next one will too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from .pages import COMMANDS, Commands, PageIndex
from .settings import EngineSettings, switched_off

WORTH_WAITING = 64  # tokens that another request must be about to compute for one that needs them to wait


@dataclass
class _Prompt:
    """How much of a request's prompt its statistic covers.

    A round of reselection makes generated tokens the rest of a longer prompt.
    """

    off: bool
    length: int  # tokens, with those of rounds; a streaming-input session's prompt grows by tokens that ran sparse
    exact_values: bool  # a CATS prompt so short that its values are kept; a longer prompt cannot use its pages
    counted: int = 0  # tokens that the statistic covers once the scheduled steps have run
    selected: bool = False  # the prompt's last token is scheduled
    told: int = 0  # the length that the workers know
    interval: int = 0  # rho, generated tokens between two rounds; 0: none
    last_pages: list[Hashable] = field(default_factory=list)  # keys of pages that the last round left
    page: int | None = None  # the page that the statistic starts from, once the request is admitted
    junction: int = 0  # where plain vLLM's cache hit ends, beyond the last page


@dataclass
class _Leader:
    """A running request that will leave a page behind once it has computed `position` tokens."""

    request: Any
    position: int

    @property
    def on_its_way(self) -> bool:
        return self.request.status == RequestStatus.RUNNING and self.request.num_computed_tokens < self.position


class _PromptScheduler(Scheduler):
    """vLLM's scheduler that publishes and reuses blocks of prompts alone: enough where no request has a statistic."""

    exact_tokens = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        publish = coordinator.cache_blocks

        def publish_exact(request: Any, num_computed_tokens: int) -> None:
            """Publish only KV entries that dense rows wrote."""
            exact = num_computed_tokens if request.caprese.off else request.caprese.length
            publish(request, min(num_computed_tokens, exact))

        coordinator.cache_blocks = publish_exact

    def add_request(self, request: Any) -> None:
        length = request.num_prompt_tokens
        off = switched_off(request.sampling_params)
        request.caprese = _Prompt(off, length, length <= self.exact_tokens, told=length)
        super().add_request(request)

    def _get_local_prefix_cache_hit(self, request: Any, *limits: Any, **named_limits: Any) -> Any:
        """vLLM's hit, within the limits that vLLM 0.33 may pass, cut to the prompt of a request that was preempted."""
        found = super()._get_local_prefix_cache_hit(request, *limits, **named_limits)
        prompt: _Prompt = request.caprese
        if prompt.off or not prompt.selected or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return found
        _, hit, boundary, diverged = found
        return self._cut(request, min(hit, prompt.counted), boundary, diverged)

    def _cut(self, request: Any, position: int, boundary: int, diverged: bool) -> tuple[Any, int, int, bool]:
        """A hit of at most `position` tokens."""
        manager = self.kv_cache_manager
        groups, length, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, position)
        return manager.create_kv_cache_blocks(groups), length, boundary, diverged

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            prompt: _Prompt = request.caprese
            reached = min(request.num_computed_tokens + count, prompt.length)
            # A prompt that was preempted halfway is counted anew, a round is not.
            prompt.counted = max(prompt.counted, reached) if prompt.selected else reached
            prompt.selected |= prompt.counted == prompt.length
        super()._update_after_schedule(scheduler_output)


class StatisticsScheduler(_PromptScheduler):
    """With pages of statistics: for requests that select for themselves."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = EngineSettings.read(self.vllm_config)
        assert settings is not None, "`enable` chooses this class, and writes the settings"
        self.pages = PageIndex(settings.num_pages)
        self.page_tokens = -(-settings.page_tokens // self.block_size) * self.block_size
        self.exact_tokens = settings.exact_tokens
        self.leaders: dict[Hashable, _Leader] = {}

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.pages.begin_step()
        return super().schedule(*args, **kwargs)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return super()._handle_blocked_waiting_request(request) and not self._follows(request)

    def _follows(self, request: Any) -> bool:
        """Whether the request should wait for a running one that is about to compute the prefix it needs.

        So samples of one prompt that arrive together compute the prompt once.
        """
        reads = self.kv_cache_manager.prefix_cache_lookup_enabled(request)
        if not self.leaders or request.num_computed_tokens > 0 or not (reads and self._uses_pages(request)):
            return False
        for end in sorted({leader.position for leader in self.leaders.values()}, reverse=True):
            if WORTH_WAITING <= end < request.num_tokens:
                leader = self.leaders.get(self._key(request, end))
                if leader is not None and leader.on_its_way:
                    near = self._positions(end, end - WORTH_WAITING)  # a page there saves as much
                    return not any(self._key(request, position) in self.pages for position in near)
        return False

    def _get_local_prefix_cache_hit(self, request: Any, *limits: Any, **named_limits: Any) -> Any:
        """The hit, cut to the deepest page of this request's prefix."""
        prompt: _Prompt = request.caprese
        found = super()._get_local_prefix_cache_hit(request, *limits, **named_limits)
        # A request that was preempted while it generated keeps its selection.
        if prompt.off or prompt.selected or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return found
        _, hit, boundary, diverged = found
        prompt.page, prompt.junction = None, hit // self.hash_block_size * self.hash_block_size
        for position in self._known(request, hit):
            cut = self._cut(request, position, boundary, diverged)
            if cut[1] == position:  # a sliding window may have dropped blocks before this page
                prompt.page = self.pages.get(self._key(request, position))
                break
        else:
            position, cut = 0, (self.kv_cache_manager.empty_kv_cache_blocks, 0, boundary, diverged)
        self.leaders |= {
            self._key(request, end): _Leader(request, end) for end in self._ends(request) if end > position
        }
        return cut

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        commands = {}
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            prompt: _Prompt = request.caprese
            if prompt.off or prompt.counted == prompt.length:
                continue
            length = prompt.length if prompt.length > prompt.told else None
            command = Commands(prompt.page, self._reserve(request, request.num_computed_tokens + count), length)
            if command != Commands():
                commands[request_id] = command
            prompt.page, prompt.told = None, prompt.length
        setattr(scheduler_output, COMMANDS, commands)
        super()._update_after_schedule(scheduler_output)
        self.leaders = {key: leader for key, leader in self.leaders.items() if leader.on_its_way}

    def _reserve(self, request: Any, end: int) -> tuple[tuple[int, int], ...]:
        """Pages for the prefixes that are worth one and end in what the step adds to the statistic, up to `end`."""
        prompt: _Prompt = request.caprese
        begin = prompt.counted if prompt.selected else request.num_computed_tokens
        saves = []
        for position in self._ends(request) if self.kv_cache_manager.enable_caching else ():
            if begin < position <= end and (key := self._key(request, position)) not in self.pages:
                page = self.pages.reserve(key)
                if page is not None:
                    saves.append((position, page))
        return tuple(saves)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        done = super().reset_prefix_cache(*args, **kwargs)
        if done:
            self.pages.clear()
        return done

    def _uses_pages(self, request: Any) -> bool:
        prompt: _Prompt = request.caprese
        return not (prompt.off or prompt.selected) and self.kv_cache_manager.enable_caching

    def _ends(self, request: Any) -> list[int]:
        """Lengths of this request's prefixes that are worth a page, ascending."""
        length = request.caprese.length
        last = {(length - 1) // self.block_size * self.block_size, length // self.block_size * self.block_size}
        pages = range(self.page_tokens, length + 1, self.page_tokens)
        return sorted({*pages, *last, request.caprese.junction} - {0})

    def _known(self, request: Any, limit: int) -> Iterator[int]:
        """Lengths, at most `limit`, of this request's prefixes that have a page, deepest first."""
        return (position for position in self._positions(limit) if self._key(request, position) in self.pages)

    def _positions(self, limit: int, above: int = 0) -> range:
        """Multiples of a hashed block from `limit` down to above `above`."""
        size = self.hash_block_size
        return range(limit // size * size, above, -size)

    def _key(self, request: Any, position: int) -> Hashable:
        return request.caprese.exact_values, request.block_hashes[position // self.hash_block_size - 1]


class CoreScheduler(_PromptScheduler):
    """For selections that all requests share, and synchronous scheduling."""


class CoreAsyncScheduler(_PromptScheduler, AsyncScheduler):
    """For selections that all requests share, and asynchronous scheduling."""


class CapreseScheduler(StatisticsScheduler):
    """For requests' own selections, and synchronous scheduling."""


class CapreseAsyncScheduler(StatisticsScheduler, AsyncScheduler):
    """For requests' own selections, and asynchronous scheduling."""
