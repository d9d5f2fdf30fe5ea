"""`caprese bench ablation` in small: rows, what a kill leaves, and both stages."""

import json
from pathlib import Path
from typing import Any

import pytest

from caprese_bench.recovery import ablation as module
from caprese_bench.recovery.ablation import ablation
from caprese_kernels.errors import CapreseError
from caprese_serve.demo import MODEL


def run(out: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"methods": "griffin", "densities": "0.5", "ranks": "0,32", "stage": "layer-wise"}
    given |= {"learning_rate": None, "epochs": 1, "samples": 200, "math": 8, "reading": 2}
    ablation(model=str(MODEL), **(given | {"quick": False, "resume": False} | options), out=out)
    return json.loads((out / "ablation.json").read_text())


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", methods="griffin,cats")
    grade, graded = module.grade_all, []

    def killed(*args: Any) -> Any:
        if len(graded) == 3:
            raise KeyboardInterrupt
        graded.append(grade(*args))
        return graded[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "grade_all", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", methods="griffin,cats")
    left = json.loads((tmp_path / "killed" / "ablation.json").read_text())
    assert left["partial"]
    assert len(left["rows"]) == 3
    resumed = run(tmp_path / "killed", methods="griffin,cats", resume=True)
    assert not resumed["partial"]
    assert resumed["rows"] == whole["rows"]
    sections = [(r["section"], r.get("density"), r.get("rank")) for r in whole["rows"]]
    cells = [(name, 0.5, rank) for name in ("GRIFFIN", "CATS") for rank in (0, 32)]
    assert sections == [("Full", None, None), *cells]
    full, plain, corrected = whole["rows"][:3]
    assert full["math"] > 0.9 > corrected["math"] > plain["math"]
    assert corrected["remaining"] < 1
    assert plain["math_stderr"] == pytest.approx((plain["math"] * (1 - plain["math"]) / 8) ** 0.5)
    with pytest.raises(CapreseError, match="--resume of"):
        run(tmp_path / "killed", methods="griffin,cats", math=9, resume=True)


def test_end_to_end(tmp_path: Path) -> None:
    rows = run(tmp_path, stage="end-to-end", ranks="8", samples=100, math=4, reading=4, learning_rate=2e-3)["rows"]
    assert rows[1]["stage"] == "end-to-end"
    assert rows[1]["hidden_error"] < rows[1]["hidden_error_before"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_user_mistypes(tmp_path: Path) -> None:
    for option, value in (("methods", "griffin,cat"), ("stage", "both"), ("ranks", "0,1000"), ("densities", "0")):
        with pytest.raises(CapreseError, match=f"--{option}: expected"):
            run(tmp_path, **{option: value}, samples=20)
