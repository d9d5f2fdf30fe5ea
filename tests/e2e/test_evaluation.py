"""The accuracy benchmarks with a real server: the demo's model, its GRIFFIN adapter, and the counters that prove it."""

import json
from pathlib import Path
from typing import Any

import pytest

from caprese_bench.evaluation.accuracy import accuracy
from caprese_bench.evaluation.coverage import coverage
from caprese_bench.evaluation.length import length
from caprese_bench.evaluation.variants import load_served_model
from caprese_bench.results import schemas
from caprese_serve.demo import ADAPTERS, MODEL

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="the demo model is not in this tree")
GRIFFIN = "Caprese (GRIFFIN)"


def rows(path: Path) -> list[dict[str, Any]]:
    assert schemas.check(path) > 0
    return json.loads(path.read_text())["rows"]


def test_every_verb(tmp_path: Path) -> None:
    model = load_served_model(None, [], None, "", "full,caprese-griffin")
    ((host, asked),) = model.servers()
    assert [variant.label for variant in asked] == ["Full", GRIFFIN]
    with model.serving(host, tmp_path / "log", True) as server:
        given: dict[str, Any] = {"url": server.url, "model": str(MODEL), "weights": [str(ADAPTERS["griffin"])]}
        accuracy(**given, limit=40, out=tmp_path)
        coverage(**given, limit=6, samples=8, pools=2, temperature=1.0, out=tmp_path)
        length(**given, limit=40, out=tmp_path)  # of the responses that accuracy stored
    graded = {(row["task"], row["variant"]): row for row in rows(tmp_path / "accuracy.json")}
    assert len(graded) == 4
    for (_, variant), row in graded.items():
        assert row["score"] >= 0.85
        generated = round(row["tokens"] * 40)
        assert row["sparse_tokens"] == (0 if variant == "Full" else generated - 40)
        assert row["ff_weights_read"] == pytest.approx(1.0 if variant == "Full" else 0.78125)
    lengths = {row["variant"]: row["tokens"] for row in rows(tmp_path / "length.json") if row["difficulty"] == "all"}
    assert lengths == {variant: graded["word problems", variant]["tokens"] for variant in ("Full", GRIFFIN)}
    pooled = {(row["variant"], row["k"]): row for row in rows(tmp_path / "coverage.json")}
    assert len(pooled) == 16
    for variant in ("Full", GRIFFIN):
        series = [pooled[variant, k]["coverage"] for k in range(1, 9)]
        assert series == sorted(series)
        assert series[-1] > 0.5
        samples = 6 * 8 * 2
        generated = round(pooled[variant, 1]["tokens"] * samples)
        assert pooled[variant, 1]["sparse_tokens"] == (0 if variant == "Full" else generated - samples)
