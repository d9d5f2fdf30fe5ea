"""`make gpu-check --rehearse`, both stages by the command line, for each of stage b's plans.

A stub stands for what only a GPU machine has: Triton's interpreter for its compiler, scripts for nvidia-smi and
compute-sanitizer, small models for large ones. Limits are the real ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from caprese_bench.results import schemas
from tools.gpu_check import pack

ROOT = Path(__file__).parents[2]
STUB = {  # a program on the PATH that does what the real one does as far as the plan can see
    "compute-sanitizer": 'while [ "${1#-}" != "$1" ]; do [ "$1" = --tool ] && tool=$2; shift 2; done\n'
    'case "$1" in memcheck|racecheck) shift;; esac; echo "stub: $tool"; exec "$@"',
    "nvidia-smi": "echo stub GPU",
}
BROKEN_KERNEL = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    def broken(*args, **kwargs):
        raise AssertionError("a wrong sum")
    for item in items[:1]:
        item.obj = broken
"""


def rehearse(tmp_path: Path, *flags: str) -> str:
    """What it printed. `datasets` cannot be imported, as on a machine that serves and does not distill."""
    stubs = tmp_path / "stubs"
    stubs.mkdir(exist_ok=True)
    for name, script in STUB.items():
        (stubs / name).write_text(f"#!/bin/sh\n{script}\n")
        (stubs / name).chmod(0o755)
    (stubs / "broken_kernel.py").write_text(BROKEN_KERNEL)
    (stubs / "datasets.py").write_text("raise ModuleNotFoundError('datasets', name='datasets')")
    paths = [stubs, *(ROOT / name for name in (".", "kernels", "distill", "serve", "benchmarks"))]
    environment = {
        "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tools.gpu_check", "--rehearse", "--out", str(tmp_path / "out"), *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert not done.stderr, done.stderr
    return done.stdout


def statuses(tmp_path: Path, stage: str) -> dict[str, str]:
    """Of the steps, by the archive that came back."""
    pack.unpack(tmp_path / f"out/gpu-check-{stage}.tar.gz", tmp_path / "back" / stage)
    path = tmp_path / "back" / stage / "check.json"
    assert schemas.check(path) > 0
    return {row["step"]: row["status"] for row in json.loads(path.read_text())["rows"]}


def test_rehearsal_with_a_broken_kernel(tmp_path: Path) -> None:
    """Stage b runs on another machine, which has stage a's archive alone."""
    broken = ("--set", "PYTEST_ADDOPTS=-p broken_kernel")
    rehearse(tmp_path, "--stage", "a", "--only", "environment", "--only", "GPU tests", *broken)
    assert statuses(tmp_path, "a") == {"environment": "passed", "GPU tests": "failed"}
    assert "stub GPU" in (tmp_path / "back/a/step-0.log").read_text()
    elsewhere = ("--work", str(tmp_path / "elsewhere"), "--after", str(tmp_path / "out/gpu-check-a.tar.gz"))
    out = rehearse(tmp_path, "--stage", "b", *broken, *elsewhere)
    assert "sanitizer: 1 GPU tests failed" in out
    assert statuses(tmp_path, "b") == dict.fromkeys(
        ("failing tests, one launch at a time", "memcheck", "racecheck"), "failed"
    )
    for position, tool in ((1, "memcheck"), (2, "racecheck")):
        log = (tmp_path / f"back/b/step-{position}.log").read_text()
        assert log.startswith(f"stub: {tool}\n")
        assert "a wrong sum" in log


def test_rehearsal_with_an_engine_that_does_not_start(tmp_path: Path) -> None:
    """A setting that vLLM refuses; stage b corrects it."""
    rehearse(tmp_path, "--stage", "a", "--only", "latency", "--set", "VLLM_LOGGING_LEVEL=NONE")
    assert statuses(tmp_path, "a") == {"latency": "failed"}
    steps = ("--only", "vLLM's log", "--only", "corrected start")
    out = rehearse(tmp_path, "--stage", "b", *steps, "--set", "VLLM_LOGGING_LEVEL=INFO")
    assert "engine: latency: failed, without a figure" in out
    assert statuses(tmp_path, "b") == {"vLLM's log": "passed", "corrected start": "passed"}
    assert "'NONE'" in (tmp_path / "back/b/step-0.log").read_text()
    assert schemas.check(tmp_path / "back/b/latency.json") == 2


def test_rehearsal_that_goes_well(tmp_path: Path) -> None:
    """Both stages in one call."""
    steps = ("--only", "latency", "--only", "latency, batches")
    assert "batches: no GPU test failed, latency: passed" in rehearse(tmp_path, *steps)
    assert statuses(tmp_path, "a") == {"latency": "passed"}
    assert statuses(tmp_path, "b") == {"latency, batches": "passed"}
    assert schemas.check(tmp_path / "back/b/latency.json") == 6
