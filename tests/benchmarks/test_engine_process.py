"""The frame that keeps an engine's hot calls in one chunk of CPython's stack."""

import subprocess
import sys

import pytest

from caprese_bench.engine.process import on_one_stack_chunk

# The most page faults of 2,000 calls, over all depths that they may be made from.
FAULTS = """
from resource import RUSAGE_SELF, getrusage
from caprese_bench.engine.process import on_one_stack_chunk

def nothing():
    pass

def calls(depth):
    if depth:
        return max(calls(depth - 1), hot())
    return hot()

def hot():
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(2_000):
        nothing()
    return getrusage(RUSAGE_SELF).ru_minflt - before

def run():
    print(max(calls(400) for _ in range(2)))
"""


def most_faults(end: str) -> int:
    command = [sys.executable, "-c", FAULTS + end]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_calls_at_no_depth_map_memory_anew() -> None:
    assert most_faults("run()") >= 2_000  # what is to be shown can be seen
    assert most_faults("on_one_stack_chunk(run)") < 100


def test_what_it_runs_may_fail() -> None:
    def fail() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        on_one_stack_chunk(fail)
