"""Prefix caching changes no token, reuses nearly what plain vLLM reuses, and never what sparse decoding wrote."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from tests.support.engine import engine, greedy, scheduler
from tests.support.equality import BLOCK, BUDGET, Case, check, new_case
from tests.support.models import random_prompts

PAGE = 2 * BLOCK
PAGES = {"statistics_page": PAGE, "statistics_mib": 256}
NEW = 8


def run(llm: LLM, prompts: Sequence[Sequence[int]], params: Any = None) -> tuple[list[list[int]], list[int]]:
    """Tokens, and tokens found in the cache, of one batch."""
    requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(requests, params or greedy(NEW), use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens or 0 for o in outputs]


def blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


@pytest.fixture(scope="class", params=[("llama", "griffin"), ("qwen2", "cats")], ids=["griffin", "cats"])
def case(
    request: pytest.FixtureRequest, model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    return new_case(model_dir, tmp_path_factory.mktemp("adapter"), *request.param, True)


class TestOneEngine:
    @pytest.fixture(scope="class")
    def llm(self, case: Case) -> Iterator[LLM]:
        with engine(case.model_dir, {**(case.caprese or {}), **PAGES}, max_num_batched_tokens=BUDGET) as llm:
            yield llm

    @pytest.fixture(autouse=True)
    def _empty(self, llm: LLM) -> None:
        assert llm.reset_prefix_cache()
        assert len(scheduler(llm).pages) == 0

    def test_the_same_prompt_again(self, llm: LLM, case: Case) -> None:
        for length in (BLOCK - 1, BLOCK, PAGE, PAGE + 1, 150):
            (prompt,) = random_prompts([length], seed=40 + length)
            expected = case.expected([prompt], NEW)
            for cached in (0, blocks(length - 1)):
                found, hits = run(llm, [prompt])
                check(found, expected, f"{length} tokens, {cached} of them cached")
                assert hits == [cached]

    def test_a_shared_prefix_is_known_from_the_second_request_on(self, llm: LLM, case: Case) -> None:
        """The first leaves a page behind at 128 tokens, the second where it left the first one's prompt."""
        (system,) = random_prompts([170], seed=41)
        prompts = [system + own for own in random_prompts((60, 31, 4, 9), seed=42)]
        found, hits = [], []
        for prompt in prompts:
            tokens, cached = run(llm, [prompt])
            found += tokens
            hits += cached
        check(found, case.expected(prompts, NEW), "a shared system prompt")
        assert hits == [0, 128, 160, 160]

    def test_requests_that_arrive_together_wait_for_the_first(self, llm: LLM, case: Case) -> None:
        (system,) = random_prompts([140], seed=43)
        prompts = [system + own for own in random_prompts((20, 31, 4, 9), seed=44)] + [system, system]
        found, hits = run(llm, prompts)
        check(found, case.expected(prompts, NEW), "together")
        assert hits == [0, 128, 128, 128, 128, 128]

    def test_samples_of_one_prompt(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        """The prompt is computed once, but for its last, partial block."""
        statistics, counted = blocks_of(llm)[0].statistics, []
        observe = statistics.observe

        def spy(plan: Any, *args: Any) -> Any:
            counted.extend(chunk.end - chunk.begin for chunk in plan.chunks)
            return observe(plan, *args)

        monkeypatch.setattr(statistics, "observe", spy)
        (prompt,) = random_prompts([150], seed=45)
        params = SamplingParams(n=4, temperature=1.0, max_tokens=NEW, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
        assert sum(counted) == 150 + 3 * (150 - 128)

    def test_turns_of_a_conversation(self, llm: LLM, case: Case) -> None:
        """A next turn reuses the turn before up to its last full block, and nothing of the answer, which ran sparse."""
        (conversation,) = random_prompts([70], seed=46)
        known = 0
        for turn in range(4):
            length = len(conversation)
            found, hits = run(llm, [conversation], greedy(20))
            check(found, case.expected([conversation], 20), f"turn {turn}")
            assert hits == [blocks(known)]
            known = length
            conversation = conversation + found[0] + random_prompts([20], seed=47 + turn)[0]

    def test_requests_with_caprese_off(self, llm: LLM, case: Case) -> None:
        """They reuse blocks without pages, even generated ones; their blocks are of no use to others."""
        (prompt,) = random_prompts([100], seed=52)
        dense, sparse = case.expected([prompt], 40, method=None), case.expected([prompt], NEW)
        off = greedy(40, caprese="off")
        (answer,), hits = run(llm, [prompt], off)
        check([answer], dense, "off")
        assert hits == [0]
        found, hits = run(llm, [prompt])
        check(found, sparse, "on, after the same prompt ran off")
        assert hits == [0]
        found, hits = run(llm, [prompt + answer], off)
        check(found, case.expected([prompt + answer], 40, method=None), "off, after its own answer")
        assert hits == [blocks(139)], "what a dense request generated may be reused by a dense one"

    def test_what_sparse_decoding_wrote_is_not_reused(self, llm: LLM, case: Case) -> None:
        (prompt,) = random_prompts([40], seed=53)
        (answer,), _ = run(llm, [prompt], greedy(100))
        for params, method in ((greedy(NEW), case.method), (greedy(NEW, caprese="off"), None)):
            found, hits = run(llm, [prompt + answer], params)
            check(found, case.expected([prompt + answer], NEW, method=method), "a prompt that ends with an answer")
            assert hits[0] == (BLOCK if method else blocks(139)), "first the prompt's; then what ran as a prompt now"

    def test_a_resumed_request_does_not_take_its_own_tokens_from_anothers_prompt(self, llm: LLM, case: Case) -> None:
        """One request generates; another's prompt holds the same tokens, run dense; then the first loses its blocks."""
        (prompt,) = random_prompts([40], seed=54)
        (expected,) = case.expected([prompt], 90)
        add, step = llm.llm_engine.add_request, llm.llm_engine.step
        add("first", {"prompt_token_ids": prompt}, greedy(90))
        tokens: dict[str, list[int]] = {}
        while len(tokens.get("first", [])) < 60:
            tokens |= {o.request_id: list(o.outputs[0].token_ids) for o in step()}
        add("second", {"prompt_token_ids": prompt + expected.tokens[:56]}, greedy(2))
        while "second" not in tokens:
            tokens |= {o.request_id: list(o.outputs[0].token_ids) for o in step()}
        inner = scheduler(llm)
        (request,) = [r for r in inner.running if r.request_id.startswith("first")]
        inner.running.remove(request)
        inner._preempt_request(request, 0.0)
        while llm.llm_engine.has_unfinished_requests():
            tokens |= {o.request_id: list(o.outputs[0].token_ids) for o in step()}
        assert request.num_preemptions == 1
        check([tokens["first"]], [expected], "resumed")


def blocks_of(llm: LLM) -> Any:
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    return model.caprese.blocks


def test_few_pages(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Pages of the least recently used prefixes are given to others; results stay."""
    case = new_case(model_dir, tmp_path, "llama", "griffin", True)
    prompts = random_prompts([100] * 5, seed=55)
    expected = case.expected(prompts, NEW)
    with engine(case.model_dir, {**(case.caprese or {}), **PAGES}, max_num_batched_tokens=BUDGET) as llm:
        inner = scheduler(llm)
        inner.pages.num_pages = 3  # a prompt leaves two behind, at 64 and at 96 tokens
        inner.pages.clear()
        found, _ = run(llm, prompts * 2)
        check(found, expected * 2, "three pages, together")
        for prompt, one in zip(prompts * 2, expected * 2, strict=True):
            for cached in (0, 96):
                found, hits = run(llm, [prompt])
                check(found, [one], "three pages, alone")
                if cached or prompt is not prompts[-1]:
                    assert hits == [cached]
        assert len(inner.pages) == 3


@pytest.mark.parametrize(("architecture", "method"), [("llama", "griffin"), ("gemma2", "cats")])
def test_as_many_cached_tokens_as_plain_vllm(
    model_dir: Callable[[str], Path], tmp_path: Path, architecture: str, method: str
) -> None:
    """Three system prompts of more than two pages, forty requests, some at once: at least 90% of plain vLLM's hits."""
    case = new_case(model_dir, tmp_path, architecture, method, True)
    systems = random_prompts((2 * PAGE + 1, 150, 210), seed=60)
    own = random_prompts([7 + 5 * i % 23 for i in range(40)], seed=61)
    prompts = [systems[i % 3] + tokens for i, tokens in enumerate(own)]
    total = {}
    for name, caprese in (("plain", None), ("caprese", {**(case.caprese or {}), **PAGES})):
        with engine(case.model_dir, caprese) as llm:
            total[name] = 0
            for begin in range(0, len(prompts), 8):
                total[name] += sum(run(llm, prompts[begin : begin + 8], greedy(2))[1])
    assert total["plain"] > 4000
    assert total["caprese"] >= 0.9 * total["plain"], total
