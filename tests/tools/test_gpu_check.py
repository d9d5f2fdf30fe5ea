"""`make gpu-check` where there is no GPU: its messages, its steps, its record."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from caprese_bench import cli
from caprese_bench.kernels import cases as kernel_cases
from caprese_bench.results import schemas
from caprese_serve import provenance
from tools import gpu_check

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "-C", str(ROOT), "gpu-check"]
    command += [f"GPU_PYTHON={sys.executable}", f"GPU_FLAGS=--out {tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "gpu-check: needs an NVIDIA GPU that torch can use; found none"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_gpu_check_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_check.find_spec
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "triton" else real(name))
    assert "packages missing: triton;" in (gpu_check.missing() or "")
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "caprese_bench" else real(name))
    assert "run it as make gpu-check" in (gpu_check.missing() or "")


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

    two = f"import pathlib; pathlib.Path({str(tmp_path / 'runs')!r}).open('a').write('two '); print('well')"
    absent = dataclasses.replace(step("three", "exit(1)"), stage="b", skipped="packages missing: vllm")
    monkeypatch.setattr(gpu_check, "steps", lambda *_: [step("one", "print('ill'); exit(1)"), step("two", two), absent])
    monkeypatch.setattr(gpu_check, "missing", lambda small: None)
    monkeypatch.setattr(provenance, "hardware_slug", lambda: "h200")

    def check(*arguments: str) -> tuple[int, list[tuple[str, str]]]:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *arguments])
        code = gpu_check.main()
        assert schemas.check(tmp_path / "h200/check.json") == 3
        record = json.loads((tmp_path / "h200/check.json").read_text())
        assert not record["partial"]
        return code, [(row["step"], row["status"]) for row in record["rows"]]

    assert check() == (1, [("one", "failed"), ("two", "passed"), ("three", "skipped")])
    log = (tmp_path / "h200/check.log").read_text().splitlines()
    assert [line for line in log if not line.startswith("==")] == ["ill", "well", "packages missing: vllm"]
    # What passed is not run again, unless asked for; what did not is, if there is time.
    assert check("--minutes", "0") == (0, [("two", "passed"), ("one", "out of time"), ("three", "skipped")])
    assert (tmp_path / "runs").read_text() == "two "
    assert check("--stage", "b", "--minutes", "0")[1][-1] == ("three", "skipped")
    assert dict(check("--anew")[1])["two"] == "passed"
    assert (tmp_path / "runs").read_text() == "two two "


def test_the_plugin_is_found_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpu_check.metadata, "distribution", none)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    gpu_check.register(tmp_path)
    assert os.environ["PYTHONPATH"] == os.pathsep.join(["/somewhere", str(tmp_path)])
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert found.name == "caprese-vllm"
    (plugin,) = found.entry_points.select(group="vllm.general_plugins")
    assert (plugin.name, plugin.value) == ("caprese", "caprese_vllm.plugin:register")
    assert found.entry_points.select(group="caprese.commands").names == {
        "bench",
        "calibrate",
        "evaluate",
        "collect-env",
        "demo",
        "distill",
        "inspect",
    }


def test_gpu_check_plans_every_step_within_the_checkout(tmp_path: Path) -> None:
    every, small = gpu_check.steps(tmp_path), gpu_check.steps(tmp_path, small=True)
    assert [sum("pytest" in step.command for step in part) for part in (every, small)] == [3, 1]
    assert all({step.stage for step in part} == {"a", "b"} for part in (every, small))
    for step in [*every, *small]:
        if "bench" in step.command:
            assert step.command[step.command.index("bench") + 1] in cli.VERBS
        for word in step.command:
            assert not word.startswith("tests") or (ROOT / word).exists()
            assert not word.startswith("--ignore") or (ROOT / word.partition("=")[2]).exists()
        if "--shapes" in step.command:
            names = step.command[step.command.index("--shapes") + 1].split(",")
            assert set(names) <= set(kernel_cases.SHAPES)


def test_results_of_other_code_are_set_aside(tmp_path: Path) -> None:
    for name in ("kernels.json", "kernels.csv", "check.log", "demo.json"):
        (tmp_path / name).write_text("old")
    gpu_check.set_aside(tmp_path)
    assert [path.name for path in tmp_path.glob("*.*")] == ["demo.json"]
    assert sorted(path.name for path in (tmp_path / "earlier").iterdir()) == [
        "check.log",
        "kernels.csv",
        "kernels.json",
    ]
    gpu_check.set_aside(tmp_path / "none")


def test_every_result_of_the_steps_is_known(tmp_path: Path) -> None:
    """Else a run of other code would go on with its rows."""
    verbs = {
        step.command[step.command.index("bench") + 1] for step in gpu_check.steps(tmp_path) if "bench" in step.command
    }
    assert {"check", *verbs} == set(gpu_check.RESULTS)
