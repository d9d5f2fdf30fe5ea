"""`caprese bench recovery --quick`: complete rows, nothing done twice, given adapters; and its arithmetic."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from caprese_bench.cli import app
from caprese_bench.hugging_face import decoding as hf_decode
from caprese_bench.recovery import adapters as recovery_adapters
from caprese_bench.recovery.adapters import STAGES
from caprese_bench.recovery.recovery import Findings, recovered, remarks, row
from caprese_distill.end_to_end.train import Trainer
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tools.demo_adapters import SETTINGS

torch.set_num_threads(1)
VARIANTS = ["Full", "GRIFFIN", *STAGES.values()]


def run(out: Path, *more: str) -> Any:
    words = ["recovery", "--quick", "--problems", "6", "--samples", "24", "--out", str(out), *more]
    result = CliRunner().invoke(app, words)
    if result.exception:
        raise result.exception
    return result.output


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "recovery.json").read_text())["rows"]


@pytest.fixture(autouse=True)
def griffin_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SETTINGS, "cats")


def test_quick_killed_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(recovery_adapters, "fit", killed)  # before LoRA
        with pytest.raises(Killed):
            run(tmp_path)
    partial = json.loads((tmp_path / "recovery.json").read_text())
    assert partial["partial"]
    assert [r["variant"] for r in partial["rows"]] == VARIANTS[:5]

    with monkeypatch.context() as patch:  # what was trained is not trained again
        patch.setattr(recovery_adapters, "distill_layer_wise", killed)
        patch.setattr(recovery_adapters, "distill_end_to_end", killed)
        output = run(tmp_path)
    for r in rows_of(tmp_path):
        assert r.items() >= {"section": "GRIFFIN, density 0.5, layers 0, 1", "problems": 6}.items()
        assert 0 <= r["math"] <= 1
        assert 0 <= r["reading"] <= 1
    by_name = {r["variant"]: r for r in rows_of(tmp_path)}
    assert list(by_name) == VARIANTS
    assert [r["parameters"] for r in by_name.values()] == [0, 0, *[2 * 2 * 128 * 48] * 3, *[2 * 3 * 6 * 640] * 2]
    assert by_name["Full"]["ff_error"] == by_name["Full"]["hidden_error"] == 0
    assert by_name["GRIFFIN"]["ff_error"] > by_name["layer-wise, closed form"]["ff_error"] > 0.1
    assert by_name["GRIFFIN"]["hidden_error"] > by_name["layer-wise, closed form"]["hidden_error"] > 0.05
    assert all(by_name[name]["seconds"] > 0 for name in STAGES.values())
    assert by_name["end to end"]["seconds"] > by_name["layer-wise, closed form"]["seconds"]
    assert by_name["LoRA, end to end"]["seconds"] > by_name["LoRA, layer-wise"]["seconds"]
    assert "GRIFFIN loses" in output
    assert "layer-wise, closed form" in (tmp_path / "recovery.html").read_text()
    kept = {path.name for path in (tmp_path / "recovery").iterdir()}
    files = {f"griffin-{stage}.{kind}" for stage in STAGES for kind in ("json", "safetensors")}
    assert kept == {"full.json", "griffin-plain.json"} | files

    whole = rows_of(tmp_path)
    with monkeypatch.context() as patch:  # nothing is left to do
        patch.setattr(hf_decode, "decode", killed)
        patch.setattr(Trainer, "__init__", killed)
        patch.setattr(recovery_adapters, "distill_layer_wise", killed)
        run(tmp_path)
        assert rows_of(tmp_path) == whole
        with pytest.raises(Killed):
            run(tmp_path, "--seed", "2")  # other samples: everything is trained again

    def wrong(*_: object, **__: object) -> None:
        pytest.fail("nothing of this depends on what changed")

    with monkeypatch.context() as patch:  # one learning rate: its stage alone
        patch.setitem(SETTINGS, "griffin", replace(SETTINGS["griffin"], end_to_end=1e-3))
        patch.setattr(recovery_adapters, "distill_end_to_end", killed)
        patch.setattr(recovery_adapters, "distill_layer_wise", wrong)
        with pytest.raises(Killed):
            run(tmp_path)

    given = tmp_path / "given"
    given.mkdir()
    for stage in STAGES:
        shutil.copy(tmp_path / "recovery" / f"griffin-{stage}.safetensors", given)
    with monkeypatch.context() as patch:  # given adapters are used as they are
        patch.setattr(Trainer, "__init__", killed)
        patch.setattr(recovery_adapters, "distill_layer_wise", killed)
        run(tmp_path / "new", "--adapters", str(given), "--seed", "2")
    assert [r["variant"] for r in rows_of(tmp_path / "new")] == VARIANTS
    assert not list((tmp_path / "new" / "recovery").glob("*.safetensors"))

    other = Adapters.load(given / "griffin-adam.safetensors")
    other.config.density = 0.25
    other.save(given / "griffin-adam.safetensors")
    with pytest.raises(CapreseError, match=r"griffin-adam.*: expected griffin, density 0.5, .* found .* 0.25"):
        run(tmp_path / "new", "--adapters", str(given))
    with pytest.raises(CapreseError, match="--adapters: expected a folder"):
        run(tmp_path / "new", "--adapters", str(tmp_path / "nowhere"))


def test_the_share_recovered() -> None:
    """Its error against that of many draws of the problems; nothing where no loss shows."""
    draw = random.Random(0)
    kinds = {("1", "1", "1"): 40, ("1", "0", "1"): 45, ("1", "0", "0"): 10, ("0", "0", "1"): 2, ("1", "1", "0"): 3}

    def marks(count: int) -> list[str]:
        drawn = draw.choices(list(kinds), weights=list(kinds.values()), k=count)
        return ["".join(each) for each in zip(*drawn, strict=True)]

    found = [recovered(*marks(500)) for _ in range(400)]
    shares = [each[0] for each in found if each]
    assert mean(shares) == pytest.approx(44 / 55, abs=0.01)
    assert mean(each[1] for each in found if each) == pytest.approx(stdev(shares), rel=0.1)
    assert recovered("1111", "1101", "1111") is None
    assert recovered("1111", "1111", "1111") is None
    full, plain = "1" * 100, "0" * 50 + "1" * 50
    assert recovered(full, plain, full) == (1.0, 0.0)
    assert recovered(full, plain, plain) == (0.0, 0.0)


def test_rows_and_remarks() -> None:
    def found(right: int) -> Findings:
        marks = "1" * right + "0" * (100 - right)
        return Findings({"math": marks, "reading": "1" * 100}, 10, 2.0, 0.1, 0.2)

    full, plain, best = found(90), found(50), found(80)
    parts = (("Full", full, None), ("CATS", plain, None), ("best", best, plain))
    rows = [row("s", name, each, over, full) for name, each, over in parts]
    assert (rows[2]["math"], rows[2]["math_stderr"]) == (0.8, pytest.approx(0.04))
    assert (rows[2]["math_below_full"], rows[2]["math_below_full_stderr"]) == (pytest.approx(0.1), pytest.approx(0.03))
    assert rows[2]["math_recovered"] == pytest.approx(0.75)
    assert rows[2]["reading_recovered"] is None
    assert rows[1]["math_recovered"] is None
    assert remarks(rows) == [
        "CATS loses 40.0 ± 4.9 points of math; best gives back 75% ± 7.",
        "CATS loses 0.0 ± 0.0 points of reading; best is 0.0 ± 0.0 below Full.",
    ]
