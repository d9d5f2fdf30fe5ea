"""The engine against one request alone on Hugging Face: the same greedy tokens, whatever else the engine is doing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.support.engine import engine, generate, greedy, scheduler
from tests.support.equality import (
    ARCHITECTURES,
    BLOCK,
    BUDGET,
    LENGTHS,
    METHODS,
    NEW_TOKENS,
    Case,
    check,
    differing,
    new_case,
)
from tests.support.models import random_prompts


@pytest.fixture
def make_case(model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Case]:
    return lambda *args, **options: new_case(model_dir, tmp_path, *args, **options)


def test_the_reference_is_hugging_face(make_case: Callable[..., Case]) -> None:
    """Without a method it is transformers' own generation; with every neuron kept it is the same again."""
    case = make_case("qwen3", None)
    prompts = random_prompts(LENGTHS)
    for prompt, result in zip(prompts, case.expected(prompts), strict=True):
        output = case.model.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        # The tests generate past the end-of-sequence token, Hugging Face's min_new_tokens forbids it.
        if case.model.model.config.eos_token_id not in result.tokens:
            assert output[0, len(prompt) :].tolist() == result.tokens
        assert case.one(prompt, method="griffin", density=1.0).tokens == result.tokens
        assert case.one(prompt, method="griffin", density=0.99).closest < 1.0


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama-bias"])
def test_installed_is_not_enabled(make_case: Callable[..., Case], architecture: str) -> None:
    """Without configuration the engine is plain vLLM, and its text varies enough to notice if it were not."""
    case = make_case(architecture, None)
    prompts = random_prompts(LENGTHS)
    expected = case.expected(prompts)
    assert sum(len(set(result.tokens)) >= NEW_TOKENS // 2 for result in expected) > len(prompts) // 2
    with engine(case.model_dir, case.caprese, max_num_batched_tokens=BUDGET) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, f"{architecture}, not enabled")


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "plain"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama-bias"])
def test_tokens_equal_the_reference(
    make_case: Callable[..., Case], architecture: str, method: str, adapter: bool
) -> None:
    """Mixed lengths in one batch, with chunked prefill if there is an adapter; then all prompts once more."""
    case = make_case(architecture, method, adapter)
    prompts = random_prompts(LENGTHS)
    expected = case.expected(prompts)
    dense = case.expected(prompts, method=None)
    assert differing(expected, dense) >= len(prompts) // 2, "sparsity must show, or equality proves nothing"
    if adapter:
        plain = [case.one(prompt, left={}, right={}) for prompt in prompts]
        assert differing(expected, plain) >= len(prompts) // 2, "the adapter must show, or equality proves nothing"
    what = f"{architecture}, {method}, {'adapter' if adapter else 'plain'}"
    with engine(case.model_dir, case.caprese, **({"max_num_batched_tokens": BUDGET} if adapter else {})) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, what)
        check(generate(llm, prompts[::-1], greedy(NEW_TOKENS)), expected[::-1], f"{what}, again in another order")
        one_over = LENGTHS.index(BUDGET + 1)  # alone, and cut by the budget: its last chunk is a single token
        check(generate(llm, [prompts[one_over]], greedy(NEW_TOKENS)), [expected[one_over]], f"{what}, alone")


@pytest.mark.parametrize(
    ("method", "density", "layers"), [("griffin", 0.3, [1, 3]), ("cats", 0.15, [0, 2]), ("griffin", 1.0, [0, 1, 2, 3])]
)
def test_density_and_layers(make_case: Callable[..., Case], method: str, density: float, layers: list[int]) -> None:
    case = make_case("llama", method, density=density, layers=layers)
    prompts = random_prompts(LENGTHS)
    with engine(case.model_dir, case.caprese) as llm:
        found = generate(llm, prompts, greedy(NEW_TOKENS))
    expected = case.expected(prompts)
    check(found, expected, f"{method} at density {density} on layers {layers}")
    changed = differing(expected, case.expected(prompts, method=None))
    assert changed == 0 if density == 1.0 else changed >= len(prompts) // 2


