"""What ranks of a tensor-parallel group make of their parts of z: as one process that holds all of it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.config import Method
from caprese_kernels.packed import PackedFF
from caprese_vllm.ranks import Ranks
from caprese_vllm.requests import PromptChunk
from caprese_vllm.statistics import ChunkPlan, Statistics

NEURONS, SIZE = 24, 3


def chunk(key: int, prompt_len: int, begin: int, end: int, first: bool, last: bool) -> PromptChunk:
    """Of a request whose slot is its key."""
    return PromptChunk(key, key if last else -1, prompt_len, begin, end, first, last)


# Two steps: a prompt in two chunks beside one that begins, rows of a request that is off, and one that ends at once.
STEPS = [
    [chunk(1, 9, 0, 5, True, False), chunk(0, 6, 7, 11, True, False)],
    [chunk(0, 6, 0, 2, False, True), chunk(2, 1, 2, 3, True, True), chunk(1, 9, 3, 7, False, True)],
]


@dataclass(frozen=True)
class Threads(Ranks):
    """Ranks that are threads of this process, which meet where vLLM's would call each other."""

    meeting: Barrier = field(default_factory=lambda: Barrier(SIZE, timeout=60))
    said: list[Any] = field(default_factory=lambda: [None] * SIZE)

    def gather(self, values: Tensor) -> Tensor:
        self.said[self.rank] = values.clone()
        self.meeting.wait()
        everything = torch.stack(self.said)
        self.meeting.wait()
        return everything


def observed(method: Method, ranks: Ranks, zs: list[Tensor], gates: list[Tensor]) -> dict[int, Tensor]:
    """Each slot's selection, from this rank's part of z and of what goes into the activation."""
    part = slice(ranks.rank * NEURONS // ranks.size, (ranks.rank + 1) * NEURONS // ranks.size)
    own = NEURONS // ranks.size
    packed = PackedFF(torch.zeros(2 * own, 1, dtype=zs[0].dtype), torch.zeros(own, 1, dtype=zs[0].dtype), "silu")
    statistics = Statistics(method, packed, reference, ranks)
    selected: dict[int, Tensor] = {}
    for chunks, z, gate in zip(STEPS, zs, gates, strict=True):
        gate_up = torch.cat([gate[:, part], torch.full((len(gate), own), torch.nan, dtype=gate.dtype)], dim=1)
        plan = ChunkPlan.of(chunks, torch.device("cpu"))
        selections = statistics.observe(plan, z[:, part], gate_up)
        selected |= dict(zip(plan.slots.tolist(), [] if selections is None else selections, strict=True))
    return selected


def together(method: Method, zs: list[Tensor], gates: list[Tensor]) -> list[dict[int, Tensor]]:
    """What each rank selects."""
    first = Threads(0, SIZE)
    ranks = [first, *(Threads(rank, SIZE, first.meeting, first.said) for rank in range(1, SIZE))]
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(lambda rank: observed(method, rank, zs, gates), ranks))


@pytest.fixture
def values() -> Callable[[torch.dtype], tuple[list[Tensor], list[Tensor]]]:
    """z and gate of both steps; z of the last rank's neurons is far larger than the others'."""

    def draw(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(5)
        size = torch.exp(torch.randn(2, 11, 1, generator=generator))
        zs, gates = size * torch.randn(2, 2, 11, NEURONS, generator=generator)
        zs[..., -NEURONS // SIZE :] *= 30 * size
        zs[0, 2] = 0  # a token of zeros
        return list(zs.to(dtype)), list(gates.to(dtype))

    return draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_griffin(values: Any, dtype: torch.dtype) -> None:
    """Each rank keeps the best of its own neurons, by a statistic whose norms are over all of them."""
    zs, gates = values(dtype)
    found = together(Method("griffin", 0.5, (0,), 0), zs, gates)
    prompts = {
        slot: torch.cat(
            [z[c.begin : c.end] for z, chunks in zip(zs, STEPS, strict=True) for c in chunks if c.key == slot]
        )
        for slot in range(3)
    }
    own = NEURONS // SIZE
    for slot, z in prompts.items():
        whole = reference.griffin_statistic(z)
        local = torch.cat([reference.griffin_statistic(part) for part in z.split(own, dim=1)])
        for rank in range(SIZE):
            part = slice(rank * own, (rank + 1) * own)
            assert torch.equal(found[rank][slot], reference.griffin_select(whole[part], own // 2)), (slot, rank)
        if len(z) > 1:
            parts = [reference.griffin_select(local[r * own : (r + 1) * own], own // 2) for r in range(SIZE)]
            assert any(not torch.equal(a[slot], b) for a, b in zip(found, parts, strict=True)), "norms must matter"


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, 0), (torch.float32, 0), (torch.float32, 6)])
def test_cats(values: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, exact: int) -> None:
    """All ranks use the threshold of one that has all neurons, to the bit: by histogram or by values.

    A float32 prompt of up to `exact` tokens keeps its values: that is a question of the model's F, not of a rank's.
    """
    monkeypatch.setattr(reference, "EXACT_VALUES", exact * NEURONS)
    zs, gates = values(dtype)
    method = Method("cats", 0.4, (0,), 0)
    wanted = observed(method, Ranks(), zs, gates)
    assert len({float(tau) for tau in wanted.values()}) == 3
    for rank, found in enumerate(together(method, zs, gates)):
        for slot in range(3):
            assert torch.equal(found[slot], wanted[slot]), (rank, slot)


def test_low_rank_shares() -> None:
    """r rows in parts of ceil(r / size), the last ones shorter or empty."""
    rows = torch.arange(10).reshape(5, 2)
    assert [Ranks(rank, 3).share(rows, 2).tolist() for rank in range(3)] == [
        rows[:2].tolist(),
        rows[2:4].tolist(),
        [[8, 9]],
    ]
    assert len(Ranks(3, 4).share(rows[:3], 1)) == 0
