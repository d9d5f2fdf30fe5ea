"""Random schedules against one running engine: whoever else is served, each request's tokens are the reference's.

Few blocks, few pages and a small budget of tokens a step make everything happen that may happen to a request; the
test counts it. CAPRESE_SCHEDULES=1000 plays so many random schedules an engine instead of the same few.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import LLM

import caprese_vllm.enable
import caprese_vllm.rounds
import caprese_vllm.scheduler
from tests.support.engine import engine, force_async_scheduling, generate, greedy, leaks
from tests.support.equality import BLOCK, ROUNDING, Case, new_case
from tests.support.equality import check as check_tokens
from tests.support.models import random_prompts
from tests.support.schedules import MAX_NEW, Answer, Element, differences, make_pool, play, preempt, watch

PLAYED = int(os.environ.get("CAPRESE_SCHEDULES", "0"))
MAX_MODEL_LEN = 7 * BLOCK
# Every one of them must happen, or the schedules are too tame.
HAPPENINGS = (
    "preempted while generating",
    "preempted in mid-prompt",
    "prefixes loaded",
    "junctions saved",
    "followers that waited",
    "pages evicted",
    "hits cut at a page",
    "own prompt found again after a preemption",
    "off beside on",
)


@dataclass
class Setting:
    """An engine that is short of everything."""

    architecture: str
    method: str
    asynchronous: bool
    options: dict[str, Any]
    statistics_page: int
    pages: int
    reselect: int | None = None


# Gemma 2's two kinds of attention hold blocks each; one of them drops those behind its window.
SETTINGS = {
    "griffin": Setting("llama", "griffin", False, {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 11}, 64, 4),
    "cats": Setting(
        "gemma2",
        "cats",
        False,
        {"max_num_batched_tokens": 32, "num_gpu_blocks_override": 19, "scheduling_policy": "priority"},
        32,
        5,
    ),
    "async": Setting("qwen2", "griffin", True, {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 10}, 96, 4),
    "reselect": Setting(
        "llama", "griffin", False, {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 10}, 64, 4, reselect=3
    ),
    "reselect-async": Setting(
        "qwen2", "cats", True, {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 10}, 32, 5, reselect=3
    ),
}
# Besides, where requests reselect.
MORE_HAPPENINGS = (
    "rounds",
    "rounds that waited",
    "rounds cut by the budget",
    "pages saved by rounds",
    "preempted in a round",
    "preempted before a round",
)

elements = st.builds(
    Element,
    prompt=st.integers(0, 10**6) | st.integers(6, 12),  # modulo the pool's size; some are popular
    new_tokens=st.integers(1, MAX_NEW),
    gap=st.sampled_from([0, 0, 0, 1, 2, 5, 12]),
    abort=st.none() | st.none() | st.integers(0, 30),
    off=st.sampled_from([False, False, False, True]),
    samples=st.sampled_from([1, 1, 1, 1, 2, 3]),
    stop=st.none() | st.none() | st.integers(0, MAX_NEW - 1),
    priority=st.integers(0, 2),
)
schedules = st.lists(elements, min_size=1, max_size=8) | st.lists(elements, min_size=10, max_size=20)


@pytest.fixture(scope="module", params=list(SETTINGS))
def setting(request: pytest.FixtureRequest) -> Setting:
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def case(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> Case:
    folder = tmp_path_factory.mktemp("adapter")
    return new_case(model_dir, folder, setting.architecture, setting.method, True, reselect=setting.reselect)


@pytest.fixture(scope="module")
def pool(case: Case) -> list[Answer]:
    """Prompts with the reference's answers, none of which was a close decision."""
    refused = []

    def answer(prompt: list[int]) -> Answer | None:
        results = [case.one(prompt, MAX_NEW), case.one(prompt, MAX_NEW, method=None)]
        if min(min(result.margins) for result in results) < ROUNDING or results[0].closest < 1e-6:
            refused.append(prompt)
            return None
        return Answer(prompt, results[0].tokens, results[1].tokens)

    found = make_pool(answer, BLOCK)
    assert len(found) > 30, f"of the pool's prompts {len(refused)} tie: choose others"
    assert sum(one.on != one.off for one in found) > len(found) * 0.9
    return found


