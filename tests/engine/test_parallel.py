"""Models split among processes: tensor parallel (each holds a part of every FF block) and pipeline parallel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_kernels.reference import NUM_MAGNITUDES
from caprese_vllm.ranks import Ranks
from caprese_vllm.state import merge
from tests.support.core import mass_outside
from tests.support.engine import engine, generate, greedy
from tests.support.equality import BUDGET, LENGTHS, NEW_TOKENS, ROUNDING, Case, check, differing, new_case
from tests.support.models import make_adapter, random_prompts

ModelDir = Callable[[str], Path]
RANKS = 2
SPLIT: dict[str, Any] = {"distributed_executor_backend": "mp", "max_num_batched_tokens": BUDGET}
TENSOR_PARALLEL = SPLIT | {"tensor_parallel_size": RANKS}


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core for each; they start afresh, as a fork would inherit this process's threads' locks."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def gathered(worker: Any) -> list[Any]:
    """Runs in a worker: counts as large as a histogram's, and norms, gathered from all ranks."""
    ranks = Ranks(worker.rank, RANKS)
    counts = torch.arange(NUM_MAGNITUDES).expand(3, -1) + (worker.rank << 40)
    both = torch.arange(NUM_MAGNITUDES).expand(3, -1) * 2 + (1 << 40)
    norms = ranks.norms(torch.tensor([3.0, 0.0, 3e38, 1.0]) * (1 + worker.rank))
    return [torch.equal(ranks.counts(counts), both), norms.tolist()]


