"""The demo's arithmetic, what it asks of vLLM, and what it writes; the servers are stand-ins."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import run as demo
from caprese_serve.demo.client import Answer
from caprese_serve.demo.problems import Problem
from caprese_serve.demo.results import DemoReport, Score, Served

# How many of ten problems a stand-in answers correctly, by the flag that chooses the variant.
CORRECT = {"": 10, "--caprese-config": 4, "--caprese-weights": 8}


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, adapters: Adapters, tmp_path: Path) -> list[tuple[str, ...]]:
    """Adapters for both methods, and stand-ins for server and client. Returns the flags of each server started."""
    started: list[tuple[str, ...]] = []
    for method in ("griffin", "cats"):
        config = adapters.config.model_copy(update={"method": method})
        Adapters(config, adapters.left, adapters.right).save(tmp_path / f"{method}.safetensors")
        monkeypatch.setitem(demo.ADAPTERS, method, tmp_path / f"{method}.safetensors")  # type: ignore[arg-type]

    @contextmanager
    def server(model: Path, *flags: str, **_: Any) -> Iterator[SimpleNamespace]:
        started.append(flags)
        reported = {
            "rank": 2 if "--caprese-weights" in flags else 0,
            "layers": [0, 1],
            "density": 0.5,
            "method": "griffin",
        }
        counts = iter(
            [{"generated_tokens": 10, "ff_weights_read": 0.9}, {"generated_tokens": 30, "ff_weights_read": 0.7}]
        )
        yield SimpleNamespace(
            url="",
            startup_seconds=1.0,
            get=lambda path: reported | next(counts) | {"kernel": "reference", "enabled": True},
        )

    def ask(
        url: str, model: str, problems: list[Problem], concurrency: int, answered: Callable[[], object] = lambda: None
    ) -> tuple[list[Answer], float]:
        correct = CORRECT[next((flag for flag in started[-1] if flag in CORRECT), "")]
        responses = [p.response if i % 10 < correct else "no idea" for i, p in enumerate(problems)]
        return [Answer(p, response, 20) for p, response in zip(problems, responses, strict=True)], 2.0

    monkeypatch.setattr(demo, "VllmServer", server)
    monkeypatch.setattr(demo, "ask", ask)
    return started


def run(tmp_path: Path, *variants: str) -> DemoReport:
    every = variants or tuple(variant.id for variant in demo.VARIANTS)
    report = demo.run(math=20, reading=10, variants=every, concurrency=4, output=tmp_path / "out" / "demo.json")
    assert report == DemoReport.model_validate_json((tmp_path / "out" / "demo.json").read_text())
    return report


def test_report(servers: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path)
    demo.show(report)
    shown = " ".join("".join(capsys.readouterr()).split())
    names = ["Full", "GRIFFIN", "Caprese (GRIFFIN)", "CATS", "Caprese (CATS)"]
    assert [row.variant for row in report.rows] == names
    assert [row.math_accuracy for row in report.rows] == [1.0, 0.4, 0.8, 0.4, 0.8]
    assert [row.reading_accuracy for row in report.rows] == [1.0, 0.4, 0.8, 0.4, 0.8]
    assert {row.mean_tokens for row in report.rows} == {20.0}
    assert {row.tokens_per_s for row in report.rows} == {30 * 20 / 2.0}
    # (0.7 * 30 - 0.9 * 10) / (30 - 10): without the warm-up's tokens
    assert [row.ff_weights_read for row in report.rows] == [1.0, *[pytest.approx(0.6)] * 4]
    assert {"command", "hardware", "versions", "git_commit", "source", "time"} == set(report.provenance)
    assert (
        "GRIFFIN (density 0.5, layers 0, 1) loses 60.0 ± 11.0 points of math accuracy; Caprese (rank 2) gives back"
        in shown
    )
    assert "gives back 40.0 ± 11.0, 67% of it." in shown
    assert "20 math and 10 reading problems" in shown
    assert "masks the weights" in shown
    assert "--caprese-weights" in shown
    assert "caprese distill" in shown


def test_the_baseline_takes_density_and_layers_of_its_adapter(servers: list[tuple[str, ...]], tmp_path: Path) -> None:
    run(tmp_path, "full", "cats", "caprese-cats")
    full, plain, caprese = servers
    assert not any("caprese" in flag for flag in full if flag != demo.SERVED_NAME)
    assert json.loads(plain[-1]) == {"method": "cats", "density": 0.5, "layers": [0, 1]}
    assert caprese[-2:] == ("--caprese-weights", str(demo.ADAPTERS["cats"]))


def test_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapreseError, match="--variants: expected some of full,griffin"):
        run(tmp_path, "grifin")


def test_errors_of_paired_answers() -> None:
    score = Score.of([True] * 9 + [False])
    assert score.accuracy == 0.9
    assert score.stderr == pytest.approx((0.9 * 0.1 / 10) ** 0.5)
    assert score.gain_over(score) == (0.0, 0.0), "the same answers differ by nothing, with certainty"
    gain, error = score.gain_over(Score.of([False] * 10))
    assert (gain, error) == (0.9, pytest.approx(score.stderr))


def test_a_server_that_counts_nothing_is_no_result() -> None:
    served = Served(
        method="griffin", density=0.5, rank=0, layers=[0], kernel="reference", generated_tokens=5, ff_weights_read=0.5
    )
    with pytest.raises(CapreseError, match="found 0 tokens"):
        served.share_since(served)
