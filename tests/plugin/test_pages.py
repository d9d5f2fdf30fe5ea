"""Pages of statistics: who holds which, and that a prompt which begins with one sums what it would have summed."""

import os
import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caprese_kernels import reference
from caprese_kernels.backend import choose
from caprese_kernels.config import Method, MethodName
from caprese_kernels.packed import PackedFF
from caprese_vllm.pages import Commands, PageIndex
from caprese_vllm.ranks import Ranks
from caprese_vllm.requests import RequestTable, Scheduled
from caprese_vllm.statistics import ChunkPlan, Statistics, keeps_values, page_dtype, page_nbytes

NEURONS, DEPTH = 12, 4


@settings(max_examples=200, deadline=None)
@given(
    num_pages=st.integers(0, 5),
    steps=st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=8), max_size=12),
)
def test_index(num_pages: int, steps: list[list[tuple[bool, int]]]) -> None:
    """No page has two keys, none is taken that this step touched, and the least recently used goes first."""
    index = PageIndex(num_pages)
    pages: dict[int, int] = {}  # least recently used first
    for step in steps:
        index.begin_step()
        touched: set[int] = set()
        for reading, key in step:
            if reading:
                assert index.get(key) == pages.get(key)
                if key in pages:
                    pages[key] = pages.pop(key)
                    touched.add(key)
            elif key not in pages:
                page = index.reserve(key)
                if len(pages) == num_pages:
                    oldest = next(iter(pages), None)
                    if oldest is None or oldest in touched:
                        assert page is None
                        continue
                    assert page == pages.pop(oldest)
                assert page is not None
                assert page not in pages.values()
                pages[key] = page
                touched.add(key)
        assert len(index) == len(pages) <= num_pages
    index.clear()
    assert len(index) == 0
    assert all(index.reserve(key) is not None for key in range(num_pages))


class Worker:
    """A table and one layer's statistics, fed with a prompt's own activations."""

    def __init__(self, method: MethodName, dtype: torch.dtype, gate_up: torch.Tensor, kernels: Any = reference):
        weights = torch.zeros(gate_up.shape[1] // 2, DEPTH, dtype=dtype)
        packed = PackedFF.pack(weights, weights, weights.t().contiguous(), "silu")
        self.table, self.gate_up = RequestTable(torch.device("cpu"), 9), gate_up
        self.statistics = Statistics(Method(method, 0.5, (0,), 0), packed, kernels, Ranks(), 4, len(gate_up))

    def run(
        self, name: str, start: int, end: int, load: int | None = None, *saves: tuple[int, int]
    ) -> torch.Tensor | None:
        step = self.table.begin([Scheduled(name, len(self.gate_up), start, end - start)], {name: Commands(load, saves)})
        part = self.gate_up[start:end]
        gate, up = part.chunk(2, dim=1)
        plan = ChunkPlan.of(step.chunks, self.table.device)
        return self.statistics.observe(plan, torch.nn.functional.silu(gate) * up, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["griffin", "cats"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_page_stands_for_its_prefix(method: MethodName, dtype: torch.dtype, data: st.DataObject) -> None:
    """However both prompts are cut into chunks, and wherever the page is."""
    length = data.draw(st.integers(2, 40))
    ends = sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=1, max_size=3)))
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3))), length]
    gate_up = torch.randn(length, 2 * NEURONS, generator=torch.Generator().manual_seed(length)).to(dtype)
    worker = Worker(method, dtype, gate_up)
    alone = Worker(method, dtype, gate_up).run("alone", 0, length)
    assert alone is not None
    saves = {end: page for page, end in enumerate(ends)}
    for start, end in pairwise(cuts):
        own = tuple((at, page) for at, page in saves.items() if start < at <= end)
        first = worker.run("first", start, end, None, *own)
    assert first is not None
    for end, page in saves.items():
        at = data.draw(st.integers(end, length))
        if end < at < length:
            worker.run(f"from {end}", end, at, page)
            later = worker.run(f"from {end}", at, length)
        else:
            later = worker.run(f"from {end}", end, length, page)
        assert later is not None
        for found in (first, later):  # sums of a few float32 numbers, in another order: no two neurons are that near
            torch.testing.assert_close(found, alone)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX") or "g++"), reason="needs a C++ compiler: $CXX or g++")
def test_a_prompts_sum_has_the_same_bits_however_it_was_cut() -> None:
    """By chunks of a few hundred tokens, with pages left behind or not, or from a page on."""
    gate_up = torch.randn(1000, 2 * 1024, generator=torch.Generator().manual_seed(0))
    worker = Worker("griffin", torch.float32, gate_up, choose("cpu", torch.device("cpu")))
    for name, cuts in (("whole", [0, 999]), ("cut", [0, 300, 999]), ("cut again", [0, 512, 600, 999])):
        for start, end in pairwise(cuts):
            worker.run(name, start, end, None, *([(512, 0)] if name == "cut" and end == 999 else []))
    worker.run("loaded", 512, 999, 0)
    whole, *others = worker.statistics._rows.values()
    assert len(others) == 3
    for other in others:
        assert torch.equal(whole, other)


def test_a_preempted_prompt_may_go_on_from_a_page() -> None:
    gate_up = torch.randn(20, 2 * NEURONS, generator=torch.Generator().manual_seed(0))
    worker = Worker("griffin", torch.float32, gate_up)
    worker.run("a", 0, 12, None, (8, 2))
    found = worker.run("a", 8, 20, 2)  # its blocks are gone, those of the first eight tokens were found
    expected = Worker("griffin", torch.float32, gate_up).run("a", 0, 20)
    assert found is not None
    assert expected is not None
    assert found.tolist() == expected.tolist()
    assert not worker.statistics._rows, "a finished prompt leaves nothing behind but its pages"


def test_without_its_page_a_cached_prefix_is_refused() -> None:
    worker = Worker("griffin", torch.float32, torch.randn(20, 2 * NEURONS))
    with pytest.raises(RuntimeError, match="skipped"):
        worker.run("a", 8, 20)


def test_sizes() -> None:
    """A page of Qwen 2.5 14B's shape: 24 of 48 layers of 13,824 neurons; 48 histograms of 32,768 counts."""
    griffin, cats = Method("griffin", 0.5, tuple(range(24)), 256), Method("cats", 0.5, tuple(range(48)), 256)
    assert page_nbytes(griffin, 13824, 32768, torch.bfloat16) == 24 * 13824 * 4
    assert page_nbytes(cats, 13824, 32768, torch.bfloat16) == 48 * 32768 * 4
    assert page_dtype(cats, 28672, 131072) == torch.int64, "more magnitudes than 31 bits count"
    assert keeps_values(cats, torch.float32)
    assert not keeps_values(cats, torch.bfloat16)
