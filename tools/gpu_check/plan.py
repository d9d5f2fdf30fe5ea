"""The steps of both stages, their limits, and which of its three plans stage b follows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from caprese_bench.engine.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"a": 540.0, "b": 240.0}  # seconds of a stage, all steps together
Branch = Literal["batches", "sanitizer", "engine"]

# The smallest memory, in GiB, that holds four engines of a shape at once: their weights, and 5 GiB each for KV cache,
# graphs and CUDA's own, as caprese_bench/engine/engines.py counts. Four engines that take turns are one round's ratios.
FOUR_ENGINES = {"qwen2.5-14b": 131, "qwen2.5-7b": 78, "qwen2.5-1.5b": 32}
SMALLEST = "qwen2.5-0.5b"

GPU_TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/gpu_cases.py")
# Runs gpu_cases.py in a process of its own, one test after another, and compiles kernels, which needs no GPU.
NOT_HERE = "tests/kernels/test_gpu.py::test_kernels"
FAILED = Path("pytest/v/cache/lastfailed")  # of pytest's cache: {test's id: true}
MOST_FAILED = 8  # failing tests that stage b looks at


@dataclass(frozen=True)
class Step:
    """`seconds`: its limit. `spare`: it may also use time that no later step needs. `beside`: starts together with the
    step before it. `needs`: modules and programs without which it is skipped."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    spare: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Context:
    """What the steps need to know. `small`: a rehearsal, on any machine; `unpack`: the command that makes `site`."""

    folder: Path  # of this stage's results
    earlier: Path  # of stage a's
    arch: str = "qwen2.5-14b"
    small: bool = False
    unpack: tuple[str, ...] | None = None


def arch_for(memory_gib: float) -> str:
    """The largest shape of which four engines fit into a GPU's memory."""
    return next((arch for arch, needed in FOUR_ENGINES.items() if memory_gib >= needed), SMALLEST)


def stage_a(context: Context) -> list[Step]:
    """The most important figures of a first run; 470 of 540 seconds, the rest for `latency` or to end in time."""
    arch = ("--arch", context.arch)
    steps = [
        Step("environment", _environment(), 60),
        Step("GPU tests", _gpu_tests(context), 60, beside=True),
    ]
    if context.unpack:
        steps.append(Step("unpack vLLM", context.unpack, 60, beside=True))
    if context.small:
        few = ("--quick", "--variants", "full,caprese-griffin", "--problems", "4", "--math", "8", "--reading", "4")
        return [
            *steps,
            Step("exactness", _bench(context, "exactness", *few), 85, ("vllm",)),
            Step("decode", _bench(context, "decode", "--quick", "--variants", "full,griffin"), 75),
            Step("latency", _bench(context, "latency", *_small_latency(), "--setups", "64+16"), 195, ("vllm",), True),
            Step("kernels", _bench(context, "kernels", "--quick", "--sections", "shapes"), 55),
        ]
    compared = ("--variants", "full,caprese-griffin,caprese-cats", "--problems", "16", "--math", "100")
    five = ("--variants", "full,griffin,caprese,caprese-all,caprese-cats")
    four = ("--variants", "full,griffin,caprese,caprese-all", "--setups", "2048+256", "--rounds", "2")
    two = ("--quick", "--device", "cuda", "--shapes", "llama-3.1-8b,qwen-2.5-14b")
    return [
        *steps,
        Step("exactness", _bench(context, "exactness", *compared, "--reading", "40"), 85, ("vllm",)),
        Step("decode", _bench(context, "decode", *arch, *five), 75),
        Step("latency", _bench(context, "latency", *arch, *four), 195, ("vllm",), spare=True),
        Step("kernels", _bench(context, "kernels", *two, "--sections", "shapes,batch,statistics"), 55),
    ]


def decide(rows: Sequence[dict[str, Any]], folder: Path) -> tuple[Branch, str]:
    """Stage b's plan and the reason, from stage a's steps and the files it left in `folder`."""
    if failed := failed_tests(folder):
        return "sanitizer", f"{len(failed)} GPU tests failed, first {failed[0]}"
    latency = next((row["status"] for row in rows if row["step"] == "latency"), None)
    if latency is None:
        return "batches", "nothing is known of stage a's latency"
    if latency != "skipped" and not _measured(folder / "latency.json"):
        return "engine", f"latency: {latency}, without a figure"
    return "batches", f"no GPU test failed, latency: {latency}"


