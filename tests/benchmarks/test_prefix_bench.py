"""`caprese bench prefix`: loads share prefixes, figures are ratios of a round, its engine answers in turn."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.engine_models import ARCHS, write_arch
from benchmarks.engine_process import Engine
from benchmarks.prefix_bench import _row, loads
from caprese_kernels.errors import CapreseError


def shared(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_loads_share_prefixes() -> None:
    jobs = loads(random.Random(0), 1)
    singly, together, turns, best = jobs.values()
    assert [shared(singly[i]["prompts"][0], singly[i + 3]["prompts"][0]) for i in range(3)] == [1100, 1300, 1700]
    assert shared(singly[0]["prompts"][0], singly[1]["prompts"][0]) == 0
    assert all(len(job["prompts"]) == 6 and shared(*job["prompts"][:2]) >= 1100 for job in together)
    first, second = turns[0]["prompts"][0], turns[1]["prompts"][0]
    assert second[: len(first)] == first
    assert [job["n"] for job in best] == [8, 8]


def test_a_row_is_the_median_of_rounds() -> None:
    def runs(*times: float, cached: int) -> list[dict[str, object]]:
        return [{"ttft": [time, time + 2.0], "cached": cached, "prompt": 40} for time in times]

    row = _row("s", "a", "griffin", runs(1.0, 5.0, 2.0, cached=18), runs(1.0, 1.0, 1.0, cached=20))  # means: + 1
    assert (row["ttft_s"], row["ratio"], row["cached_share"], row["rounds"]) == (3.0, 1.5, 0.9, 3)
    assert (row["ttft_iqr_s"], row["ratio_iqr"]) == (2.0, 1.0)


def test_archs(tmp_path: Path) -> None:
    for name in ARCHS:
        assert (write_arch(name, tmp_path) / "config.json").is_file()
    with pytest.raises(CapreseError, match=r"--arch: expected one of qwen2.5-0.5b"):
        write_arch("gpt-5", tmp_path)


def test_an_engine_in_a_process(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_seqs": 8}
    engine = Engine(tmp_path / "log", model=str(model_dir("llama")), caprese={"method": "griffin"}, engine=options)
    try:
        prompts = [list(range(10, 110)), list(range(100, 107))]
        for reset, cached in ((False, [0, 0]), (False, [96, 0]), (True, [0, 0])):
            answer = engine.ask(prompts=prompts, max_tokens=3, reset=reset)
            assert answer["cached"] == cached
            assert len(answer["ttft"]) == len(answer["tpot"]) == 2
            assert min(answer["ttft"] + answer["tpot"]) > 0
        engine.process.kill()
        engine.process.wait()
        with pytest.raises(CapreseError, match=f"read {tmp_path / 'log'}"):
            engine.ask(prompts=prompts, max_tokens=3)
    finally:
        engine.close()
