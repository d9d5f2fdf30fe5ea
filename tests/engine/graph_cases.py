"""The FF op in full CUDA graphs of decoding, with an emulator of CUDA graphs (tests/support/graph_emulator.py).

`test_graphs.py` runs this module in a process of its own: Triton's interpreter and vLLM's V2 runner must be chosen
before they are imported.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode

from caprese_kernels import gpu, reference
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_vllm.architectures import Block, Names
from caprese_vllm.ff import SparseFF
from caprese_vllm.ranks import Ranks
from caprese_vllm.requests import RequestTable, Scheduled
from caprese_vllm.state import State
from caprese_vllm.statistics import Statistics
from tests.support import graph_emulator
from tests.support.engine import generate, greedy, scheduler
from tests.support.equality import check, new_case
from tests.support.full_graphs import CAPTURED, Watched, captured_engine
from tests.support.graph_emulator import CaptureError, Graph, Recorder
from tests.support.models import random_prompts
from tests.support.v2_runner import count_preemptions

CPU = torch.device("cpu")
SLOTS = 5
LAYERS = 2


@pytest.fixture(scope="module", autouse=True)
def _triton() -> None:
    graph_emulator.hook_triton()


def new_state(name: str, kernels: ModuleType, core: float = 0.0) -> State:
    """Two blocks with random weights, biases, priors and low-rank layers."""
    method = Method(name, 0.5, (0, 1), 3, core=core)
    table = RequestTable(CPU, SLOTS, method.needs_statistic)
    state = State(method, table, LAYERS, kernels, graph_rows=SLOTS)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 4

    depth, neurons, rank = 16, 45, 3
    for layer in range(LAYERS):
        weights = (random(neurons, depth), random(neurons, depth), random(depth, neurons))
        biases = (random(neurons), random(neurons), random(depth))
        ff = PackedFF.pack(*weights, "silu", random(depth, rank), random(rank, depth), *biases)
        block = Block("", layer, nn.Identity(), Names(), None, nn.Identity(), None, "silu")
        state.blocks.append(SparseFF(block, ff, Ranks(), state.method, Statistics(state.method, ff, kernels, Ranks())))
        state.blocks[-1].arrange(torch.rand(neurons, generator=generator) if core else None)
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
        block.run(x, out, state.view)
        x = x + out
    return x


def kept(state: State) -> list[int]:
    return [int(block._neurons_kept) for block in state.blocks]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kernels", [gpu, reference], ids=lambda kernels: kernels.NAME)
@pytest.mark.parametrize(("method", "core"), [("griffin", 0.0), ("cats", 0.0), ("griffin", 0.5), ("griffin", 1.0)])
def test_a_replay_is_the_step_of_now(
    method: str, core: float, kernels: ModuleType, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured with padding alone, then replayed with other tokens, requests and selections on the same memory."""
    state = new_state(method, kernels, core)
    fill(state, 0)
    names = "abcde"
    state.begin(Scheduled(name, 1, 0, 1) for name in names)  # all of them have selections
    state.end_step()
    before = state.table.clone()
    x = torch.randn(rows, 16)
    state.begin_dummy_decode(rows)
    forward(state, x)  # warm up
    graph = Graph()
    with Recorder(), graph.capture():
        y = forward(state, x)
    state.end_step()
    assert torch.equal(state.table, before), "a capture touches no slot"
    assert kept(state) == [0, 0]
    assert torch.equal(y, x), "padding adds nothing"
    plans = [name for name, _ in graph.launches].count("plan_rows")
    assert plans == (kernels is gpu and method == "griffin" and core < 1.0), "one for all layers"

    run = SparseFF.run
    for seed, batch in enumerate(("edcb", "a", "bd", "ca", "e"), 1):
        batch = batch[:rows]
        fill(state, seed)
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        state.begin(Scheduled(name, 1, seed, 1) for name in batch)
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
    computed = 2 * sum(min(rows, n) for n in (4, 1, 2, 2, 1))  # each batch eagerly, and replayed
    assert state.generated_tokens == computed


