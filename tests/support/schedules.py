"""Schedules of requests for one running engine: who arrives when, what it asks, and when its client goes away."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams

from caprese_vllm.pages import COMMANDS
from tests.support.engine import scheduler
from tests.support.models import random_prompts

MAX_NEW = 20


@dataclass(frozen=True)
class Element:
    """One request of a schedule."""

    prompt: int  # which of the pool's
    new_tokens: int = MAX_NEW  # at most MAX_NEW
    gap: int = 0  # engine steps after the arrival of the element before
    abort: int | None = None  # engine steps after its own arrival
    off: bool = False  # `"caprese": "off"`
    samples: int = 1  # n, all of them greedy
    stop: int | None = None  # which of the reference's tokens is a stop token
    priority: int = 0  # counts only where the engine schedules by priority


@dataclass(frozen=True)
class Answer:
    """The reference's tokens for a prompt of the pool, on and off."""

    prompt: list[int]
    on: list[int]
    off: list[int]

    def expected(self, element: Element) -> list[int]:
        tokens = (self.off if element.off else self.on)[: element.new_tokens]
        if element.stop is None:
            return tokens
        return tokens[: tokens.index(self.stop_token(element)) + 1] if self.stop_token(element) in tokens else tokens

    def stop_token(self, element: Element) -> int:
        assert element.stop is not None
        return (self.off if element.off else self.on)[element.stop]


def make_pool(answer: Callable[[list[int]], Answer | None], block: int) -> list[Answer]:
    """Prompts of a small tree: they share prefixes, continue each other, and contain each other's answers.

    Lengths go around multiples of `block`. `answer` refuses (None) a prompt whose reference has a tie.
    """
    trunk, other = random_prompts((5 * block - 10, 2 * block), seed=31)
    twigs = random_prompts((1, 7, block - 1, block, block + 1), seed=32)
    prompts = [other[:1], other, *(trunk[: n * block + d] for n in (1, 2, 3) for d in (-1, 0, 1)), trunk]
    prompts += [trunk[:n] + twig for n in (block, 2 * block, 3 * block - 9) for twig in twigs]
    pool = [found for prompt in prompts if (found := answer(prompt))]
    turns = [found for first in pool[1:9] if (found := answer([*first.prompt, *first.on, *twigs[1]]))]
    turns += [found for first in pool[2:8:2] if (found := answer([*first.prompt, *first.off, *twigs[0]]))]
    # The answer alone crosses a block's border, so that it could be taken for blocks of a running request.
    turns += [found for first in turns[:4] if (found := answer([*first.prompt, *first.on[:-3], *twigs[0]]))]
    return pool + turns


def play(
    llm: LLM, pool: Sequence[Answer], elements: Sequence[Element], reset: int | None = None
) -> dict[tuple[int, int], list[int]]:
    """Run a schedule to its end: tokens of each (element, sample). `reset`: the step that clears the prefix cache."""
    core = llm.llm_engine
    arrivals, at = [], 0
    for element in elements:
        at += element.gap
        arrivals.append(at)
    tokens: dict[tuple[int, int], list[int]] = {}
    step = 0
    while step <= at or core.has_unfinished_requests():
        assert step < at + 3000, "the engine makes no progress"
        for i, element in enumerate(elements):
            if arrivals[i] == step:
                request: Any = {"prompt_token_ids": pool[element.prompt].prompt}
                core.add_request(str(i), request, _params(pool, element), priority=element.priority)
            if element.abort is not None and arrivals[i] + element.abort == step:
                core.abort_request([str(i)])
        if step == reset:
            llm.reset_prefix_cache(reset_running_requests=True)
        for output in core.step():
            for sample in output.outputs:
                tokens[int(output.request_id), sample.index] = list(sample.token_ids)
        step += 1
    for _ in range(2):
        core.step()  # the next step tells the workers which requests have finished
    return tokens


