"""docs/results.md is what the measured results say, and holds every table and figure of the paper."""

import re
from pathlib import Path
from typing import get_args

import pytest

from caprese_bench.evaluation.tasks import GROUPS, PublishedRow
from caprese_bench.paper import published as paper
from caprese_bench.results.report import Result
from tools import results_page

PROVENANCE = {"time": "2026-01-01", "command": "x", "versions": {"torch": "1"}, "git_commit": "1"}


def test_the_page_is_the_measured_one() -> None:
    assert results_page.PAGE.read_text() == results_page.page(), "run: python -m tools.results_page"


def test_every_table_and_figure_is_there() -> None:
    assert set(paper.ROWS) == set(get_args(PublishedRow))
    text = results_page.PAGE.read_text()
    for number in range(1, 7):
        assert f"## Table {number}: " in text
    for number in range(2, 8):
        assert re.search(rf"## Figures? .*\b{number}\b", text)


def test_a_published_score_stands_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    assert "| Full | 78.17 / - | " in results_page.page()

    row = {"section": GROUPS["table1"], "task": "GSM8K", "model": "google/gemma-2-9b-it", "variant": "Full"}
    row |= {"published_row": "full", "published": 0.7817, "score": 0.625, "run_std": None, "problems": 200}
    provenance = PROVENANCE | {"hardware": {"cpu": {"model": "c", "cores": 1}}}
    Result("accuracy", provenance, [], [], [row], partial=False).write(tmp_path / "gpu")
    page = results_page.page()
    assert re.search(r"--tasks table2[^\n]*\| not measured \| not measured \|", page)
    assert "| Full | 78.17 / 62.50 (200) | " in page
    assert "| Table 1: instruct models | `caprese bench accuracy --tasks table1" in page
    assert re.search(r"--tasks table1[^\n]*\| gpu \| not measured \|", page)


def test_a_time_stands_beside_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    assert "| 2048+256 | 41 / - | 34 / - | 37 / - | 34 / - |" in results_page.page()
    measured = {
        "section": "one request, qwen2.5-14b", "arch": "qwen2.5-14b", "setup": "2048+256", "variant": "LoRA",
        "dummy_weights": True,
        "rounds": 5, "e2e_s": 2.0, "e2e_iqr_s": 0.1, "ttft_s": 0.1, "tpot_ms": 7.0, "tpot_iqr_ms": 0.1,
        "tpot_p99_ms": 8.0, "ratio": 0.9, "ratio_iqr": 0.01, "predicted_ratio": 0.8, "gb_s": 3000.0,
        "bandwidth_share": 0.9,
    }  # fmt: skip
    provenance = PROVENANCE | {"hardware": {"cpu": {}, "gpus": [{"name": "NVIDIA X"}]}}
    Result("latency", provenance, [], [], [measured], partial=False).write(tmp_path / "x")
    page = results_page.page()
    assert "| 2048+256 | 41 / - | 34 / - | 37 / 7 | 34 / - |" in page
    assert (
        "| LoRA | 2048+256 | 2.00 ± 0.10 | 0.100 | 7.00 ± 0.10 | 8.0 | 0.900 ± 0.010 | 0.800 | 3000.0 | 90% |" in page
    )
    assert "on NVIDIA X, 2026-01-01" in page