def proof(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines printed so far that report replaced blocks."""
    return [line for said in capfd.readouterr() for line in said.splitlines() if "FF blocks replaced" in line]


# L and R of rank 7 do not divide by the ranks: one holds a row of zeros. llama-bias: down_proj's bias counts once.
@pytest.mark.parametrize(
    ("architecture", "method", "rank"),
    [
        ("llama-bias", "griffin", 7),
        ("mistral", "griffin", None),
        ("gemma2", "cats", 8),
        ("llama-bias", "cats", None),
    ],
)
def test_tensor_parallel(
    model_dir: ModelDir,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    architecture: str,
    method: str,
    rank: int | None,
) -> None:
    """Greedy tokens equal the reference's for as many ranks: chunks and lengths of all kinds, some requests off."""
    directory = model_dir(architecture)
    adapter = None if rank is None else make_adapter(directory, tmp_path / "a.safetensors", method, rank=rank)
    case = Case(directory, method, adapter)
    prompts = random_prompts(LENGTHS, seed=31)
    sparse, dense = case.expected(prompts, tp=RANKS), case.expected(prompts[1::2], method=None)
    assert differing(sparse[1::2], dense) >= len(dense) - 1
    if method == "griffin":  # a threshold over all ranks' neurons is no other for their being split
        assert differing(sparse, case.expected(prompts)) > len(prompts) // 2, "the split must change the selection"
    with engine(directory, case.caprese, **TENSOR_PARALLEL) as llm:
        lines = proof(capfd)
        params = [greedy(NEW_TOKENS)] * len(prompts) + [greedy(NEW_TOKENS, caprese="off")] * len(dense)
        found = generate(llm, prompts + prompts[1::2], params)
        check(found[: len(prompts)], sparse, f"{architecture}, {method}, {RANKS} ranks")
        check(found[len(prompts) :], dense, "off")
        assert llm.collective_rpc(gathered) == [[True, pytest.approx([45**0.5, 0.0, torch.inf, 5**0.5])]] * RANKS
        reports = llm.collective_rpc("caprese_report")
    assert len(lines) == 1
    assert "in the first of 2 processes" in lines[0]
    assert [report["generated_tokens"] for report in reports] == [len(prompts) * (NEW_TOKENS - 1)] * RANKS
    share = merge(reports)["ff_weights_read"]
    low_rank = RANKS * 2 * -(-(rank or 0) // RANKS) / (3 * 160)
    if method == "griffin":  # half the layers, half the neurons
        assert share == pytest.approx(0.5 + 0.5 * (0.5 + low_rank))
    else:  # the gate whole, about half of up and down, which need not be so on each rank
        assert share == pytest.approx(1 / 3 + 2 / 3 * 0.5 + low_rank, abs=0.1)
        assert reports[0]["ff_weights_read"] != reports[1]["ff_weights_read"]
        assert share == pytest.approx(sum(report["ff_weights_read"] for report in reports) / RANKS)


@pytest.mark.parametrize("core", [0.5, 1.0])
def test_tensor_parallel_with_a_core(model_dir: ModelDir, tmp_path: Path, core: float) -> None:
    """Each rank permutes and selects among its own neurons, by its part of the prior; the score's norms are of both."""
    selection = {"score": "weighted", "prior": 0.5, "core": core}
    directory = model_dir("llama-bias")
    adapter = make_adapter(directory, tmp_path / "a.safetensors", "griffin", rank=7, selection=selection)
    case = Case(directory, "griffin", adapter, selection=selection)
    prompts = [p for p in random_prompts(LENGTHS, seed=31) if min(case.one(p, tp=RANKS).margins) > ROUNDING]
    assert len(prompts) >= len(LENGTHS) - 2
    expected = case.expected(prompts, tp=RANKS)
    assert differing(expected, case.expected(prompts)) > len(prompts) // 2, "the split must change the selection"
    with engine(directory, case.caprese, **TENSOR_PARALLEL) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, f"core {core}, {RANKS} ranks")
        reports = llm.collective_rpc("caprese_report")
        check(generate(llm, prompts[::-1], greedy(NEW_TOKENS)), expected[::-1], f"core {core}, {RANKS} ranks, again")
    # Each rank measures its own neurons' part of the prompts' activation mass.
    assert all(0 < report["prompt_mass"][0] < report["prompt_mass"][1] for report in reports)
    merged = merge(reports)
    assert merged["prompt_mass"][1] == pytest.approx(sum(map(len, prompts)), rel=1e-5)
    assert merged["prompt_mass_outside_core"] == pytest.approx(mass_outside(case, prompts, 1, RANKS), rel=1e-4)


@pytest.mark.parametrize(("architecture", "method"), [("llama-bias", "griffin"), ("qwen2", "cats")])
def test_tensor_parallel_with_reselection(model_dir: ModelDir, tmp_path: Path, architecture: str, method: str) -> None:
    """In a round each rank adds its own neurons' statistic; GRIFFIN's norms and CATS's counts are of both."""
    case = new_case(model_dir, tmp_path, architecture, method, True, reselect=8)
    prompts, new = random_prompts(LENGTHS, seed=31), 24  # two rounds
    expected = case.expected(prompts, new, tp=RANKS)
    assert differing(expected, case.expected(prompts, new, tp=RANKS, reselect=None)) > 0, "rounds must change tokens"
    with engine(case.model_dir, case.caprese, **TENSOR_PARALLEL) as llm:
        check(generate(llm, prompts, greedy(new)), expected, f"{architecture}, {method}, {RANKS} ranks")
        reports = llm.collective_rpc("caprese_report")
    assert [report["reselections"] for report in reports] == [2 * len(prompts)] * RANKS


def test_tensor_parallel_without_caprese(model_dir: ModelDir) -> None:
    """What the tests above compare with: plain vLLM gives the dense reference's tokens on two ranks too."""
    case = Case(model_dir("llama-bias"), None)
    prompts = random_prompts(LENGTHS[-3:], seed=31)
    with engine(case.model_dir, **TENSOR_PARALLEL) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), case.expected(prompts), "plain vLLM")


def test_pipeline_parallel(model_dir: ModelDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each stage has its layers' blocks, here two and one of four, and chunks of one prompt are under way in both.

    Not eager: vLLM's V1 runner makes a stage's input buffers in its warm-up, which eager mode leaves out on a CPU.
    """
    directory = model_dir("qwen2")
    adapter = make_adapter(directory, tmp_path / "a.safetensors", "griffin", layers=[0, 1, 3])
    case = Case(directory, "griffin", adapter, layers=[0, 1, 3])
    prompts = random_prompts(LENGTHS, seed=31)
    expected = case.expected(prompts)
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
    with engine(directory, case.caprese, **SPLIT, pipeline_parallel_size=2, **compiled) as llm:
        lines = proof(capfd)
        check(generate(llm, prompts, greedy(NEW_TOKENS)), expected, "two stages")
        reports = llm.collective_rpc("caprese_report")
    assert len(lines) == 1
    assert "3 of 4 FF blocks" in lines[0]
    spared = 0.5 - 2 * 8 / (3 * 160)  # of a block: half its neurons, but L and R
    assert [report["ff_weights_read"] for report in reports] == pytest.approx([1 - 2 * spared / 4, 1 - spared / 4])
    assert merge(reports)["ff_weights_read"] == pytest.approx(1 - 3 * spared / 4)