def differences(
    pool: Sequence[Answer], elements: Sequence[Element], tokens: dict[tuple[int, int], list[int]]
) -> list[str]:
    """Samples whose tokens are not the reference's: all of them, or of an aborted request the first ones."""
    wrong = []
    for i, element in enumerate(elements):
        expected = pool[element.prompt].expected(element)
        for sample in range(element.samples):
            found = tokens.get((i, sample), [])
            if found != (expected if element.abort is None else expected[: len(found)]):
                wrong.append(f"element {i}, sample {sample}: {found} instead of {expected}")
    return wrong


def preempt(llm: LLM, request_id: str) -> None:
    """Take a running request's blocks, as the scheduler does when it has no others."""
    inner = scheduler(llm)
    (request,) = (request for request in inner.running if request.request_id.startswith(request_id))
    inner.running.remove(request)
    inner._preempt_request(request, 0.0)


def watch(llm: LLM) -> Counter[str]:
    """Counts from now on what a schedule must make happen, or its equality proves nothing."""
    seen: Counter[str] = Counter()
    inner = scheduler(llm)
    preempt, follows, schedule, reserve = inner._preempt_request, inner._follows, inner.schedule, inner.pages.reserve
    hit = inner._get_local_prefix_cache_hit

    def spy_preempt(request: Any, *args: Any, **options: Any) -> Any:
        seen["preempted while generating" if request.num_output_tokens else "preempted in mid-prompt"] += 1
        seen["preempted in a round"] += request.caprese.selected and request.caprese.counted < request.caprese.length
        seen["preempted before a round"] += getattr(inner, "_due", lambda request: False)(request)
        return preempt(request, *args, **options)

    def spy_follows(request: Any) -> bool:
        seen["followers that waited"] += (result := follows(request))
        return result

    def spy_reserve(key: Any) -> int | None:
        full = len(inner.pages) == inner.pages.num_pages
        page = reserve(key)
        seen["pages evicted"] += full and page is not None
        seen["pages refused"] += page is None
        return page

    def spy_hit(request: Any) -> Any:
        found = hit(request)
        if request.num_output_tokens and found[1]:
            seen["own prompt found again after a preemption"] += 1
        blocks = inner.kv_cache_manager.get_computed_blocks(request)[1]
        seen["hits cut at the prompt"] += blocks > request.num_prompt_tokens >= found[1] and not request.caprese.off
        seen["hits cut at a page"] += not request.num_output_tokens and blocks > found[1]
        return found

    def spy_schedule(*args: Any, **options: Any) -> Any:
        output = schedule(*args, **options)
        for request_id in output.num_scheduled_tokens:
            request = inner.requests[request_id]
            cut = request.caprese.selected and request.num_computed_tokens < request.caprese.length
            seen["rounds cut by the budget"] += cut and request.caprese.counted > request.num_prompt_tokens
        due = [request for request in inner.running if getattr(inner, "_due", lambda request: False)(request)]
        seen["rounds that waited"] += sum(request.request_id not in output.num_scheduled_tokens for request in due)
        for request_id, commands in getattr(output, COMMANDS).items():
            seen["rounds"] += commands.length is not None
            seen["pages saved by rounds"] += any(
                position > inner.requests[request_id].num_prompt_tokens for position, _ in commands.saves
            )
            seen["prefixes loaded"] += commands.load is not None
            junction = inner.requests[request_id].caprese.junction
            seen["junctions saved"] += any(0 < position == junction for position, _ in commands.saves)
        seen["off beside on"] += len({inner.requests[i].caprese.off for i in output.num_scheduled_tokens}) == 2
        return output

    inner._preempt_request, inner._follows, inner.schedule = spy_preempt, spy_follows, spy_schedule
    inner.pages.reserve, inner._get_local_prefix_cache_hit = spy_reserve, spy_hit
    return seen


def _params(pool: Sequence[Answer], element: Element) -> SamplingParams:
    # vLLM refuses n > 1 with temperature 0; the best token alone at any temperature is greedy search too.
    how = {"temperature": 0.0} if element.samples == 1 else {"temperature": 1.0, "top_k": 1, "n": element.samples}
    return SamplingParams(
        max_tokens=element.new_tokens,
        ignore_eos=True,
        extra_args={"caprese": "off"} if element.off else None,
        stop_token_ids=None if element.stop is None else [pool[element.prompt].stop_token(element)],
        **how,
    )