def failed_tests(folder: Path) -> list[str]:
    """Ids of stage a's failing GPU tests, at most MOST_FAILED."""
    path = folder / FAILED
    return sorted(json.loads(path.read_text()))[:MOST_FAILED] if path.exists() else []


def stage_b(context: Context, branch: Branch) -> list[Step]:
    """The plan of that branch; at most 230 of 240 seconds."""
    steps = {"batches": _batches, "sanitizer": _sanitizer, "engine": _engine}[branch](context)
    return [Step("unpack vLLM", context.unpack, 60), *steps] if context.unpack else steps


def _batches(context: Context) -> list[Step]:
    variants = ",".join(name for name in ("full", "caprese", "core") if name in VARIANTS)
    latency: tuple[str, ...]
    decode: tuple[str, ...]
    if context.small:
        latency = (*_small_latency(), "--setups", "32+8", "--batch", "2", "--n", "2")
        decode = ("--quick", "--variants", "full,caprese", "--batch", "2")
    else:
        arch = ("--arch", context.arch)
        several = ("--batch", "2,4,8,16,32,64", "--n", "4,16")
        latency = (*arch, "--variants", variants, "--setups", "256+64", "--rounds", "2", *several)
        decode = (*arch, "--variants", f"{variants},caprese-cats", "--batch", "2,4,16")
    return [
        Step("latency, batches", _bench(context, "latency", *latency), 165, ("vllm",), spare=True),
        Step("decode, batches", _bench(context, "decode", *decode), 50, spare=True),
    ]


def _sanitizer(context: Context) -> list[Step]:
    failed = failed_tests(context.earlier)
    pytest = (*_pytest(context), "-p", "no:cacheprovider")
    check = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    return [
        Step("failing tests, one launch at a time", ("env", "CUDA_LAUNCH_BLOCKING=1", *pytest, *failed), 50),
        Step("memcheck", (*check, "memcheck", *pytest, *failed), 100, ("compute-sanitizer",), spare=True),
        Step("racecheck", (*check, "racecheck", *pytest, *failed[:1]), 70, ("compute-sanitizer",)),
    ]


def _engine(context: Context) -> list[Step]:
    logs = sorted(map(str, context.earlier.glob("*.log")))
    alone = ("--eager", "--variants", "full", "--problems", "2", "--math", "2", "--reading", "2")
    latency: tuple[str, ...]
    if context.small:
        latency = (*_small_latency(), "--setups", "32+8")
    else:
        shape = ("--arch", context.arch, "--variants", "full,caprese", "--setups", "2048+64")
        latency = ("--eager", *shape, "--rounds", "2")
    return [
        Step("vLLM's log", ("tail", "-n", "40", *logs), 10),
        Step("vLLM alone", _bench(context, "exactness", *alone), 60, ("vllm",)),
        Step("corrected start", _bench(context, "latency", *latency), 150, ("vllm",), spare=True),
    ]


def _small_latency() -> tuple[str, ...]:
    demo = ROOT / "serve/caprese_serve/demo"
    weights = ("--weights", str(demo / "adapters/griffin.safetensors"))
    return ("--quick", "--together", "2", "--variants", "full,caprese", "--model", str(demo / "model"), *weights)


def _pytest(context: Context) -> tuple[str, ...]:
    interpreted = ("env", "TRITON_INTERPRET=1") if context.small else ()
    return (*interpreted, sys.executable, "-m", "pytest", "-q", "--deselect", NOT_HERE)


def _gpu_tests(context: Context) -> tuple[str, ...]:
    cache = ("-o", f"cache_dir={context.folder / FAILED.parts[0]}")
    if context.small:
        return (*_pytest(context), *cache, GPU_TESTS[1], "-k", "test_conforms and check_griffin-gather and fp32")
    processes = ("-n", "8") if find_spec("xdist") else ()
    return (*_pytest(context), *cache, *processes, *GPU_TESTS)


def _environment() -> tuple[str, ...]:
    python = sys.executable
    return ("sh", "-c", f"nvidia-smi; {python} -m caprese_serve collect-env --json; {python} -m pip list")


def _bench(context: Context, verb: str, *flags: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "caprese_serve", "bench", verb, *flags, "--out", str(context.folder))


def _measured(path: Path) -> bool:
    """Whether a result file has rows."""
    return path.exists() and bool(json.loads(path.read_text())["rows"])