@pytest.mark.parametrize(("architecture", "method"), [("llama", "griffin"), ("gemma2", "cats")], scope="class")
class TestOneEngine:
    """One engine, with chunked prefill, prefix cache and an adapter, through all that may happen to requests."""

    @pytest.fixture(scope="class")
    def case(
        self, model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, architecture: str, method: str
    ) -> Case:
        return new_case(model_dir, tmp_path_factory.mktemp("adapter"), architecture, method, True)

    @pytest.fixture(scope="class")
    def llm(self, case: Case) -> Iterator[LLM]:
        with engine(case.model_dir, case.caprese, max_num_batched_tokens=BUDGET) as llm:
            yield llm

    def test_identical_prompts(self, llm: LLM, case: Case) -> None:
        """In one batch, and again from the prefix cache, whose blocks may end one token before the prompt."""
        prompts = random_prompts((BLOCK + 1, 2 * BLOCK + 1, 3 * BLOCK, 150), seed=1)
        expected = case.expected(prompts)
        check(generate(llm, prompts * 2, greedy(NEW_TOKENS)), expected * 2, "identical prompts in one batch")
        for i, prompt in enumerate(prompts):
            check(generate(llm, [prompt], greedy(NEW_TOKENS)), [expected[i]], f"prompt {i} again")
        longer = [[*prompt, 5, 6, 7] for prompt in prompts]
        check(generate(llm, longer, greedy(NEW_TOKENS)), case.expected(longer), "prompts that share a cached prefix")

    def test_turns_of_a_conversation(self, llm: LLM, case: Case) -> None:
        """A next turn's prompt holds tokens that were generated sparsely: now they are prompt tokens, and run dense."""
        conversations = random_prompts((5, 40, 90), seed=2)
        for turn in range(3):
            found = generate(llm, conversations, greedy(NEW_TOKENS))
            check(found, case.expected(conversations), f"turn {turn}")
            asked = random_prompts((9, 3, 14), seed=3 + turn)
            conversations = [c + answer + more for c, answer, more in zip(conversations, found, asked, strict=True)]

    def test_arrivals_and_aborts(self, llm: LLM, case: Case) -> None:
        """Requests come and go at every stage; more of them than the engine has places."""
        lengths = (70, 3, 130, 1, 65, 20, 33, 90, 8, 64, 2, 45, 110, 6)
        prompts = random_prompts(lengths, seed=7)
        arrivals = {0: [0, 1, 2], 1: [3], 3: [4, 5, 6], 8: [7, 8, 9, 10], 9: [11], 20: [12], 40: [13]}
        aborts = {1: [2], 6: [1], 9: [8], 10: [11], 12: [0], 21: [12]}  # in its prompt, generating, waiting
        tokens: dict[int, list[int]] = {}
        step, last = 0, max(arrivals)
        while step <= last or llm.llm_engine.has_unfinished_requests():
            for i in arrivals.get(step, []):
                llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, greedy(NEW_TOKENS))
            for i in aborts.get(step, []):
                llm.llm_engine.abort_request([str(i)])
            for output in llm.llm_engine.step():
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
            step += 1
        aborted = {i for ids in aborts.values() for i in ids}
        cut = {i: tokens.get(i, []) for i in aborted}
        assert all(len(got) < NEW_TOKENS for got in cut.values()), "an aborted request ran to its end"
        assert any(cut.values()), "no request was aborted while it generated"
        assert not all(cut.values()), "no request was aborted before it generated"
        rest = [i for i in range(len(prompts)) if i not in aborted]
        expected = case.expected(prompts)
        check([tokens[i] for i in rest], [expected[i] for i in rest], "requests beside aborted ones")
        for i, got in cut.items():
            assert got == expected[i].tokens[: len(got)], f"aborted request {i}"

    def test_off_for_one_request(self, llm: LLM, case: Case) -> None:
        """A request that says "off" runs dense; its neighbours do not notice, nor does the same prompt afterwards."""
        prompts = random_prompts((1, 33, 40, 100), seed=11)
        sparse, dense = case.expected(prompts), case.expected(prompts, method=None)
        assert differing(sparse, dense) >= len(prompts) - 1
        params = [greedy(NEW_TOKENS), greedy(NEW_TOKENS, caprese="off")] * len(prompts)
        found = generate(llm, [prompt for prompt in prompts for _ in range(2)], params)
        check(found[0::2], sparse, "beside requests that are off")
        check(found[1::2], dense, "off")
        check(generate(llm, prompts, greedy(NEW_TOKENS)), sparse, "on, after the same prompts ran off")

    def test_samples_of_one_prompt(self, llm: LLM, case: Case) -> None:
        """n > 1: the engine's log-probabilities of its samples are the reference's."""
        for prompt in random_prompts((1, 3 * BLOCK + 1), seed=12):
            params = SamplingParams(n=3, temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
            (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1, "samples must differ"
            for sample in output.outputs:
                tokens = list(sample.token_ids)
                assert sample.logprobs is not None
                found = [step[token].logprob for step, token in zip(sample.logprobs, tokens, strict=True)]
                reference = case.one(prompt, forced=tokens)
                # Logits of about 10 in float32, summed in another order through 4 layers: 1e-5, ten times over twice.
                # A neuron whose |g| is within rounding of tau may fall on either side: one of 160, at the border.
                slack = 1e-3 if reference.closest > 1e-5 else 1e-2
                assert found == pytest.approx(reference.logprobs, abs=slack)
                assert found != pytest.approx(case.one(prompt, forced=tokens, method=None).logprobs, abs=1e-1)


@pytest.mark.parametrize(("architecture", "method"), [("qwen3", "griffin"), ("mistral", "cats")])
def test_preemption(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, architecture: str, method: str
) -> None:
    """A KV cache of 10 blocks for 7 requests that end with 2 or 3 blocks each: some lose their blocks and start again.

    Their generated tokens are computed again as generated tokens, with the selection that their prompt made.
    """
    case = make_case(architecture, method, True)
    prompts = random_prompts((20, 25, 30, 31, 33, 40, 60), seed=13)
    preempted: list[tuple[str, int]] = []
    with engine(case.model_dir, case.caprese, num_gpu_blocks_override=10, max_num_batched_tokens=BUDGET) as llm:
        inner = scheduler(llm)
        original = inner._preempt_request

        def spy(request: Any, *args: Any, **options: Any) -> Any:
            preempted.append((request.request_id, request.num_output_tokens))
            return original(request, *args, **options)

        monkeypatch.setattr(inner, "_preempt_request", spy)
        found = generate(llm, prompts, greedy(2 * NEW_TOKENS))
    assert any(outputs > 1 for _, outputs in preempted), f"no request was preempted while it generated: {preempted}"
    check(found, case.expected(prompts, 2 * NEW_TOKENS), f"{architecture}, {method}, preempted: {preempted}")
