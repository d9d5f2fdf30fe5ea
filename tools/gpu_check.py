"""All checks that need a GPU, run unattended in a checkout, installed or not; a second run continues the first.

    make gpu-check [GPU_PYTHON=python3] [GPU_FLAGS="--stage a|b|both --minutes 9.5 --out FOLDER --small --anew"]

Stage a needs torch and triton: kernel tests, under compute-sanitizer too, the kernels' bandwidth, a decode step of
Qwen 2.5 14B as one CUDA graph. Stage b needs vLLM as well: the demo model's tokens and accuracy, the paper's table 4,
batches and samples of one prompt, the speed of distillation. Each step has a time limit; a step that fails or runs out
of time is recorded, and the next begins. Steps that passed with the same code on the same machine are not run again.

--small runs small versions of the steps on any machine, also without a GPU, to check that they work. Results go to
<out>/<hardware>/, or <hardware>-small/: check.json, a short check.log, and each benchmark's files; results of other
code that are there move to earlier/ first. In a copy without .git, set CAPRESE_GIT_COMMIT to the commit, for the
provenance.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("caprese_vllm", "caprese_kernels", "caprese_distill", "caprese_serve", "caprese_bench")
NEEDED = ("torch", "triton", "numpy", "safetensors", "typer", "rich", "matplotlib", "pytest", "hypothesis")
NEEDED_B = ("vllm", "pydantic", "transformers", "jinja2")
# Tests of files and configuration, which run anywhere: skipped where pydantic is missing, as in images of torch alone.
NEED_PYDANTIC = ("tests/kernels/test_adapters.py", "tests/kernels/test_config.py")
RESULTS = ("check", "kernels", "decode", "exactness", "latency", "distill-speed")
GRACE = 15  # seconds that an interrupted step has to write its results
NO_TESTS = 5  # pytest's exit code when it finds none
LOG_LINES = 12  # of a step's output, in check.log


@dataclass
class Step:
    name: str
    command: list[str]
    seconds: float  # limit; less if less time is left for all steps
    stage: str = "a"
    skipped: str | None = None  # why the step cannot run here


def steps(folder: Path, small: bool = False) -> list[Step]:
    """All steps, the most important first. The `small` ones take minutes on two cores without a GPU."""
    powers = ",".join(str(2**i) for i in range(7))
    sweeps = f"--batch {powers} --n {powers}"
    table4, others = "full,griffin,lora,caprese", "full,caprese-all,cats,caprese-cats"
    if small:
        verbs = [
            ("kernels", "kernels --quick --sections shapes", 240, "a"),
            ("decode step", "decode --quick", 240, "a"),
            ("exactness", "exactness --quick", 300, "b"),
            ("latency", f"latency --quick --variants {table4} --batch 2 --n 2", 400, "b"),
            ("distilling", "distill-speed --quick", 200, "b"),
        ]
    else:
        kernels, latency = "kernels --device cuda", "latency --rounds 3 --variants"
        two = f"{kernels} --shapes llama-3.1-8b,qwen-2.5-14b"  # the shapes that the kernels' targets are set for
        verbs = [
            ("kernels, two shapes", f"{two} --sections shapes,batch,statistics", 150, "a"),
            ("decode step, 14B", "decode", 150, "a"),
            ("kernels, two shapes, all sections", two, 120, "a"),
            ("kernels, all shapes", kernels, 300, "a"),
            ("exactness", "exactness", 240, "b"),
            ("latency, 14B, table 4", f"{latency} {table4} --setups 2048+256,2048+2048", 560, "b"),
            ("latency, 14B, batches", f"{latency} full,caprese --setups 256+64 {sweeps}", 300, "b"),
            ("distilling, 1.5B", "distill-speed", 200, "b"),
            ("latency, 14B, CATS and all layers", f"{latency} {others} --setups 2048+256", 400, "b"),
        ]
    absent = {"a": None, "b": _absent()}
    measured = [
        Step(name, _bench(folder, *verb.split(), "--resume"), seconds, stage, absent[stage])
        for name, verb, seconds, stage in verbs
    ]
    first, *slower = _tests(small)
    return [first, *measured[:2], *slower, *measured[2:]]


def _tests(small: bool) -> list[Step]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not find_spec("pydantic"):
        pytest += [f"--ignore={path}" for path in NEED_PYDANTIC]
    everywhere = ["tests"] if find_spec("vllm") and find_spec("pydantic") and not small else ["tests/kernels"]
    marked = Step("tests marked gpu", [*pytest, "-m", "gpu", *everywhere], 150)
    if small:
        return [marked]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    some = ["tests/kernels/gpu_cases.py", "-k", "gather and fp32 and (check_griffin or check_cats)"]
    absent = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"
    return [
        marked,
        Step("kernel tests", [*pytest, "-m", "not gpu", "tests/kernels/test_gpu.py"], 150),
        Step("kernels under compute-sanitizer", [*sanitizer, *pytest, *some], 90, skipped=absent),
    ]


def _absent() -> str | None:
    missing = [name for name in NEEDED_B if find_spec(name) is None]
    return f"packages missing: {', '.join(missing)}" if missing else None


def _bench(folder: Path, verb: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "caprese_serve", "bench", verb, *flags, "--out", str(folder)]


def run(step: Step, seconds: float) -> dict[str, Any]:
    """Run a step; returns its record: status (passed, failed, out of time, no tests), seconds, the output's end."""
    begin, stopped = time.monotonic(), threading.Event()
    # A shell's background job ignores SIGINT, and its child processes would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def stop() -> None:
        stopped.set()
        _signal(process, signal.SIGINT)  # a benchmark then writes its results so far
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
        "stage": step.stage,
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


