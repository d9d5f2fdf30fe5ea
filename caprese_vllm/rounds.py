"""Reselection in vLLM's schedulers: every rho sparse tokens, a request's newest tokens run dense and it selects anew.

A round is the rest of a longer prompt. When the last rho + 1 tokens of a request are generated ones since its prompt or
its last round (rho that ran sparse, and the newest, which ran not at all), the request goes back to the first of
them: vLLM then schedules them as it schedules a chunk of a prompt, cut by the budget if need be, and samples the next
token from the last. The workers overwrite their KV entries, count them, and select.

Which token a round follows is the request's own matter. When it runs is not: requests that are due wait for their turn,
so that few rounds share a step and the others' tokens do not wait for all of them. Having waited once, they stay apart.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import round_end

from .scheduler import StatisticsScheduler
from .settings import EngineSettings, reselect_interval

# Tokens of rounds in one step, unless a single round has more: about what a GPU computes in the time in which it reads
# the weights, so that a step with rounds takes about as long as one without.
ROUND_TOKENS = 256


class _RoundsScheduler(StatisticsScheduler):
    """With rounds of reselection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = EngineSettings.read(self.vllm_config)
        assert settings is not None
        assert settings.reselect_interval is not None, "`enable` chooses this class"
        self.default_interval = settings.reselect_interval
        for group in self.kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            if isinstance(spec, SlidingWindowSpec) and spec.sliding_window < self.max_model_len:
                raise CapreseError(
                    "reselect_interval",
                    expected="KV blocks that stay: a round computes tokens again, and attends to those before",
                    found=f"layers that drop what is behind a window of {spec.sliding_window} tokens",
                    fix="leave it out",
                )

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        if not request.resumable:  # the prompt of a streaming-input session would grow between rounds
            request.caprese.interval = reselect_interval(request.sampling_params, self.default_interval)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_rounds()
        return super().schedule(*args, **kwargs)

    def _begin_rounds(self) -> None:
        """Begin rounds, in the order of arrival, as far as they fit into this step; the other due requests wait.

        N running requests need N tokens of rounds a step on average, one for each token that they generate. So no
        request waits for long: rho + 1 steps if all are due at once, and rarely afterwards.
        """
        limit = max(ROUND_TOKENS, len(self.running))
        spent = sum(one.caprese.length - one.caprese.counted for one in self.running if one.caprese.selected)
        for request in self.running:
            if not self._due(request):
                continue
            if spent < limit and self._tokens_arrived(request):
                request.num_computed_tokens = request.caprese.length
                self._begin_round(request)
                spent += request.caprese.length - request.caprese.counted
            else:
                request.next_decode_eligible_step = self.current_step + 2  # after the step that is about to be made

    def _due(self, request: Any) -> bool:
        """Whether the request's next token comes from a round that has not begun."""
        prompt = request.caprese
        if not prompt.interval or prompt.counted < prompt.length:
            return False
        expected = request.num_output_placeholders
        length = request.num_tokens + expected
        ends = request.num_output_tokens + expected >= request.max_tokens or length >= self.max_model_len
        return length == round_end(prompt.length, prompt.interval) and not ends

    def _begin_round(self, request: Any) -> None:
        prompt = request.caprese
        prompt.length = request.num_tokens
        prompt.exact_values = prompt.length <= self.exact_tokens

    def _tokens_arrived(self, request: Any) -> bool:
        """Whether the workers, too, know all of the request's tokens."""
        return True

    def _get_local_prefix_cache_hit(self, request: Any, *limits: Any, **named_limits: Any) -> Any:
        """The hit, for a request whose round begins as it resumes: it was preempted while it waited for its turn."""
        if self._due(request):
            self._begin_round(request)
        return super()._get_local_prefix_cache_hit(request, *limits, **named_limits)

    def _reserve(self, request: Any, end: int) -> tuple[tuple[int, int], ...]:
        """The next turn of a conversation goes on from the last round's page, so the one before is dropped."""
        saves = super()._reserve(request, end)
        prompt = request.caprese
        if prompt.selected and saves:
            for key in prompt.last_pages:
                self.pages.drop(key)
            prompt.last_pages = [self._key(request, n) for n, _ in saves if n % self.page_tokens]
        return saves


class ReselectingScheduler(_RoundsScheduler):
    """For requests that select anew, and synchronous scheduling."""


class ReselectingAsyncScheduler(_RoundsScheduler, AsyncScheduler):
    """For requests that select anew, and asynchronous scheduling."""

    def _tokens_arrived(self, request: Any) -> bool:
        """Not while the last one is in flight.

        The V1 runner gets the tokens of a request that was absent from the last step; those that it sampled since the
        request came it does not know.
        """
        return request.num_output_placeholders == 0 and request.request_id not in self.prev_step_scheduled_req_ids