def test_a_graph_of_dense_blocks_counts_no_generated_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is what was computed, not what was scheduled: a wrong capture cannot pass for a sparse run."""
    state = new_state("griffin", gpu)
    monkeypatch.setattr(Block, "run", lambda block, x: (2 * x, None, None))
    state.begin([Scheduled("a", 1, 0, 1)])
    state.end_step()  # as if a dummy batch were captured without its step
    x, graph = torch.randn(1, 16), Graph()
    with Recorder(), graph.capture():
        y = forward(state, x)
    state.begin([Scheduled("a", 1, 1, 1)])
    graph.replay()
    torch.testing.assert_close(y, 3**LAYERS * x)
    assert (state.scheduled, state.generated_tokens) == (1, 0)


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


BUDGET = 32  # tokens a step
NEW_TOKENS = 11


def drive(watched: Watched, prompts: list[list[int]], arrivals: dict[int, list[int]], off: set[int]) -> list[list[int]]:
    """Requests arrive at the given steps; now and then a dummy batch comes between, as data parallelism makes them."""
    engine, state, tokens = watched.llm.llm_engine, watched.state, {}
    step, last = 0, max(arrivals)
    while step <= last or engine.has_unfinished_requests():
        for i in arrivals.get(step, []):
            params = greedy(NEW_TOKENS, caprese="off" if i in off else None)
            engine.add_request(str(i), {"prompt_token_ids": prompts[i]}, params)
        for output in engine.step():
            tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        if step in DUMMIES:
            before = state.table.clone()
            watched.runner._dummy_run(2, uniform_decode=True)  # a full graph
            assert state.decode_slots.tolist() == [-1] * state.graph_rows
            watched.runner._dummy_run(2 * max(CAPTURED))  # none
            assert torch.equal(state.table, before), "a dummy batch touches no slot"
            assert state.step is None
        step += 1
    return [tokens[i] for i in range(len(prompts))]


DUMMIES = (3, 9)  # steps after which dummy batches run


@dataclass
class Load:
    """Requests for a captured engine, and the graphs that it has."""

    architecture: str
    method: str
    mode: CUDAGraphMode
    blocks: int  # of the KV cache
    lengths: tuple[int, ...]
    arrivals: dict[int, list[int]]
    off: set[int] = field(default_factory=set)
    traps: int = 0  # a prompt's last token scheduled alone, at least so often
    preempted: bool = False
    layers: list[int] | None = None  # without an adapter; None: those of an adapter
    core: float | None = None


# 33: a budget and one token, so the last chunk is a single token: first alone, then (31 + 1) beside one that decodes.
LOADS = [
    Load(
        *("llama", "griffin", CUDAGraphMode.FULL_AND_PIECEWISE, 5, (33, 1, 31, 30, 9)),
        *({0: [0], 4: [1], 6: [2], 12: [3, 4]}, {4}, 2, True),
    ),
    Load(
        *("llama", "griffin", CUDAGraphMode.FULL_AND_PIECEWISE, 5, (33, 1, 31, 30, 9)),
        *({0: [0], 4: [1], 6: [2], 12: [3, 4]}, {4}, 2, True),
        core=0.8,
    ),
    Load("qwen2", "griffin", CUDAGraphMode.FULL_DECODE_ONLY, 40, (33, 1, 5), {0: [0, 1], 2: [2]}, core=1.0),
    Load("gemma2", "cats", CUDAGraphMode.FULL_DECODE_ONLY, 40, (7, 1, 5), {0: [0, 1], 2: [2]}, layers=[0, 3]),
]


@pytest.mark.parametrize("load", LOADS, ids=lambda load: f"{load.method} {load.core}")
def test_full_graphs_in_the_engine(
    model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    """vLLM's own manager captures and replays, through chunked prompts, preemptions, neighbours that are off."""
    case = new_case(
        model_dir, tmp_path, load.architecture, load.method, load.layers is None, load.core, layers=load.layers
    )
    prompts = random_prompts(load.lengths, seed=31)
    runs = []
    run = SparseFF.run
    monkeypatch.setattr(SparseFF, "run", lambda self, *args: (runs.append(self.layer), run(self, *args))[1])
    options = {"max_num_batched_tokens": BUDGET, "max_num_seqs": max(CAPTURED), "num_gpu_blocks_override": load.blocks}
    caprese = {**case.caprese, "kernel": "triton"}
    with captured_engine(case.model_dir, caprese, load.mode, max_model_len=64, **options) as watched:
        manager, state = watched.runner.cudagraph_manager, watched.state
        assert sorted(desc.num_tokens for desc in manager.graphs) == CAPTURED
        assert manager.cudagraph_mode == load.mode
        preempted = count_preemptions(scheduler(watched.llm))
        runs.clear()
        found = drive(watched, prompts, load.arrivals, load.off)
        expected = case.expected(prompts, NEW_TOKENS)
        for i in load.off:
            expected[i] = case.one(prompts[i], NEW_TOKENS, method=None)
        check(found, expected, f"{load.method}, {load.mode}, core {load.core}")
        assert bool(preempted) == load.preempted

        modes = [batch.mode for batch in watched.batches]
        traps = 0
        for batch in watched.batches:
            single = all(count == 1 for _, _, count in batch.chunks)
            prompt = any(start < length for length, start, _ in batch.chunks)
            assert (batch.mode == CUDAGraphMode.FULL) == (single and not prompt and not batch.off), batch
            if batch.mode == CUDAGraphMode.FULL:
                padding = state.graph_rows - len(batch.chunks)
                assert batch.decode_slots == [*batch.slots, *[-1] * padding]
            traps += single and prompt and not any(start == 0 for _, start, _ in batch.chunks)
        assert traps >= load.traps, "prompts' last tokens, scheduled alone"
        if load.mode == CUDAGraphMode.FULL_AND_PIECEWISE:
            assert CUDAGraphMode.PIECEWISE in {batch.mode for batch in watched.batches if batch.off}
        eager = len(modes) - modes.count(CUDAGraphMode.FULL) + len(DUMMIES)
        assert len(runs) == len(state.blocks) * eager, "a replay runs no Python"
        assert state.generated_tokens == sum(len(batch.slots) for batch in watched.batches)

        if load.traps:  # were vLLM's own judgement of what is a decode batch followed, we would notice
            monkeypatch.setattr(watched.runner.model_state, "only_decodes", lambda *args: True)
            with pytest.raises(RuntimeError, match="sent to a full CUDA graph"):
                generate(watched.llm, [prompts[0]], greedy(2))