@pytest.fixture(scope="module")
def llm(case: Case, setting: Setting) -> Iterator[LLM]:
    assert case.caprese is not None
    caprese = {**case.caprese, "statistics_page": setting.statistics_page, "statistics_mib": 1024}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caprese_vllm.enable, "MAX_PAGES", setting.pages)  # the smallest budget is a MiB: a thousand
        patch.setattr(caprese_vllm.scheduler, "WORTH_WAITING", BLOCK)  # prompts are short here, and so are steps
        patch.setattr(caprese_vllm.rounds, "ROUND_TOKENS", 1)  # and so are rounds
        if setting.asynchronous:
            force_async_scheduling(patch)
        options = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4} | setting.options
        with engine(case.model_dir, caprese, **options) as llm:
            assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling is setting.asynchronous
            yield llm


def check(llm: LLM, pool: list[Answer], schedule: list[Element], reset: int | None = None) -> None:
    assert llm.reset_prefix_cache()
    tokens = play(llm, pool, schedule, reset)
    wrong = differences(pool, schedule, tokens)
    assert not wrong, "\n".join([*wrong, *map(repr, schedule), f"reset={reset}"])
    assert not leaks(llm)


def test_random_schedules(llm: LLM, pool: list[Answer], setting: Setting) -> None:
    seen = watch(llm)

    def run(schedule: list[Element], reset: int | None) -> None:
        seen["schedules"] += 1
        seen["requests"] += len(schedule)
        check(llm, pool, [Element(**{**vars(e), "prompt": e.prompt % len(pool)}) for e in schedule], reset)

    # What happens depends on the tokens, and these on the last bits of a processor's sums: go on where it was not all.
    happenings = HAPPENINGS + MORE_HAPPENINGS if setting.reselect else HAPPENINGS
    for count in (PLAYED or 30, 60, 120):
        if not all(seen[name] for name in happenings):
            many = settings(
                max_examples=count,
                derandomize=not PLAYED,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            many(given(schedules, st.none() | st.none() | st.none() | st.integers(1, 60))(run))()
    print(f"\n{setting.architecture}, {setting.method}: {dict(seen)}")
    assert not [name for name in happenings if not seen[name]], dict(seen)


def test_an_answer_that_became_a_prompt_while_its_request_was_preempted(llm: LLM, case: Case) -> None:
    """A client sends a half-streamed answer back in the next turn's prompt: now its tokens' exact KV is published.

    The request that is still giving that answer is preempted, finds those entries under its own tokens' hashes, and
    must not take them for its own, which were computed sparse.
    """
    assert llm.reset_prefix_cache()
    (first,) = random_prompts([2 * BLOCK + 1], seed=41)
    length = 2 * BLOCK
    reference = case.expected([first], length)[0]
    half = reference.tokens[: BLOCK + 8]  # the third block holds generated tokens, and it is full
    turn = [*first, *half, 9]
    seen, tokens, core = watch(llm), {}, llm.llm_engine

    def step() -> None:
        for output in core.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)

    core.add_request("answers", {"prompt_token_ids": first}, greedy(length))
    while len(tokens.get("answers", [])) < len(half):
        step()
    core.add_request("next turn", {"prompt_token_ids": turn}, greedy(1))
    while "next turn" not in tokens:
        step()
    preempt(llm, "answers")
    while core.has_unfinished_requests():
        step()
    if case.reselect is None:  # rounds make the KV of the tokens before them exact: they may be found and taken
        assert seen["hits cut at the prompt"] >= 1, "the request did not find the other one's blocks"
    check_tokens([tokens["answers"], tokens["next turn"]], [reference, *case.expected([turn], 1)], "both")


def test_what_sparse_decoding_wrote_is_never_found(llm: LLM, case: Case) -> None:
    """A next turn, asked twice: the second time its statistics reach over the answer, whose KV must be exact."""
    assert llm.reset_prefix_cache()
    (first,) = random_prompts([2 * BLOCK + 1], seed=41)
    (reference,) = case.expected([first], BLOCK + 8)
    turn = [*first, *reference.tokens, 9]
    expected = [reference, *case.expected([turn, turn], BLOCK + 8)]
    found = [generate(llm, [prompt], greedy(BLOCK + 8))[0] for prompt in (first, turn, turn)]
    check_tokens(found, expected, "a conversation, and its second turn again")
