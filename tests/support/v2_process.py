"""Runs a job through tests/support/v2_runner.py in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_v2(job: dict[str, Any], *options: str) -> dict[str, Any]:
    """The results of `job`; v2_runner.py lists what a job and its results hold. `options`: "--v1" for V1."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.v2_runner", *options],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
