"""Selections by score, prior and core: the engine against one request alone, whatever else it is doing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from caprese_kernels.adapters import Adapters
from caprese_vllm.state import merge
from tests.support.core import mass_outside
from tests.support.distill import make_rows, run_distill
from tests.support.engine import engine, generate, greedy
from tests.support.equality import BLOCK, BUDGET, LENGTHS, NEW_TOKENS, ROUNDING, Case, check, differing
from tests.support.models import make_adapter, random_prompts

SELECTIONS = {
    "weighted": {"score": "weighted", "prior": 0.0, "core": 0.0},
    "prior": {"score": "paper", "prior": 0.5, "core": 0.0},
    "core": {"score": "paper", "prior": 0.0, "core": 0.5},
    "all": {"score": "weighted", "prior": 0.5, "core": 0.5},
    "core alone": {"score": "weighted", "prior": 0.5, "core": 1.0},
    "prior alone": {"score": "paper", "prior": 1.0, "core": 0.25},
}
PAPER = {"score": "paper", "prior": 0.0, "core": 0.0}
# A prefix of two blocks that several prompts share, and prompts that share nothing.
PREFIX = random_prompts((2 * BLOCK,), seed=7)[0]
PROMPTS = [*random_prompts((*LENGTHS, 20)), *(PREFIX + tail for tail in random_prompts((1, 5, BLOCK), seed=8))]

ModelDir = Callable[[str], Path]


def without_ties(case: Case) -> list[list[int]]:
    """The prompts in whose answers no two logits tie in the reference."""
    prompts = [prompt for prompt in PROMPTS if min(case.one(prompt).margins) > ROUNDING]
    assert len(prompts) >= len(PROMPTS) - 2
    return prompts


def make_case(model_dir: ModelDir, folder: Path, architecture: str, method: str, name: str, rank: int = 8) -> Case:
    selection = PAPER if method == "cats" and name == "paper" else SELECTIONS[name]
    if method == "cats":
        selection = selection | {"prior": 0.0, "core": 0.0}
    directory = model_dir(architecture)
    path = make_adapter(directory, folder / "a.safetensors", method, rank=rank, selection=selection)
    return Case(directory, method, path, selection=selection)


@pytest.mark.parametrize("rank", [8, 0], ids=["adapter", "without L and R"])
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("architecture", ["qwen2", "opt"])
def test_tokens_equal_the_reference(
    model_dir: ModelDir, tmp_path: Path, architecture: str, name: str, rank: int
) -> None:
    """Chunked prompts in one batch; again from cached prefixes; their next turns; two samples of each; preempted."""
    case = make_case(model_dir, tmp_path, architecture, "griffin", name, rank)
    prompts = without_ties(case)
    expected = case.expected(prompts)
    assert differing(expected, case.expected(prompts, method=None)) >= len(prompts) // 2
    assert differing(expected, [case.one(prompt, shared=None) for prompt in prompts]) >= len(prompts) // 3
    what = f"{architecture}, {name}, rank {rank}"
    with engine(case.model_dir, case.caprese, max_num_batched_tokens=BUDGET, enable_prefix_caching=True) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, what)
        check(generate(llm, prompts[::-1], greedy(NEW_TOKENS)), expected[::-1], f"{what}, cached")
        turns = [[*prompt, *answer.tokens, 9] for prompt, answer in zip(prompts, expected, strict=True)]
        answers = {tuple(turn): case.one(turn) for turn in turns}
        clear = [list(turn) for turn, answer in answers.items() if min(answer.margins) > ROUNDING]
        assert len(clear) >= len(turns) - 2
        found = generate(llm, clear, greedy(NEW_TOKENS))
        check(found, [answers[tuple(turn)] for turn in clear], f"{what}, the next turn")
        two = SamplingParams(n=2, top_k=1, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], two, use_tqdm=False)
        for sample in range(2):
            found = [list(output.outputs[sample].token_ids) for output in outputs]
            check(found, expected, f"{what}, sample {sample}")
        report = llm.collective_rpc("caprese_report")[0]
        assert {key: report[key] for key in ("score", "prior", "core")} == SELECTIONS[name]
    few = {"num_gpu_blocks_override": 14, "max_num_batched_tokens": BUDGET}
    with engine(case.model_dir, case.caprese, **few) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, f"{what}, preempted")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scaled_cats(model_dir: ModelDir, tmp_path: Path, architecture: str) -> None:
    case = make_case(model_dir, tmp_path, architecture, "cats", "weighted")
    prompts = without_ties(case)
    expected = case.expected(prompts)
    assert differing(expected, [case.one(prompt, shared=None) for prompt in prompts]) >= len(prompts) // 3
    with engine(case.model_dir, case.caprese, max_num_batched_tokens=BUDGET, enable_prefix_caching=True) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, f"{architecture}, cats weighted")
        check(
            generate(llm, prompts[::-1], greedy(NEW_TOKENS)), expected[::-1], f"{architecture}, cats weighted, cached"
        )


@pytest.mark.parametrize(
    ("method", "name", "densities"),
    [
        ("griffin", "all", [0.3, 0.8]),
        ("griffin", "core alone", [0.3, 1.0]),
        ("cats", "weighted", [0.3, 0.8, 0.5, 0.9]),
    ],
)
def test_a_density_for_each_layer(
    model_dir: ModelDir, tmp_path: Path, method: str, name: str, densities: list[float]
) -> None:
    selection, directory = SELECTIONS[name], model_dir("llama")
    path = make_adapter(directory, tmp_path / "a.st", method, selection=selection | {"densities": densities})
    case = Case(directory, method, path, dict(enumerate(densities)), selection=selection)
    prompts = without_ties(case)
    expected = case.expected(prompts)
    assert differing(expected, [case.one(prompt, density=0.5) for prompt in prompts]) >= len(prompts) // 3
    with engine(directory, case.caprese, max_num_batched_tokens=BUDGET, enable_prefix_caching=True) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, f"{method}, {name}, densities {densities}")
        check(generate(llm, prompts[::-1], greedy(NEW_TOKENS)), expected[::-1], f"{method}, {name}, cached")
        report = llm.collective_rpc("caprese_report")[0]
        assert report["densities"] == densities
        if method == "griffin":
            neurons = Adapters.load(path).config.base_model.intermediate_size
            assert report["neurons_kept"] == report["generated_tokens"] * sum(int(d * neurons) for d in densities)


def test_a_weighted_score_needs_no_adapter(model_dir: ModelDir) -> None:
    case = Case(model_dir("llama"), "griffin", selection=SELECTIONS["weighted"])
    prompts = without_ties(case)
    expected = case.expected(prompts)
    config = {"method": "griffin", "score": "weighted"}
    with engine(case.model_dir, config) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, "weighted, no adapter")


def test_a_distilled_core_is_served_as_it_was_distilled(model_dir: ModelDir, tmp_path: Path) -> None:
    """What `caprese distill` writes by its defaults, L, R of some size: the engine's tokens are the reference's."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
    path = tmp_path / "a.safetensors"
    result = run_distill(model_dir("llama"), data, path, rank=8, epochs=2, batch=4, learning_rate=3e-2)
    assert min(pair.float().norm() for pair in result.adapters.right.values()) > 0.1
    case = Case(model_dir("llama"), "griffin", path, selection=SELECTIONS["core alone"])
    prompts = without_ties(case)
    expected = case.expected(prompts)
    assert differing(expected, case.expected(prompts, left=None, right=None)) >= len(prompts) // 3
    with engine(case.model_dir, case.caprese, max_num_batched_tokens=BUDGET, enable_prefix_caching=True) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, "distilled core")
        report = llm.collective_rpc("caprese_report")[0]
        assert {key: report[key] for key in ("score", "prior", "core")} == SELECTIONS["core alone"]


