"""A node of a Ray cluster that is lost while workers on it sum moments: their shards are repeated on the others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from caprese_distill.blocks import resolve_method
from caprese_distill.data.batches import BATCH_TOKENS
from caprese_distill.layer_wise.passes import run_pass
from caprese_distill.scale import cluster
from caprese_distill.scale.pool import Pool
from tests.support.distill import ModelDir, make_samples

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster of two nodes, each a raylet of this machine, and room on the first for what the second loses."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **memory})
    second = found.add_node(num_cpus=1, **memory)
    ray.init(address=found.address, logging_level="ERROR", log_to_driver=False)
    yield found, second
    ray.shutdown()
    found.shutdown()


def load(path: Path, marks: Path) -> Any:
    """The model, slowed; each process leaves a file with its node's id when it computes its first batch."""
    import ray

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path)

    def slow(*_: object) -> None:
        (marks / f"{ray.get_runtime_context().get_node_id()}.{os.getpid()}").touch()
        time.sleep(0.1)

    model.get_decoder().register_forward_pre_hook(slow)
    return model


def test_a_lost_node(model_dir: ModelDir, tmp_path: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are killed all at once: the pass ends with the sums of one process, and none of them is left."""
    found, second = nodes
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)
    samples = make_samples(60)
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    info, method = resolve_method(model.config, "m", "griffin", 0.5, 8)
    alone = run_pass(model, samples, info, method)
    killed: list[int] = []

    def lose() -> None:
        while not (workers := list(tmp_path.glob(f"{second.node_id}.*"))):
            time.sleep(0.02)
        killed.extend(int(path.suffix[1:]) for path in workers)
        found.remove_node(second, allow_graceful=False)

    with Pool(partial(load, model_dir("llama"), tmp_path), 2, {"CPU": 1}) as pool:
        thread = threading.Thread(target=lose, daemon=True)
        thread.start()
        shared = cluster.run_pass(pool, samples, info, method)
        thread.join(60)
    assert killed
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in killed):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert shared.batches == alone.batches
    for part in ("fit", "held_out"):
        for i, moments in getattr(alone, part).items():
            for name in ("xx", "xe", "ee", "rows"):
                expected = getattr(moments, name)
                close = {"rtol": 1e-14, "atol": 1e-14 * float(expected.abs().max())}  # as in test_cluster.py
                torch.testing.assert_close(getattr(getattr(shared, part)[i], name), expected, **close)
