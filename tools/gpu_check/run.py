"""One step: a command with a time limit, killed with every process it started."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .plan import ROOT, Step

GRACE = 12.0  # seconds that an interrupted step has to write its results, within its limit
NO_TESTS = 5  # pytest's exit code when it finds none
OUTPUT = 6000  # characters of a step's output that its record keeps; the whole is in its log
MARK = "CAPRESE_GPU_CHECK_STEP"  # an environment variable that a step's processes inherit, whoever their parent is


def run(step: Step, seconds: float, log: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a step for at most so many seconds; its output goes to `log`. Returns its record.

    It is interrupted GRACE seconds before the end, so that a benchmark writes what it has, and killed at the end. No
    process that it started is left, since one could keep a GPU's memory from the next step.
    """
    begin, mark, stopped = time.monotonic(), f"{os.getpid()}-{log.name}", False
    command = list(step.command)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, MARK: mark, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{command[0]}: {error.strerror}\n".encode())
            output.flush()
            return _record(step, "failed", begin, seconds, log, None)
        try:
            process.wait(max(0.1, seconds - GRACE))
        except subprocess.TimeoutExpired:
            stopped = True
            _signal(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, begin + seconds - time.monotonic()))
        finally:
            _signal(process.pid, signal.SIGKILL)
            code = process.wait()
            kill_marked(mark)
    status = {0: "passed", NO_TESTS: "no tests" if "pytest" in command else "failed"}.get(code, "failed")
    return _record(step, "out of time" if stopped else status, begin, seconds, log, code)


def kill_marked(mark: str) -> None:
    """Kill all processes that inherited this mark, also those in sessions of their own; waits until they are gone."""
    end = time.monotonic() + 5
    while (left := marked(mark)) and time.monotonic() < end:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Processes with this mark; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it ended, or is another user's
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def last_lines(output: str, count: int) -> list[str]:
    """The last lines that are not empty, without colours and progress bars' earlier states."""
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output)
    lines = [line.rpartition("\r")[2].rstrip()[:200] for line in plain.splitlines()]
    return [line for line in lines if line.strip()][-count:]


def _record(step: Step, status: str, begin: float, seconds: float, log: Path, code: int | None) -> dict[str, Any]:
    return {
        "step": step.name,
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "given_seconds": round(seconds, 1),
        "returncode": code,
        "command": shlex.join(step.command),
        "output": log.read_text(errors="replace")[-OUTPUT:],
    }


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
