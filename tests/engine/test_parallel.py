"""Models split among processes: tensor parallel (each holds a part of every FF block) and pipeline parallel."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from caprese_vllm.ff import merge
from tests.engine.test_equality import BLOCK, BUDGET, LENGTHS, NEW_TOKENS, Case, check, differing
from tests.support.engine import engine, generate, greedy
from tests.support.models import make_adapter, random_prompts

ModelDir = Callable[[str], Path]
RANKS = 2
SPLIT: dict[str, Any] = {"distributed_executor_backend": "mp", "max_num_batched_tokens": BUDGET}
TENSOR_PARALLEL = SPLIT | {"tensor_parallel_size": RANKS}


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One core for each; they start afresh, as a fork would inherit this process's threads' locks."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    yield


# L and R of rank 7 do not divide by the ranks: one of them holds a row of zeros. llama-bias: down_proj's bias counts once.
@pytest.mark.parametrize(
    ("architecture", "method", "rank"),
    [
        ("qwen2", "griffin", 8),
        ("llama-bias", "griffin", 7),
        ("mistral", "griffin", None),
        ("gemma2", "cats", 7),
        ("llama-bias", "cats", None),
    ],
)
def test_tensor_parallel(model_dir: ModelDir, tmp_path: Path, architecture: str, method: str, rank: int | None) -> None:
    """Greedy tokens equal the reference's, told of the ranks: chunks and lengths of all kinds, requests that are off."""
    directory = model_dir(architecture)
    adapter = None if rank is None else make_adapter(directory, tmp_path / "a.safetensors", method, rank=rank)
    case = Case(directory, method, adapter)
    prompts = random_prompts(LENGTHS, seed=31)
    sparse, dense = case.expected(prompts, tp=RANKS), case.expected(prompts, method=None)
    assert differing(sparse, dense) >= len(prompts) - 1
    if method == "griffin":  # a threshold over all ranks' neurons is no other for their being split
        assert differing(sparse, case.expected(prompts)) > len(prompts) // 2, "the split must change the selection"
    with engine(directory, case.caprese, **TENSOR_PARALLEL) as llm:
        check(generate(llm, prompts, greedy(NEW_TOKENS)), sparse, f"{architecture}, {method}, {RANKS} ranks")
        reports = llm.collective_rpc("caprese_report")
        params = [greedy(NEW_TOKENS), greedy(NEW_TOKENS, caprese="off")] * len(prompts)
        found = generate(llm, [prompt for prompt in prompts for _ in range(2)], params)
        check(found[0::2], sparse, "beside requests that are off")
        check(found[1::2], dense, "off")
    assert [report["generated_tokens"] for report in reports] == [len(prompts) * (NEW_TOKENS - 1)] * RANKS
    share = merge(reports)["ff_weights_read"]
    low_rank = RANKS * 2 * -(-(rank or 0) // RANKS) / (3 * 160)
    if method == "griffin":  # half the layers, half the neurons
        assert share == pytest.approx(0.5 + 0.5 * (0.5 + low_rank))
    else:  # the gate whole, about half of up and down, which need not be so on each rank
        assert share == pytest.approx(1 / 3 + 2 / 3 * 0.5 + low_rank, abs=0.1)
        assert reports[0]["ff_weights_read"] != reports[1]["ff_weights_read"]
        assert share == pytest.approx(sum(report["ff_weights_read"] for report in reports) / RANKS)
