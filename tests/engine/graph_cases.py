"""The FF op in full CUDA graphs of decoding, with an emulator of CUDA graphs (tests/support/graph_emulator.py).

`test_graphs.py` runs this module as a process of its own: Triton's interpreter and vLLM's V2 runner must be chosen
before they are imported.
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from caprese_kernels import gpu, reference
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_vllm.ff import SparseFF, State
from caprese_vllm.requests import RequestTable, Scheduled
from tests.support import graph_emulator
from tests.support.graph_emulator import CaptureError, Graph, Recorder

CPU = torch.device("cpu")
SLOTS = 5
LAYERS = 2


@pytest.fixture(scope="module", autouse=True)
def _triton() -> None:
    graph_emulator.hook_triton()


def new_state(method: str, kernels: ModuleType) -> State:
    """Two blocks with random weights, biases and low-rank layers."""
    state = State(Method(method, 0.5, (0, 1), 3), RequestTable(CPU, SLOTS), LAYERS, kernels, graph_rows=SLOTS)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 4

    depth, neurons, rank = 16, 45, 3
    for layer in range(LAYERS):
        weights = (random(neurons, depth), random(neurons, depth), random(depth, neurons))
        biases = (random(neurons), random(neurons), random(depth))
        ff = PackedFF.pack(*weights, "silu", random(depth, rank), random(rank, depth), *biases)
        state.blocks.append(SparseFF(nn.Identity(), ff, layer, state.method, state))
    state.allocate()
    return state


def fill(state: State, seed: int) -> None:
    """Other selections, in place."""
    values = torch.rand(state.table.shape, generator=torch.Generator().manual_seed(seed))
    state.table.copy_(values < 0.5 if state.method.name == "griffin" else values / 4)


def forward(state: State, x: Tensor) -> Tensor:
    """A model of FF blocks alone."""
    for block in state.blocks:
        out = torch.empty_like(x)
        block.run(x, out)
        x = x + out
    return x


def kept(state: State) -> list[int]:
    return [int(block._neurons_kept) for block in state.blocks]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kernels", [gpu, reference], ids=lambda kernels: kernels.NAME)
@pytest.mark.parametrize("method", ["griffin", "cats"])
def test_a_replay_is_the_step_of_now(
    method: str, kernels: ModuleType, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured with padding alone, then replayed with other tokens, requests and selections on the same memory."""
    state = new_state(method, kernels)
    fill(state, 0)
    names = "abcde"
    state.begin(state.requests.begin(Scheduled(name, 1, 0, 1) for name in names))  # all of them have selections
    state.step = None
    before = state.table.clone()
    x = torch.randn(rows, 16)
    state.begin_dummy_decode(rows)
    forward(state, x)  # warm up
    graph = Graph()
    with Recorder(), graph.capture():
        y = forward(state, x)
    state.step = None
    assert torch.equal(state.table, before), "a capture touches no slot"
    assert kept(state) == [0, 0]
    assert torch.equal(y, x), "padding adds nothing"

    run = SparseFF.run
    for seed, batch in enumerate(("edcb", "a", "bd", "ca", "e"), 1):
        batch = batch[:rows]
        fill(state, seed)
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        state.begin(state.requests.begin(Scheduled(name, 1, seed, 1) for name in batch))
        counted = kept(state)
        expected = forward(state, x[: len(batch)])
        eager = [now - then for now, then in zip(kept(state), counted, strict=True)]
        monkeypatch.setattr(SparseFF, "run", None)
        graph.replay()
        monkeypatch.setattr(SparseFF, "run", run)
        torch.testing.assert_close(y[: len(batch)], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(y[len(batch) :], x[len(batch) :])
        assert [now - then - one for now, then, one in zip(kept(state), counted, eager, strict=True)] == eager
        assert (method == "cats") == (max(eager) > 0)
    assert state.generated_tokens == sum(min(rows, n) for n in (4, 1, 2, 2, 1))


def test_the_emulator_refuses_what_a_capturing_stream_refuses() -> None:
    x = torch.arange(3)
    for wrong in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.tensor([1, 2]),
        lambda: bool(x[0] > 1),
    ):
        with Recorder(), Graph().capture(), pytest.raises(CaptureError):
            wrong()
