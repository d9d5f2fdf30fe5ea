"""The ways in which vLLM runs a model besides V1 eager: the V2 runner (the GPU's default) and torch.compile."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.engine import DEFAULTS, engine, generate, greedy
from tests.support.equality import BLOCK, LENGTHS, NEW_TOKENS, check, new_case
from tests.support.models import random_prompts
from tests.support.v2_process import run_v2

ModelDir = Callable[[str], Path]


# Gemma 2's two kinds of attention hold blocks each.
@pytest.mark.parametrize(
    ("architecture", "method", "asynchronous", "blocks", "core"),
    [
        ("llama", "griffin", True, 7, None),
        ("gemma2", "cats", False, 12, None),
        ("llama", "griffin", True, 7, 0.5),
        ("qwen2", "griffin", False, 7, 1.0),
    ],
)
def test_v2_runner(
    model_dir: ModelDir,
    tmp_path: Path,
    architecture: str,
    method: str,
    asynchronous: bool,
    blocks: int,
    core: float | None,
) -> None:
    """Chunked prefill and so few blocks that requests are preempted: V2 drops a preempted request and adds it again.

    Two prompts begin as another does, and find its first block in the cache, with a page of statistics unless all of a
    selection is the core.
    """
    case = new_case(model_dir, tmp_path, architecture, method, True, core)
    prompts = random_prompts((1, 20, BLOCK - 2, BLOCK + 1, 40, 60), seed=21)
    prompts += [[*prompts[-1][:50], 7, 8, 9], prompts[-2]]
    options = {"max_num_batched_tokens": 64, "max_model_len": 96, "num_gpu_blocks_override": blocks}
    found = run_v2(
        {
            "model": str(case.model_dir),
            "caprese": {**(case.caprese or {}), "statistics_page": BLOCK, "statistics_mib": 256},
            "engine": DEFAULTS | options,
            "prompts": prompts,
            "new_tokens": 30,
            "async": asynchronous,
        }
    )
    assert found["v2"], "the test must run the V2 runner"
    assert found["async"] is asynchronous
    assert found["report"]["method"] == method
    assert found["preempted"] > 0, "the test must preempt"
    assert (found["loaded"] > 0) == (core != 1.0), "the test must find a prefix in the cache"
    assert found["report"]["core"] == (core or 0.0)
    check(found["tokens"], case.expected(prompts, 30), f"V2, {architecture}, {method}, core {core}")


def test_triton_kernels_in_the_engine(model_dir: ModelDir, tmp_path: Path) -> None:
    """The GPU's path from scheduler to kernel, with Triton's interpreter for a GPU."""
    case = new_case(model_dir, tmp_path, "llama", "griffin", True)
    prompts = random_prompts((1, 20), seed=22)
    caprese = {**case.caprese, "kernel": "triton"}
    job = {"model": str(case.model_dir), "caprese": caprese, "engine": DEFAULTS, "prompts": prompts, "new_tokens": 4}
    found = run_v2(job)
    assert found["report"]["kernel"] == "triton"
    check(found["tokens"], case.expected(prompts, 4), "V2 with Triton kernels")


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX") or "g++"), reason="needs a C++ compiler: $CXX or g++")
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_kernels_on_a_cpu(model_dir: ModelDir, tmp_path: Path, kernel: str) -> None:
    """Both give the same tokens; "auto" is the compiled one, which never reads the weights of dropped neurons."""
    case = new_case(model_dir, tmp_path, "qwen3", "griffin", True)
    prompts = random_prompts((9, 17), seed=23)
    with engine(case.model_dir, {**case.caprese, "kernel": kernel}) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), case.expected(prompts), kernel)
        report = llm.collective_rpc("caprese_report")[0]
        assert report["kernel"] == ("cpu" if kernel == "auto" else kernel)


def test_compiled(model_dir: ModelDir, tmp_path: Path) -> None:
    """torch.compile around our op: the same tokens, and the model was compiled."""
    case = new_case(model_dir, tmp_path, "qwen2", "griffin", True)
    prompts = random_prompts(LENGTHS)
    with engine(case.model_dir, case.caprese, enforce_eager=False, max_num_batched_tokens=64) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
        check(generate(llm, prompts, greedy(NEW_TOKENS)), case.expected(prompts), "compiled")


def test_an_adapter_in_the_models_own_directory(model_dir: ModelDir, tmp_path: Path) -> None:
    """vLLM takes every safetensors file of a model's directory as its weights; with the flag it must not."""
    directory = tmp_path / "model"
    shutil.copytree(model_dir("llama"), directory)
    case = new_case(lambda _: directory, directory, "llama", "griffin", True)
    prompts = random_prompts(LENGTHS[:3])
    expected = case.expected(prompts)
    for weights in (directory, case.adapter):
        with engine(directory, {"weights": str(weights)}) as llm:
            check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, f"weights: {weights}")
    # A model in PyTorch's own format: the adapter is then the only safetensors file.
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with engine(directory, {"weights": str(directory)}) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, "weights in pytorch_model.bin")


def test_dummy_weights(model_dir: ModelDir, tmp_path: Path) -> None:
    """--load-format dummy, for measuring speed without a checkpoint: the blocks are replaced and generate."""
    case = new_case(model_dir, tmp_path, "llama", "griffin", True)
    with engine(case.model_dir, case.caprese, load_format="dummy") as llm:
        (tokens,) = generate(llm, random_prompts([9]), greedy(NEW_TOKENS))
        assert len(tokens) == NEW_TOKENS
        assert llm.collective_rpc("caprese_report")[0]["generated_tokens"] == NEW_TOKENS - 1


def test_weights_live_once(model_dir: ModelDir, tmp_path: Path) -> None:
    """Every FF weight is in packed storage, and vLLM's own parameters are views of it; nothing was copied."""
    case = new_case(model_dir, tmp_path, "mistral", "cats", True)
    with engine(case.model_dir, case.caprese) as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        state = model.caprese
        assert len(state.blocks) == 4
        for block in state.blocks:
            packed = block.packed
            rows = 2 * packed.num_neurons + packed.rank
            up = block.block.up.weight.untyped_storage()
            assert up.nbytes() == rows * packed.hidden_size * 4
            assert up.data_ptr() == packed.up_plus.untyped_storage().data_ptr()
            down = block.block.down.weight.untyped_storage()
            assert down.nbytes() == packed.down_plus.nbytes
            assert down.data_ptr() == packed.down_plus.data_ptr()
        report = llm.collective_rpc("caprese_report")[0]
        assert report["generated_tokens"] == 0
        assert report["ff_weights_read"] is None


@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_report_counts_what_generated_tokens_need(model_dir: ModelDir, tmp_path: Path, method: str) -> None:
    case = new_case(model_dir, tmp_path, "qwen2", method, True)
    prompts = random_prompts((5, 9), seed=5)
    with engine(case.model_dir, case.caprese) as llm:
        generate(llm, prompts, greedy(NEW_TOKENS))
        report = llm.collective_rpc("caprese_report")[0]
    # The first token comes from the prompt's own pass, and the last is never fed.
    assert report["generated_tokens"] == len(prompts) * (NEW_TOKENS - 1)
    neurons, rank = 160, 8
    low_rank = 2 * rank / (3 * neurons)
    if method == "griffin":  # half the layers, half the neurons
        assert report["ff_weights_read"] == pytest.approx(0.5 + 0.5 * (0.5 + low_rank))
    else:  # the gate whole, and about half of up and down: |g| of generated tokens is not that of the prompt's
        assert report["ff_weights_read"] == pytest.approx(1 / 3 + 2 / 3 * 0.5 + low_rank, abs=0.1)
