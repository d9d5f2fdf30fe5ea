"""Reselection: after rho sparse tokens the newest run dense, and a request goes on as a prompt of its text would.

The reference runs that text anew, whole, without a cache (`HFReference.generate`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

import caprese_vllm.rounds
from tests.support.engine import (
    engine,
    force_async_scheduling,
    generate,
    greedy,
    leaks,
    logprobs_of,
    scheduler,
    with_logprobs,
)
from tests.support.equality import BLOCK, Case, check, differing, new_case
from tests.support.models import LAYERS, random_prompts
from tests.support.schedules import preempt
from tests.support.v2_process import run_v2

ModelDir = Callable[[str], Path]
RHO = 8
NEW = 30  # three rounds
PROMPTS = random_prompts((1, 7, BLOCK, BLOCK + 1, 60), seed=21)
# Chunks, and so few blocks that requests are preempted.
TIGHT = {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 7, "max_model_len": 96, "max_num_seqs": 4}
PAGES = {"statistics_page": BLOCK, "statistics_mib": 256}


def asking(**extra: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, extra_args=extra or None)


def rounds_of(llm: LLM) -> int:
    return llm.collective_rpc("caprese_report")[0]["reselections"]


def served(case: Case) -> dict[str, Any]:
    assert case.caprese is not None
    return {**case.caprese, **PAGES}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_density_one_is_plain_vllm(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Every neuron and no adapter: tokens and their probabilities, in chunks, with preemptions."""
    case = new_case(model_dir, tmp_path, "llama", "griffin", density=1.0, layers=list(range(LAYERS)), reselect=RHO)
    case.expected(PROMPTS, NEW, method=None)  # no ties
    with engine(case.model_dir, **TIGHT) as llm:
        tokens, logprobs = with_logprobs(llm, PROMPTS, NEW)
    if asynchronous:
        force_async_scheduling(monkeypatch)
    with engine(case.model_dir, served(case), **TIGHT) as llm:
        found = with_logprobs(llm, PROMPTS, NEW)
        assert rounds_of(llm) >= len(PROMPTS) * (NEW // (RHO + 1))
    assert found[0] == tokens
    assert found[1] == pytest.approx(logprobs, abs=2e-5)


@pytest.mark.parametrize(
    ("architecture", "method", "asynchronous"), [("llama", "griffin", True), ("qwen2", "cats", False)]
)
def test_v2_runner(model_dir: ModelDir, tmp_path: Path, architecture: str, method: str, asynchronous: bool) -> None:
    """The GPU's runner, in chunks, with preemptions and hits; at density 1 plain vLLM's tokens and probabilities."""
    case = new_case(model_dir, tmp_path, architecture, method, True, reselect=RHO)
    plain = Case(case.model_dir, method, density=1.0, layers=list(range(LAYERS)), reselect=RHO)
    prompts = [*PROMPTS, [*PROMPTS[-1][:50], 7, 8, 9]]
    job = {"engine": {**TIGHT, "enforce_eager": True, "dtype": "float32", "block_size": BLOCK}, "prompts": prompts}
    job |= {"new_tokens": NEW, "async": asynchronous, "model": str(case.model_dir), "logprobs": True}
    found = run_v2(job | {"caprese": served(case)})
    assert found["v2"]
    assert found["async"] is asynchronous
    assert found["preempted"] > 0
    assert found["report"]["reselections"] >= len(prompts) * (NEW // (RHO + 1))
    check(found["tokens"], case.expected(prompts, NEW), f"V2, {method}")
    plain.expected(prompts, NEW, method=None)  # no ties
    dense, off = run_v2(job | {"caprese": served(plain)}), run_v2(job | {"caprese": None})
    assert dense["report"]["reselections"] > 0
    assert dense["tokens"] == off["tokens"]
    assert dense["logprobs"] == pytest.approx(off["logprobs"], abs=2e-5)


@pytest.mark.parametrize(("method", "core"), [("griffin", 0.5), ("cats", None)])
def test_compiled(model_dir: ModelDir, tmp_path: Path, method: str, core: float | None) -> None:
    """torch.compile around our op; with a core, whose tail alone is selected anew."""
    case = new_case(model_dir, tmp_path, "qwen2", method, True, core, reselect=RHO)
    expected = case.expected(PROMPTS, NEW)
    assert differing(expected, case.expected(PROMPTS, NEW, reselect=None)) > len(PROMPTS) // 2, "rounds must show"
    with engine(case.model_dir, served(case), enforce_eager=False, max_num_batched_tokens=64) as llm:
        check(generate(llm, PROMPTS, greedy(NEW)), expected, f"compiled, {method}, core {core}")


def test_a_text_that_outgrows_exact_values(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CATS in float32 keeps a short text's magnitudes, and counts a longer one's: also one that grows.

    The reference takes the quantile of the values, which the counts round to bfloat16: at density 1 and 0 neurons
    below a threshold of 0 that is the same, so counts are compared with a prompt of the whole text.
    """
    neurons = 160
    monkeypatch.setattr("caprese_kernels.reference.EXACT_VALUES", (BLOCK + RHO + 5) * neurons)
    monkeypatch.setattr("caprese_vllm.enable.EXACT_VALUES", (BLOCK + RHO + 5) * neurons)
    case = new_case(model_dir, tmp_path, "qwen2", "cats", True, reselect=RHO)
    (prompt,) = random_prompts([BLOCK], seed=22)
    with engine(case.model_dir, served(case), enable_prefix_caching=False) as llm:
        (tokens,) = generate(llm, [prompt], greedy(NEW))
        for end in (RHO + 1, 2 * (RHO + 1), 3 * (RHO + 1)):
            (rest,) = generate(llm, [prompt + tokens[:end]], greedy(NEW - end))
            assert rest[: RHO + 1] == tokens[end : end + RHO + 1], f"after {end} tokens"


class TestOneEngine:
    @pytest.fixture(scope="class", params=[("llama", "griffin"), ("qwen2", "cats")], ids=["griffin", "cats"])
    def case(self, request: pytest.FixtureRequest, model_dir: ModelDir, tmp_path_factory: Any) -> Case:
        return new_case(model_dir, tmp_path_factory.mktemp("adapter"), *request.param, True, reselect=RHO)

    @pytest.fixture(scope="class")
    def llm(self, case: Case) -> Iterator[LLM]:
        with engine(case.model_dir, served(case), max_num_batched_tokens=16) as llm:
            yield llm

    @pytest.fixture(autouse=True)
    def _empty(self, llm: LLM) -> None:
        assert llm.reset_prefix_cache()

    def test_each_request_has_its_own_interval(self, llm: LLM, case: Case) -> None:
        asked: list[dict[str, Any]] = [{}, {"caprese_reselect": 3}, {"caprese_reselect": 0}, {"caprese": "off"}]
        references: list[dict[str, Any]] = [{}, {"reselect": 3}, {"reselect": None}, {"method": None}]
        prompt = PROMPTS[-1]
        expected = [case.expected([prompt], NEW, **options)[0] for options in references]
        assert len({tuple(one.tokens) for one in expected}) == len(asked)
        found = generate(llm, [prompt] * len(asked), [asking(**extra) for extra in asked])
        check(found, expected, "intervals")

    def test_preempted_at_any_step(self, llm: LLM, case: Case) -> None:
        """Before, within and after rounds; its own are cut, as the other request's leave too little of the budget."""
        prompts = random_prompts((7, 7), seed=23)
        expected = case.expected(prompts, NEW)
        core, within = llm.llm_engine, 0
        for at in range(1, 50):
            tokens: dict[str, list[int]] = {}
            for name, prompt in zip("ba", prompts, strict=True):
                core.add_request(name, {"prompt_token_ids": prompt}, greedy(NEW))
            step = 0
            while core.has_unfinished_requests():
                for output in core.step():
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
                step += 1
                running = [one for one in scheduler(llm).running if one.request_id.startswith("a")]
                if step == at and running:
                    within += running[0].caprese.selected and running[0].caprese.counted < running[0].caprese.length
                    preempt(llm, "a")
            check([tokens["b"], tokens["a"]], expected, f"preempted at step {at}")
        core.step()
        assert not leaks(llm)
        assert within > 0, "no round was cut"

    def test_the_next_turn_finds_what_rounds_made_exact(self, llm: LLM, case: Case) -> None:
        """Up to the last full block that the last round completed; its tokens are the reference's."""
        prompt = PROMPTS[-1]
        new = 4 * (RHO + 1) + 3
        (first,) = case.expected([prompt], new)
        check(generate(llm, [prompt], greedy(new)), [first], "first turn")
        turn = [*prompt, *first.tokens, 9]
        request: Any = {"prompt_token_ids": turn}
        (output,) = llm.generate([request], greedy(NEW), use_tqdm=False)
        assert output.num_cached_tokens == (len(prompt) + 4 * (RHO + 1)) // BLOCK * BLOCK > len(prompt)
        check([list(output.outputs[0].token_ids)], case.expected([turn], NEW), "next turn")

    def test_samples_part_ways(self, llm: LLM, case: Case) -> None:
        """n samples of one prompt share its selection until their first rounds: probabilities are the reference's."""
        prompt = PROMPTS[2]
        params = SamplingParams(temperature=1.0, n=3, max_tokens=NEW, ignore_eos=True, logprobs=0)
        request: Any = {"prompt_token_ids": prompt}
        (output,) = llm.generate([request], params, use_tqdm=False)
        assert len({tuple(one.token_ids) for one in output.outputs}) == 3
        for one in output.outputs:
            found = logprobs_of(one)
            expected = case.one(prompt, NEW, forced=list(one.token_ids))
            assert found == pytest.approx(expected.logprobs, abs=1e-3)
            never = case.one(prompt, NEW, forced=list(one.token_ids), reselect=None)
            assert found[: RHO + 1] == pytest.approx(never.logprobs[: RHO + 1], abs=1e-3)
            assert found != pytest.approx(never.logprobs, abs=1e-3)

    def test_rounds_take_turns(self, llm: LLM, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """Requests that come to their rounds together run them one after another, and then stay apart."""
        monkeypatch.setattr(caprese_vllm.rounds, "ROUND_TOKENS", 1)
        prompts = random_prompts((5, 5, 5, 5), seed=24)
        inner, begun = scheduler(llm), []
        begin, schedule = inner._begin_round, inner.schedule

        def spy_begin(request: Any) -> None:
            begun[-1] += 1
            begin(request)

        def spy_schedule(*args: Any, **options: Any) -> Any:
            begun.append(0)
            return schedule(*args, **options)

        monkeypatch.setattr(inner, "_begin_round", spy_begin)
        monkeypatch.setattr(inner, "schedule", spy_schedule)
        check(generate(llm, prompts, greedy(NEW)), case.expected(prompts, NEW), "together")
        assert sum(begun) == len(prompts) * (NEW - 1) // (RHO + 1)
        assert max(begun) == 1

    def test_penalties_count_a_token_once(self, llm: LLM, case: Case) -> None:
        """A round computes tokens again, which vLLM must not take for new ones."""
        prompt = PROMPTS[-1]
        params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, frequency_penalty=0.7)

        def penalize(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
            counts = torch.bincount(torch.tensor(generated, dtype=torch.int64), minlength=len(logits))
            return logits - 0.7 * counts

        expected = case.one(prompt, NEW, process=penalize)
        assert min(expected.margins) > 1e-4
        check(generate(llm, [prompt], params), [expected], "penalties")


def test_a_server_that_reselects_where_it_is_asked(model_dir: ModelDir, tmp_path: Path) -> None:
    case = new_case(model_dir, tmp_path, "llama", "griffin", True, reselect=0)
    prompt = PROMPTS[2]
    with engine(case.model_dir, case.caprese, enable_prefix_caching=False) as llm:
        found = generate(llm, [prompt, prompt], [asking(), asking(caprese_reselect=RHO)])
        assert rounds_of(llm) == (NEW - 1) // (RHO + 1)
    check(found, [case.one(prompt, NEW, reselect=each) for each in (None, RHO)], "asked")
