"""`make gpu-check` where there is no GPU: its messages, its steps, its record."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, kernel_cases

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr == "gpu-check: needs an NVIDIA GPU that torch can use; found none\n"
    assert list(tmp_path.iterdir()) == []


def test_gpu_check_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_check.find_spec
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "triton" else real(name))
    assert "packages missing: triton;" in (gpu_check.missing() or "")


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [
        ("print('fine')", 30, "passed"),
        ("import sys; print('fine'); sys.exit(3)", 30, "failed"),
        # Writes what it has when it is stopped, as the benchmark does.
        ("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('fine')", 1.5, "out of time"),
    ],
)
def test_gpu_check_records_a_step(code: str, seconds: float, status: str) -> None:
    record = gpu_check.run(gpu_check.Step("step", [sys.executable, "-c", code], 60), seconds)
    assert (record["status"], record["output"]) == (status, "fine\n")
    assert record["seconds"] < 20


def test_gpu_check_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(name: str, code: str) -> gpu_check.Step:
        return gpu_check.Step(name, [sys.executable, "-c", code], 20)

    plan: Callable[[Path], list[gpu_check.Step]] = lambda folder: [step("one", "exit(1)"), step("two", "exit(0)")]  # noqa: E731
    monkeypatch.setattr(gpu_check, "steps", plan)
    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200 (test)")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    record = json.loads((tmp_path / "nvidia-h200-test" / "check.json").read_text())
    assert [(row["step"], row["status"]) for row in record["rows"]] == [("one", "failed"), ("two", "passed")]
    assert not record["partial"]
    # No time left: recorded, not started.
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--minutes", "0"])
    assert gpu_check.main() == 0
    record = json.loads((tmp_path / "nvidia-h200-test" / "check.json").read_text())
    assert {row["status"] for row in record["rows"]} == {"out of time"}


def test_gpu_check_plans_every_step_within_the_checkout(tmp_path: Path) -> None:
    steps = gpu_check.steps(tmp_path)
    assert sum("pytest" in step.command for step in steps) == 2
    for step in steps:
        for word in step.command:
            assert not word.startswith("tests") or (ROOT / word).exists()
            assert not word.startswith("--ignore") or (ROOT / word.partition("=")[2]).exists()
        if "--shapes" in step.command:
            names = step.command[step.command.index("--shapes") + 1].split(",")
            assert set(names) <= set(kernel_cases.SHAPES)
