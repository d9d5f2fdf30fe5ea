"""Faults of the machine while `caprese distill` runs: a disk that fills, a clock that jumps, memory that ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_distill import checkpoint
from caprese_kernels import files
from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError
from tests.support.distill import ModelDir, WriteRows, make_rows, run_distill

# The wall clock of a process, which jumps years ahead and back at every reading; clocks of durations are as they were.
CLOCK = """
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) { static unsigned n; return ((long)(n++ * 7919 % 41) - 20) * 31557600L; }
int clock_gettime(clockid_t id, struct timespec *t) {
    int code = syscall(SYS_clock_gettime, id, t);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000; return 0;
}
time_t time(time_t *t) { struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec; return now.tv_sec; }
"""
COMMAND = """
import sys, time
import torch; torch.set_num_threads(1)
from caprese_distill import checkpoint; checkpoint.CHECKPOINT_SECONDS = 0.0
from caprese_distill.end_to_end.train import Trainer
step = Trainer._step; Trainer._step = lambda *args: (time.sleep(0.05), step(*args))[1]
from caprese_serve.cli import main; main()
"""


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of that size; skips the test without the right to mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder]
    if os.getuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Write a file that takes all of the disk."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    assert not shutil.disk_usage(disk).free
    return ballast


def numbered(names: list[str]) -> list[tuple[int, str]]:
    return list(enumerate(names, 1))


@pytest.mark.parametrize("settings", [{"weighting": "gradient"}, {"solver": "adam", "stage": "layer-wise"}], ids=str)
def test_a_disk_that_fills_at_any_write(
    model_dir: ModelDir,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    """Every write of every stage in turn meets a full disk: one line, no half file; with room the run goes on to the
    same bits."""
    data, writes, full_at = write_rows(make_rows(6)), list[str](), 0
    staged = files.staged

    def run(output: Path) -> None:
        run_distill(str(model_dir("llama")), data, output, rank=8, device="cpu", epochs=1, batch=8, **settings)

    def watched(path: Path, *args: Any, **options: Any) -> Any:
        writes.append(path.name)
        if len(writes) == full_at:
            fill(path.parent)
        return staged(path, *args, **options)

    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(files, "staged", watched)
    run(tmp_path / "whole.safetensors")
    whole = Adapters.load(tmp_path / "whole.safetensors").tensors()
    assert {name.removeprefix(".whole.safetensors.") for name in writes} >= {"prior", "resume"}
    first, last = ({name: n for n, name in order} for order in (numbered(writes)[::-1], numbered(writes)))
    for full_at in sorted({*first.values(), *last.values()}):  # .resume: the first stage's, and the last one's
        with small_disk(tmp_path / f"disk-{full_at}", 16) as disk:
            output = disk / "a.safetensors"
            writes.clear()
            with pytest.raises(CapreseError, match=r"No space left on device|I/O error") as error:
                run(output)
            assert "\n" not in str(error.value)
            (disk / "ballast").unlink()
            for left in disk.glob(".a*"):
                assert checkpoint.header_digest(left), f"{left.name} is not whole"
            run(output)
            parts = Adapters.load(output).tensors()
            assert all(torch.equal(whole[name], parts[name]) for name in whole), full_at
            assert not list(disk.glob(".*"))


def test_a_clock_that_jumps(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    """Years ahead and back at every reading, in a run that is killed and goes on: the bits of an undisturbed run."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source], check=True)
    jumping = os.environ | {"LD_PRELOAD": str(library)}
    times = subprocess.run(
        [sys.executable, "-c", "import time; print(*(time.time() for _ in range(40)))"],
        env=jumping, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    steps = [float(b) - float(a) for a, b in pairwise(times)]
    assert min(steps) < -1e7
    assert max(steps) > 1e7
    data, model = str(write_rows(make_rows(40))), str(model_dir("llama"))
    options = ["--rank", "4", "--epochs", "3", "--batch", "8", "--device", "cpu"]

    def command(output: Path) -> list[str]:
        return [sys.executable, "-c", COMMAND, "distill", model, "--data", data, "--output", str(output), *options]

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    subprocess.run(command(whole), check=True, capture_output=True, timeout=300)
    resume = checkpoint.resume_path(parts)
    process = subprocess.Popen(command(parts), env=jumping, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (resume.exists() and "step" in str(checkpoint.load(resume, {}))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command(parts), env=jumping, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in " ".join(done.stderr.split())
    first, second = Adapters.load(whole), Adapters.load(parts)
    assert all(torch.equal(first.tensors()[name], second.tensors()[name]) for name in first.tensors())
    for adapters in (first, second):  # durations, not differences of dates
        assert 0 < adapters.config.training["seconds"] < 300
        assert 0 < adapters.config.training["resources"]["seconds"] < 300
    assert not list(tmp_path.glob(".*"))


def test_memory_that_ends(model_dir: ModelDir, write_rows: WriteRows, tmp_path: Path) -> None:
    """The system refuses more address space while the model is loaded: one line that says what to lower."""
    data, output = str(write_rows(make_rows(6))), tmp_path / "new" / "a.safetensors"
    code = (
        "import resource, sys, torch; torch.set_num_threads(1)\n"
        "from caprese_distill import job; load = job.load_model_on\n"
        "def limited(*args):\n"
        "    model = load(*args)\n"
        "    size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "    [torch.empty(1 << 28).zero_() for _ in range(64)]\n"
        "    return model\n"
        "job.load_model_on = limited\n"
        "from caprese_serve.cli import main; main()"
    )
    words = ["distill", str(model_dir("llama")), "--data", data, "--output", str(output), "--rank", "4"]
    done = subprocess.run([sys.executable, "-c", code, *words, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("caprese: ")]
    assert "memory: expected enough for the model and a sample; found" in line
    assert "use a lower --max-length" in line
    assert "Traceback" not in done.stderr
    assert not output.parent.exists()
