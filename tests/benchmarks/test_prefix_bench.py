"""`caprese bench prefix`: prompts share prefixes, figures are ratios of a round, an engine runs jobs in its process."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from caprese_bench.engine.models import ARCHS, write_arch
from caprese_bench.engine.prefix import CPU, Run, loads, row
from caprese_bench.engine.process import Engine, EngineSettings, first_token, next_token
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
    def runs(*times: float, cached: int) -> list[Run]:
        return [Run([time, time + 2.0], cached, prompt=40) for time in times]

    made = row("s", "a", "griffin", runs(1.0, 5.0, 2.0, cached=18), runs(1.0, 1.0, 1.0, cached=20))  # means: + 1
    assert (made["ttft_s"], made["ratio"], made["cached_share"], made["rounds"]) == (3.0, 1.5, 0.9, 3)
    assert (made["ttft_iqr_s"], made["ratio_iqr"]) == (2.0, 1.0)


def test_archs(tmp_path: Path) -> None:
    for name in ARCHS:
        assert (write_arch(name, tmp_path) / "config.json").is_file()
    with pytest.raises(CapreseError, match=r"--arch: expected one of qwen2.5-0.5b"):
        write_arch("gpt-5", tmp_path)


def test_an_engine_in_a_process(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_seqs": 8}
    model, caprese = str(model_dir("llama")), {"method": "griffin", "density": 0.25, "layers": "all"}
    with Engine(tmp_path / "log", EngineSettings(model, caprese, options, CPU)) as engine:
        prompts = [list(range(10, 110)), list(range(100, 107))]
        for reset, cached in ((False, [0, 0]), (False, [96, 0]), (True, [0, 0])):
            answer = engine.run(prompts=prompts, max_tokens=3, reset=reset)
            assert answer["cached"] == cached
            assert [len(times) for times in answer["times"]] == [3, 3]
            assert all(a < b for times in answer["times"] for a, b in pairwise([0.0, *times]))
        assert first_token(answer) == [times[0] for times in answer["times"]]
        assert next_token(answer)[0] == pytest.approx((answer["times"][0][2] - answer["times"][0][0]) / 2)
        # Two tokens of each answer are generated; the first is the prompt's. A union of two differs from each.
        report = engine.run("report")["caprese"]
        assert (report["generated_tokens"], report["ff_weights_read"]) == (3 * 2 * 2, pytest.approx(0.25, abs=0.01))
        assert engine.run("union", prompts=prompts[:1], max_tokens=20)["union"] == pytest.approx(0.25, abs=0.01)
        assert 0.26 < engine.run("union", prompts=prompts, max_tokens=20)["union"] < 0.5
        assert engine.run("union", prompts=prompts[:1], max_tokens=20, n=3)["union"] == pytest.approx(0.25, abs=0.01)
        assert len(engine.run(prompts=prompts[:1], max_tokens=4, n=3)["times"][0]) == 4  # all samples at once
        engine.terminate()
        with pytest.raises(CapreseError, match=f"read {tmp_path / 'log'}"):
            engine.run(prompts=prompts, max_tokens=3)