def register(folder: Path) -> None:
    """Write the metadata that an installation would, if there is none, to `folder`, and add that to PYTHONPATH: vLLM
    finds the plugin, and `caprese` its verbs, by pyproject.toml's entry points."""
    with suppress(metadata.PackageNotFoundError):
        metadata.distribution("caprese-vllm")
        return
    from caprese_kernels import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    place = folder / f"caprese_vllm-{__version__}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (place / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(folder)) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def missing(small: bool = False) -> str | None:
    """What is missing on this machine, in one line; None if nothing is."""
    if [name for name in PACKAGES if find_spec(name) is None]:
        return "gpu-check: the project is neither installed nor on the path; run it as make gpu-check"
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return f"gpu-check: packages missing: {', '.join(absent)}; install them for {sys.executable}"
    import torch

    if not small and not torch.cuda.is_available():
        return "gpu-check: needs an NVIDIA GPU that torch can use; found none"
    return None


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="results go to <out>/<hardware>/"
    )
    options.add_argument("--minutes", type=float, default=9.5, help="time limit of all steps together")
    options.add_argument("--stage", choices=("a", "b", "both"), default="both")
    options.add_argument("--small", action="store_true", help="small versions of all steps, also without a GPU")
    options.add_argument("--anew", action="store_true", help="also run the steps that passed before")
    given = options.parse_args()
    end = time.monotonic() + 60 * given.minutes
    if lacking := missing(given.small):
        print(lacking, file=sys.stderr)
        return 1

    from rich.console import Console

    from caprese_bench.results.recording import earlier_rows
    from caprese_bench.results.report import Result
    from caprese_serve import environment
    from caprese_serve.provenance import hardware_slug, provenance

    Console().print(environment.render(environment.collect()))
    folder = given.out.resolve() / (hardware_slug() + ("-small" if given.small else ""))
    result = Result("check", provenance() | {"settings": {"small": given.small}}, keys=["step"], measures=["seconds"])
    planned = [step for step in steps(folder, given.small) if given.stage in (step.stage, "both")]
    if not given.anew:
        result.rows = earlier_rows(folder / "check.json", result)
    if not result.rows:
        set_aside(folder)
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "1" if find_spec("flashinfer") else "0")
    with tempfile.TemporaryDirectory() as scratch:
        register(Path(scratch))
        for step in planned:
            if any(row["step"] == step.name and row["status"] == "passed" for row in result.rows):
                print(f"== {step.name}: passed before")
                continue
            record = _do(step, min(step.seconds, end - time.monotonic() - GRACE))
            result.rows = [row for row in result.rows if row["step"] != step.name] + [record]
            _write(result, folder)
    result.partial = False
    _write(result, folder)
    for row in result.rows:
        print(f"{row['stage']} {row['status']:12} {row['seconds']:6.1f} s  {row['step']}")
    print(f"Written: {folder}")
    return int(any(row["status"] == "failed" for row in result.rows))


def set_aside(folder: Path) -> None:
    """Move the results of an earlier check to earlier/, because rows of different code must not be mixed."""
    found = [path for path in folder.glob("*.*") if path.stem in RESULTS]
    if found:
        (folder / "earlier").mkdir(exist_ok=True)
    for path in found:
        path.replace(folder / "earlier" / path.name)


def _do(step: Step, seconds: float) -> dict[str, Any]:
    if step.skipped:
        print(f"== {step.name}: skipped: {step.skipped}", flush=True)
        return {"step": step.name, "stage": step.stage, "status": "skipped", "seconds": 0.0, "output": step.skipped}
    print(f"== {step.name} ({seconds:.0f} s at most)", flush=True)
    if seconds <= 0:
        return {"step": step.name, "stage": step.stage, "status": "out of time", "seconds": 0.0}
    return run(step, seconds)


def _write(result: Any, folder: Path) -> None:
    """Write check.json, and check.log with the last lines of each step's output."""
    result.write_json(folder)
    log = []
    for row in result.rows:
        log.append(f"== {row['stage']} {row['step']}: {row['status']}, {row['seconds']:.0f} s")
        lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", row.get("output") or "").splitlines()
        log += [line.rstrip()[:160] for line in lines if line.strip()][-LOG_LINES:]
    (folder / "check.log").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    sys.exit(main())
