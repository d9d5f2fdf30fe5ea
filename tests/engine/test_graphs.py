"""Full CUDA graphs of decoding: graph_cases.py, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_full_graphs() -> None:
    """Triton takes its choice between interpreter and compiler from the environment when imported, vLLM its runner."""
    plugins = ["-p", "no:cacheprovider", "-p", "tests.support.v2_runner"]  # the latter before anything imports vLLM
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "tests/engine/graph_cases.py"],
        cwd=ROOT,
        env=os.environ | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
