"""Compared with plain vLLM: the same tokens where nothing is dropped, and no memory but what the method needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from caprese_vllm.statistics import page_nbytes
from tests.support.engine import engine, generate, greedy
from tests.support.equality import BLOCK, BUDGET, LENGTHS, NEW_TOKENS, new_case
from tests.support.models import LAYERS, random_prompts

ModelDir = Callable[[str], Path]


def model_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


@pytest.mark.parametrize(("architecture", "method"), [("llama", "griffin"), ("gemma2", "cats"), ("qwen3", "griffin")])
def test_density_one_is_plain_vllm(model_dir: ModelDir, tmp_path: Path, architecture: str, method: str) -> None:
    """Every neuron of every layer and no adapter, through chunks, the prefix cache and a next turn.

    The prompts have no ties (`expected` asserts it), so that another order of summation changes no token.
    """
    case = new_case(model_dir, tmp_path, architecture, method, density=1.0, layers=list(range(LAYERS)))
    prompts = random_prompts((*LENGTHS, 2 * BLOCK, 150), seed=0)
    answers = case.expected(prompts, method=None)
    turns = [[*p, *answer.tokens, 5, 6] for p, answer in zip(prompts, answers, strict=True)]
    case.expected(turns, method=None)
    found = []
    for caprese in (None, {**case.caprese, "statistics_page": 32, "statistics_mib": 1024}):
        options = {"enable_prefix_caching": True, "max_num_batched_tokens": BUDGET}
        with engine(case.model_dir, caprese, **options) as llm:
            assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
            found.append([generate(llm, asked, greedy(NEW_TOKENS)) for asked in (prompts * 2, prompts, turns)])
            if caprese is not None:
                report = llm.collective_rpc("caprese_report")[0]
                assert report["layers"] == list(range(LAYERS))
                assert report["generated_tokens"] == (3 * len(prompts) + len(turns)) * (NEW_TOKENS - 1)
    plain, enabled = found
    assert plain == enabled


def storages(root: Any) -> dict[int, int]:
    """Bytes of every distinct tensor storage reachable from `root`: modules, objects, lists and dictionaries."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple):
            todo += thing
        elif type(thing).__module__.split(".")[0] in ("vllm", "torch", "caprese_vllm", "caprese_kernels"):
            todo += vars(thing).values() if hasattr(thing, "__dict__") else ()
    sizes.pop(0, None)  # empty tensors
    return sizes


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_memory_beyond_plain_vllms(model_dir: ModelDir, tmp_path: Path, method: str) -> None:
    """All tensors that the model and Caprese's state hold, storage by storage, compared with a plain engine's model.

    Beyond plain vLLM's: L and R, a row of selections for each slot, the pages of statistics, a counter a layer and one
    more, and the slots of the rows of a batch that decodes.
    While no prompt is being computed nothing else; so the KV cache, which gets the rest, shrinks by no more.
    """
    case = new_case(model_dir, tmp_path, "qwen2", method, True)
    pages, slots, neurons, hidden, rank = 3, 8, 160, 64, 8
    prompts = random_prompts((9, 70))
    with engine(case.model_dir) as llm:
        generate(llm, prompts, greedy(4))
        plain = sum(storages(model_of(llm)).values())
        mlp = model_of(llm).model.layers[0].mlp
        assert not (mlp.gate_up_proj.weight.numel())
        assert not (mlp.down_proj.weight.numel())
    layers = LAYERS // 2 if method == "griffin" else LAYERS
    plain += layers * 3 * neurons * hidden * 4  # which plain vLLM has packed for its CPU kernel, out of sight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caprese_vllm.enable.MAX_PAGES", pages)
        with engine(case.model_dir, {**case.caprese, "statistics_mib": 1024}, max_num_seqs=slots) as llm:
            model = model_of(llm)
            state = model.caprese
            tables = slots * layers * (neurons if method == "griffin" else 4)
            for block in state.blocks:
                assert block.selections.nbytes == tables // layers
            at_start = sum(storages(model).values())
            generate(llm, prompts, greedy(4))
            afterwards = sum(storages(model).values())
            kept = page_nbytes(state.method, neurons, 256, torch.float32) * pages
            exact = kept - sum(block.statistics.nbytes for block in state.blocks)  # allotted to values of short prompts
    low_rank = layers * 2 * rank * hidden * 4
    counters = (layers + 1 + slots) * 8  # neurons kept by each layer; tokens; slots of a decode batch's rows
    assert at_start - plain == low_rank + tables + kept - exact + counters
    assert at_start <= afterwards <= at_start + exact
