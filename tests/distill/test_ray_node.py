"""A node of a Ray cluster that is lost: the others do its work, and a run that has no node left ends with one line.

The workers' model is none, so that they start in a second each: what they compute has tests in test_cluster.py, and so
has a run that ends between two shards and goes on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from caprese_distill.scale import pool as workers_pool
from caprese_distill.scale.pool import Pool
from caprese_kernels.errors import CapreseError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
ONE = {"CPU": 1}
STORE = 80 * 2**20
# Ray asks each node every second, and gives it up after five refused connections; by default that takes 15 s more.
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}


@dataclass
class Stand:
    """In place of a model, and of what loads it. The node `slow` stays at jobs from number `at` on, and leaves a mark.

    Others wait for it to be there, so that it has work when it is lost.
    """

    marks: Path
    slow: str | None = None
    at: int = 0

    def __call__(self) -> Stand:
        return self

    def eval(self) -> Stand:
        return self


def square(stand: Stand, number: int) -> int:
    import ray

    node = ray.get_runtime_context().get_node_id()
    if stand.slow and number >= stand.at:
        if node == stand.slow:
            (stand.marks / f"{node}.{os.getpid()}").touch()
            time.sleep(3600)
        while not list(stand.marks.glob(f"{stand.slow}.*")):
            time.sleep(0.02)
    return number * number


class Nodes:
    """A Ray cluster of this machine. Its first node, this process's, has no CPU: workers are on added nodes."""

    def __init__(self, marks: Path):
        from ray.cluster_utils import Cluster

        self.marks = marks
        first = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "_system_config": QUICK}
        self.cluster = Cluster(initialize_head=True, head_node_args=first)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def lose(self, node: Any) -> list[int]:
        """Kill the node's processes, all at once, when a job stays there; the ids of the workers that had jobs."""
        killed: list[int] = []

        def wait() -> None:
            while not (found := list(self.marks.glob(f"{node.node_id}.*"))):
                time.sleep(0.02)
            killed.extend(int(path.suffix[1:]) for path in found)
            workers_pool.START_SECONDS = 3.0  # the fixture restores it
            self.cluster.remove_node(node, allow_graceful=False)

        threading.Thread(target=wait, daemon=True).start()
        return killed


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: workers would starve beside other tests
    monkeypatch.setattr(workers_pool, "START_SECONDS", workers_pool.START_SECONDS)
    import ray

    found = Nodes(tmp_path)
    ray.init(address=found.cluster.address, logging_level="ERROR", log_to_driver=False)
    yield found
    ray.shutdown()
    found.cluster.shutdown()


def assert_gone(processes: list[int]) -> None:
    assert processes
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_lost_nodes(nodes: Nodes, tmp_path: Path) -> None:
    """One of two: the other repeats its job. The last one: one line, what was done is kept, and a new node goes on."""
    enough = workers_pool.START_SECONDS
    first, second = nodes.add(), nodes.add()
    with Pool(Stand(tmp_path, second.node_id), 2, ONE) as pool:
        killed = nodes.lose(second)
        assert list(pool.map(square, ((i,) for i in range(12)))) == [i * i for i in range(12)]
    assert_gone(killed)

    workers_pool.START_SECONDS = enough
    done: list[int] = []
    with Pool(Stand(tmp_path, first.node_id, at=5), 1, ONE) as pool:
        killed = nodes.lose(first)
        with pytest.raises(CapreseError, match=r"workers: expected a place .* within 3 s; found none: a node") as error:
            done.extend(pool.map(square, ((i,) for i in range(12))))
    assert "the same command continues from the checkpoint" in str(error.value)
    assert "\n" not in str(error.value)
    assert_gone(killed)

    workers_pool.START_SECONDS = enough
    assert done == [i * i for i in range(5)]
    nodes.add()
    with Pool(Stand(tmp_path), 1, ONE) as pool:
        assert list(pool.map(square, ((i,) for i in range(5, 12)))) == [i * i for i in range(5, 12)]
