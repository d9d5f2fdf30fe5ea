"""`make gpu-check`: every GPU test and the kernel benchmark in less than ten minutes, from a checkout alone.

    python3 benchmarks/gpu_check.py [--out benchmarks/results] [--minutes 9.5]

Nothing needs to be installed from here. Each step has a share of the time; one that fails or runs out of it is
recorded and the next begins. Writes check.json and the kernels' results into <out>/<name of the GPU>/.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / name) for name in (".", "kernels", "distill", "serve")]
NEEDED = ("torch", "triton", "numpy", "safetensors", "typer", "rich", "matplotlib", "pytest", "hypothesis")
# Tests of files and configuration, which run anywhere: left out where pydantic is missing, as in images of torch alone.
NEED_PYDANTIC = ("tests/kernels/test_adapters.py", "tests/kernels/test_config.py")
CAPRESE = "import sys; sys.argv[0] = 'caprese'; from caprese_serve.cli import main; main()"
GRACE = 15  # seconds that a stopped step has to write what it measured
NO_TESTS = 5  # pytest's exit code when it finds none


@dataclass
class Step:
    name: str
    command: list[str]
    seconds: float  # at most; less where less is left


def steps(folder: Path) -> list[Step]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not find_spec("pydantic"):
        pytest += [f"--ignore={path}" for path in NEED_PYDANTIC]
    everywhere = ["tests"] if find_spec("vllm") and find_spec("pydantic") else ["tests/kernels"]
    bench = [sys.executable, "-c", CAPRESE, "bench", "kernels", "--device", "cuda", "--out", str(folder)]
    targets = ["--shapes", "llama-3.1-8b,qwen-2.5-14b"]  # the shapes that the kernels' targets are set for
    return [
        Step("tests marked gpu", [*pytest, "-m", "gpu", *everywhere], 150),
        Step("kernels, two shapes", [*bench, *targets, "--sections", "shapes,batch,statistics"], 180),
        Step("kernel tests", [*pytest, "-m", "not gpu", "tests/kernels/test_gpu.py"], 150),
        Step("kernels, two shapes, all sections", [*bench, *targets, "--resume"], 120),
        Step("kernels, all shapes", [*bench, "--resume"], 600),
    ]


def run(step: Step, seconds: float) -> dict[str, Any]:
    """One step's record: status ("passed", "failed", "out of time", "no tests"), seconds, the output's end."""
    begin, stopped = time.monotonic(), threading.Event()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def stop() -> None:
        stopped.set()
        _signal(process, signal.SIGINT)  # the benchmark writes what it has
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)

    timer = threading.Timer(max(0, seconds), stop)
    timer.start()
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    finally:
        timer.cancel()
        _signal(process, signal.SIGKILL)
    status = {0: "passed", NO_TESTS: "no tests" if "pytest" in step.command else "failed"}.get(code, "failed")
    return {
        "step": step.name,
        "status": "out of time" if stopped.is_set() else status,
        "seconds": round(time.monotonic() - begin, 1),
        "given_seconds": round(seconds, 1),
        "returncode": code,
        "command": shlex.join(step.command),
        "output": "".join(lines)[-6000:],
    }


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def missing() -> str | None:
    """What this machine lacks, in one line."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return f"gpu-check: packages missing: {', '.join(absent)}; install them for {sys.executable}"
    import torch

    if not torch.cuda.is_available():
        return "gpu-check: needs an NVIDIA GPU that torch can use; found none"
    return None


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="results go to <out>/<GPU>/")
    options.add_argument("--minutes", type=float, default=9.5, help="for all steps together")
    given = options.parse_args()
    end = time.monotonic() + 60 * given.minutes
    if lacking := missing():
        print(lacking, file=sys.stderr)
        return 1

    import torch
    from rich.console import Console

    from benchmarks.report import Result
    from caprese_serve import environment
    from caprese_serve.provenance import provenance

    Console().print(environment.render(environment.collect()))
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    folder = given.out.resolve() / slug
    result = Result("check", provenance(), keys=["step"], measures=["seconds"])
    for step in steps(folder):
        seconds = min(step.seconds, end - time.monotonic() - GRACE)
        print(f"== {step.name} ({seconds:.0f} s at most)", flush=True)
        if seconds > 0:
            result.rows.append(run(step, seconds))
        else:
            result.rows.append({"step": step.name, "status": "out of time", "seconds": 0.0})
        result.write_json(folder)
    result.partial = False
    result.write_json(folder)
    for row in result.rows:
        print(f"{row['status']:12} {row['seconds']:6.1f} s  {row['step']}")
    print(f"Written: {folder}")
    return int(any(row["status"] == "failed" for row in result.rows))


if __name__ == "__main__":
    if not __package__:  # as a script, which finds nothing of the checkout: begin anew with its folders on the path
        path = os.pathsep.join(FOLDERS)
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]],
            os.environ | {"PYTHONPATH": path},
        )
    sys.exit(main())