def test_without_statistics_prompts_are_plain(model_dir: ModelDir, tmp_path: Path) -> None:
    """A core alone: no page and no slot; a cached prompt is used as far as plain vLLM uses it, a response is not."""
    case = make_case(model_dir, tmp_path, "llama", "griffin", "core alone")
    with engine(case.model_dir, case.caprese, enable_prefix_caching=True) as llm:
        core = llm.llm_engine.engine_core.engine_core
        assert type(core.scheduler).__name__ == "CoreScheduler"
        generate(llm, PROMPTS, greedy(2))
        cached = llm.generate([{"prompt_token_ids": [*PREFIX, 5]}], SamplingParams(max_tokens=1), use_tqdm=False)
        assert cached[0].num_cached_tokens == 2 * BLOCK
        state = core.model_executor.driver_worker.worker.model_runner.model.caprese
        assert state.table.numel() == 0
        assert len(state.requests) == 0


@pytest.mark.parametrize("name", ["all", "core alone"])
def test_the_prompts_mass_outside_of_the_core(model_dir: ModelDir, tmp_path: Path, name: str) -> None:
    """Measured in the middle one of the sparse layers, over every prompt token that is computed, however chunked."""
    case = make_case(model_dir, tmp_path, "llama", "griffin", name)
    prompts = random_prompts((40, 17, 5, 9), seed=4)
    with engine(case.model_dir, case.caprese, max_num_batched_tokens=BUDGET) as llm:
        report = merge(llm.collective_rpc("caprese_report"))
        assert (report["prompt_mass"], report["prompt_mass_outside_core"]) == ([0.0, 0.0], None)
        generate(llm, prompts, greedy(NEW_TOKENS))
        report = merge(llm.collective_rpc("caprese_report"))
    outside, total = report["prompt_mass"]
    assert total == pytest.approx(sum(map(len, prompts)), rel=1e-5)
    assert report["prompt_mass_outside_core"] == outside / total
    assert outside / total == pytest.approx(mass_outside(case, prompts, layer=1), rel=1e-4)
    assert 0.1 < outside / total < 0.9


def test_the_core_is_the_priors(model_dir: ModelDir, tmp_path: Path) -> None:
    """The permuted weights hold the neurons of largest prior last; reloaded weights are permuted again."""
    case = make_case(model_dir, tmp_path, "llama", "griffin", "all")
    prompts = without_ties(case)
    expected = case.expected(prompts)
    with engine(case.model_dir, case.caprese) as llm:
        model: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        block = model.caprese.blocks[0]
        assert block.core.num_neurons == int(0.5 * int(0.5 * block.num_neurons))
        assert torch.equal(
            block.core.down_plus[: block.core.num_neurons],
            block.packed.down_plus[block.num_neurons - block.core.num_neurons : block.num_neurons],
        )
        before = block.packed.down_plus.clone()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(case.model_dir)})
        assert torch.equal(block.packed.down_plus, before)
        assert llm.reset_prefix_cache()
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, "after a reload")
