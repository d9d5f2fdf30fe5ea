"""Too little memory while an engine starts: one line with what Caprese needs, and what to lower."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from caprese_kernels.errors import CapreseError
from caprese_vllm import blocks, worker
from caprese_vllm.memory import MemoryNeeds
from caprese_vllm.state import State
from tests.support.engine import engine
from tests.support.models import make_adapter, make_model

PAGES = 4096  # the most; CATS's have 32,769 counters of 4 bytes in each layer


@pytest.mark.parametrize(("method", "interval"), [("griffin", None), ("griffin", 8), ("cats", None), ("cats", 8)])
def test_the_numbers_are_those_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, interval: int | None
) -> None:
    model = make_model("llama", tmp_path / "model")
    weights, states = make_adapter(model, tmp_path / "a.safetensors", method), list[State]()
    warm_up = State.warm_up

    def seen(self: State) -> None:
        states.append(self)
        warm_up(self)

    monkeypatch.setattr(State, "warm_up", seen)
    with engine(model, {"weights": str(weights), "reselect_interval": interval, "statistics_mib": 32}):
        (state,) = states
        needs = state.needs
        assert needs is not None
        assert needs.low_rank == 2 * sum(b.packed.rank * b.packed.up_plus[0].nbytes for b in state.blocks) > 0
        assert needs.tables == state.table.nbytes + state.statistics.nbytes > 0
        assert needs.pages == sum(b.statistics.nbytes for b in state.blocks) > 0
        assert (needs.requests, needs.num_pages) == (8, state.blocks[0].statistics.num_pages)


def test_a_device_that_refuses_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", tmp_path / "model")
    weights = make_adapter(model, tmp_path / "a.safetensors", "griffin")

    def refuse(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB free.")

    monkeypatch.setattr(blocks, "allocate", refuse)
    refused = pytest.raises(
        CapreseError,
        match=r"device memory: expected beside the model's weights \d+\.\d\d GiB \(L and R .*, tables of 8 "
        r"requests .*, \d+ pages of statistics .*\); found CUDA out of memory\. .*; "
        r"lower --max-num-seqs .* statistics_mib",
    )
    with refused as error, engine(model, {"weights": str(weights)}):
        pass
    assert "\n" not in str(error.value)


def test_a_system_that_refuses_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No simulation: from the moment that the weights are packed, the process may have 256 MiB more."""
    model = make_model("llama", tmp_path / "model")
    weights = make_adapter(model, tmp_path / "a.safetensors", "cats")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pack = worker.pack_blocks

    def limited(*args: Any) -> Any:
        packed = pack(*args)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), before[1]))
        return packed

    monkeypatch.setattr(worker, "pack_blocks", limited)
    refused = pytest.raises(CapreseError, match=rf"^memory: .*{PAGES} pages of statistics 2\.\d\d\); found .*memory")
    try:
        with refused as error, engine(model, {"weights": str(weights), "statistics_mib": 1 << 20}):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "\n" not in str(error.value)


def test_other_errors_are_left_alone() -> None:
    needs = MemoryNeeds(0, 0, 0, 8, 0)
    with pytest.raises(RuntimeError, match=r"^another$"), needs.reported():
        raise RuntimeError("another")
