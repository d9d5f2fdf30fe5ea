"""`caprese bench residual` on the demo model: relations that hold for any figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from caprese_bench.recovery.residual import default_ranks, residual
from caprese_bench.recovery.samples import load_model_with_samples
from caprese_bench.results.lists import numbers
from caprese_distill.data.samples import split
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL


def run(out: Path, **options: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"data": None, "samples": 200, "densities": "0.1,0.5", "ranks": None, "layers": None}
    residual(model=str(MODEL), **(given | options), quick=True, out=out)
    return json.loads((out / "residual.json").read_text())["rows"]


def test_the_figure(tmp_path: Path) -> None:
    rows = run(tmp_path)
    error = {(r["section"], r["correction"], r["density"], r["rank"]): r["error"] for r in rows}
    assert len(error) == len(rows) == 3 * 2 * 2 * len(default_ranks(128))
    for (section, correction, density, rank), found in error.items():
        assert 0 <= found < 1.5
        near = 1 + 1e-6  # E'E's trace and the sum of its eigenvalues round differently
        assert error[section, "oracle", density, rank] <= found * near  # no map of x beats the best of its rank
        if rank:  # correction by a higher rank, and density, both help
            assert found <= error[section, correction, density, rank // 2 if rank > 1 else 0]
        assert error[section, correction, 0.5, rank] <= error[section, correction, 0.1, rank]
        assert error["oracle top-k of |z|", "oracle", density, 0] <= error[section, "trained", density, 0] * near
    assert error["GRIFFIN", "oracle", 0.1, 128] == pytest.approx(0, abs=1e-5)  # rank D is all of E
    assert error["GRIFFIN", "trained", 0.1, 128] > 0.05
    assert "<svg" in (tmp_path / "residual.html").read_text()


def test_own_data_and_layers(tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    lines = [{"prompt": f"Ann has {n} apples and {n} pears.", "response": f"{n} + {n} = {2 * n}"} for n in range(3, 43)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = run(tmp_path, data=str(data), ranks="0,4", layers="1,3")
    assert {row["rank"] for row in rows} == {0, 4}
    held_out = split(load_model_with_samples(str(MODEL), str(data), 40).samples)[1]
    provenance = json.loads((tmp_path / "residual.json").read_text())["provenance"]
    settings = provenance["settings"]
    assert provenance["tokens_held_out"] == sum(sample.num_rows for sample in held_out)
    assert (settings["model"], settings["data"]) == ("demo", "own.jsonl")
    assert settings["layers"] == [1, 3]


def test_what_a_user_mistypes(tmp_path: Path) -> None:
    for text in ("", "0.1,x", "2", "nan"):
        with pytest.raises(CapreseError, match=r"--densities: .* numbers from 0.001 to 1"):
            numbers("--densities", text, 0.001, 1)
    with pytest.raises(CapreseError, match="--layers"):
        run(tmp_path, layers="4")
    data = tmp_path / "short.jsonl"
    data.write_text('{"prompt": "a", "response": ""}\n' * 3)
    with pytest.raises(CapreseError, match="2 or more usable"):
        load_model_with_samples(str(MODEL), str(data), 3)
