"""What every backend must do with prompts' statistics: checks like those of `conformance`."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from caprese_kernels.packed import ACTIVATION_FUNCTIONS
from tests.kernels.cases import Case
from tests.kernels.problem import (
    ACTIVATION_ERROR,
    DEVIATIONS,
    FLOAT32,
    assert_like,
    assert_same_bits,
    assert_within,
    laid_out,
)


class Segments:
    """Prompts of one call: rows before, between and after them that no slot wants, and slots that no prompt has."""

    table = 8
    slots_list = (3, 0, -1, 5, 1, 6)
    skipped, zero, extreme = 2, 3, 4  # segments that do not count, of a row of zeros, of extreme values

    def __init__(self, case: Case, device: torch.device):
        t = case.tokens
        self.case, self.device = case, device
        lengths = (t, 0, t // 2, 1, 3, max(t - 1, 0))
        self.borders = [2]
        for length in lengths:
            self.borders.append(self.borders[-1] + length)
        self.count = self.borders[-1] + 1
        self.offsets = torch.tensor(self.borders, device=device)
        self.slots = torch.tensor(self.slots_list, device=device)
        self.generator = torch.Generator().manual_seed(case.seed)

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """begin, end and slot of every segment that counts."""
        return [(a, b, s) for (a, b), s in zip(pairwise(self.borders), self.slots_list, strict=True) if s >= 0]

    def rows(self, values: Tensor) -> Tensor:
        """`values` [P, F] on the device in the case's layout, with NaN in some of the rows that do not count."""
        values = values.clone()
        skipped = self.borders[self.skipped]
        values[0] = values[skipped + 1 : self.borders[self.skipped + 1]] = math.nan
        return laid_out(values.to(self.device), self.case.layout)

    def untouched(self) -> list[int]:
        empty = [slot for begin, end, slot in self.parts if begin == end]
        return [*(s for s in range(self.table) if s not in self.slots_list), *empty]


def griffin_rows(s: Segments) -> Tensor:
    """z [P, F]; a row of zeros, and rows whose squares overflow and vanish in float32."""
    case = s.case
    info = torch.finfo(case.dtype)
    z = torch.randn(s.count, case.neurons, generator=s.generator).to(case.dtype)
    z[s.borders[s.zero]] = 0
    large, small, one = range(s.borders[s.extreme], s.borders[s.extreme] + 3)
    z[large] = torch.where(z[large] > 0, info.max, -info.max)
    z[small] = info.tiny * torch.randint(1, 5, (case.neurons,), generator=s.generator)
    z[one, -1] = info.max
    return z


def check_tokens_that_are_not_finite(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """A token with an infinite or undefined z adds nothing, as its share of its own norm is undefined."""
    z = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[1, 3], z[4, 99], z[5] = math.inf, math.nan, -math.inf
    offsets, slots = torch.tensor([0, 7], device=device), torch.tensor([0], device=device)
    found, wanted = torch.zeros(1, 100, device=device), torch.zeros(1, 100)
    backend.griffin_observe(z.to(device), offsets, slots, found)
    reference.griffin_observe(z[[0, 2, 3, 6]], torch.tensor([0, 4]), torch.tensor([0]), wanted)
    # Four terms each, with a norm of 100 terms.
    torch.testing.assert_close(found.cpu(), wanted, rtol=120 * FLOAT32, atol=0)
    norms, again = backend.griffin_norms(z.to(device)), torch.zeros(1, 100, device=device)
    assert norms.isfinite().tolist() == [True, False, True, True, False, False, True]
    backend.griffin_observe(z.to(device), offsets, slots, again, norms)
    torch.testing.assert_close(again.cpu(), wanted, rtol=120 * FLOAT32, atol=0)


def check_griffin_observe(backend: Backend, device: torch.device, case: Case) -> None:
    """Shares of every segment are added to its slot, and to nothing else; cut into chunks they sum to the same.

    Bounds: a share has a handful of roundings in float32 and a norm of F terms, a slot's sum a term a row; and shares
    beside an outlier may vanish below float32's least number.
    """
    s = Segments(case, device)
    values = griffin_rows(s)
    z = s.rows(values)
    start = 3 * torch.rand(s.table, case.neurons, generator=s.generator)
    squares = values.double().square()
    norms = squares.sum(dim=1, keepdim=True)
    shares = torch.where(norms > 0, squares / norms, 0.0)
    wanted = start.double()
    for begin, end, slot in s.parts:
        wanted[slot] += shares[begin:end].sum(dim=0)
    steps = sum(min(n, DEVIATIONS * math.sqrt(n)) for n in (case.neurons, max(case.tokens, 3))) + 12
    error = steps * FLOAT32 * wanted + s.count * torch.finfo(torch.float32).tiny

    table = start.to(device, copy=True)
    backend.griffin_observe(z, s.offsets, s.slots, table)
    assert_within(table, wanted, error, "statistic")
    zero_slot = s.slots_list[s.zero]
    untouched = [*s.untouched(), zero_slot]
    assert_same_bits(table[untouched].cpu(), start[untouched], "statistic of slots with nothing to add")

    chunked = start.to(device, copy=True)
    backend.griffin_observe(z, s.offsets[:1], s.slots[:0], chunked)  # no segment at all
    assert_same_bits(chunked.cpu(), start, "statistic after a call with no segment")
    for offsets, slot in chunks(s):
        backend.griffin_observe(z, offsets, slot, chunked)
    assert_within(chunked, wanted, error, "statistic of chunks")


def check_shards(backend: Backend, device: torch.device, case: Case) -> None:
    """Neurons split in two: with the norms over both parts, each part's shares are those of the whole.

    Bounds: a norm has F squares and a handful of roundings; its relative error counts twice in a share's, which has a
    handful of its own (as `check_griffin_observe`). Tokens whose norm float32 cannot hold add nothing.
    """
    s = Segments(case, device)
    values = griffin_rows(s)
    cut = case.neurons // 3  # parts of one neuron and of none too
    start = torch.rand(s.table, case.neurons, generator=s.generator)
    norms = values.double().norm(dim=1)
    shares = (values.double() / norms[:, None]).square()
    shares[(norms == 0) | (norms > torch.finfo(torch.float32).max)] = 0
    wanted = start.double()
    for begin, end, slot in s.parts:
        wanted[slot] += shares[begin:end].sum(dim=0)
    steps = sum(min(n, DEVIATIONS * math.sqrt(n)) for n in (case.neurons, max(case.tokens, 3))) + 24
    tiny = torch.finfo(torch.float32).tiny
    parts = [part for part in (slice(0, cut), slice(cut, None)) if values[:, part].shape[1]]
    found = [backend.griffin_norms(laid_out(values[:, part].to(device), case.layout)) for part in parts]
    for part, own in zip(parts, found, strict=True):
        exact = values[:, part].double().norm(dim=1)
        held = exact < 0.99 * torch.finfo(torch.float32).max
        assert_like(own, (s.count,), torch.float32, device)
        assert_within(own[held.to(device)], exact[held], steps * FLOAT32 * exact[held] + tiny, "norms")
    joint = functools.reduce(torch.hypot, found)
    for part in parts:
        table = start[:, part].to(device, copy=True)
        backend.griffin_observe(s.rows(values)[:, part], s.offsets, s.slots, table, joint)
        error = steps * FLOAT32 * wanted[:, part] + s.count * tiny
        assert_within(table, wanted[:, part], error, "statistic of a part of the neurons")
        untouched = [*s.untouched(), s.slots_list[s.zero]]
        assert_same_bits(table[untouched].cpu(), start[untouched, part], "statistic of slots with nothing to add")


def chunks(s: Segments) -> list[tuple[Tensor, Tensor]]:
    """Offsets and slots of calls that see every segment in up to three chunks."""
    calls = []
    for begin, end, slot in s.parts:
        borders = sorted({begin, begin + (end - begin) // 3, begin + (end - begin) // 2, end})
        calls += [
            (torch.tensor(border, device=s.device), torch.tensor([slot], device=s.device))
            for border in pairwise(borders)
        ]
    return calls


def cats_rows(s: Segments) -> Tensor:
    """What goes into the activation, [P, F]; zeros, and values whose exp overflows or vanishes."""
    case = s.case
    gate = 2 * torch.randn(s.count, case.neurons, generator=s.generator)
    gate = (gate.round() if case.integers else gate).to(case.dtype)
    gate[s.borders[s.zero]] = 0
    large, small, one = range(s.borders[s.extreme], s.borders[s.extreme] + 3)
    gate[large], gate[small], gate[one] = 1000, -1000, 16 * gate[one]
    if case.activation_name == "relu":
        gate[large] = torch.finfo(case.dtype).max
    return gate


def magnitude_interval(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The lowest and the highest bin that each |g| may fall into.

    g's error before it is rounded moves it by little; rounding, to the model's dtype first or at once to bfloat16,
    keeps the order. relu is exact.
    """
    g = ACTIVATION_FUNCTIONS[activation](gate.double())
    error = 0.0 if activation == "relu" else ACTIVATION_ERROR * gate.double().abs()
    bins = [
        reference.magnitude_bins(ends.to(dtype))
        for ends in ((g.abs() - error).clamp(min=0), g.abs() + error)
        for dtype in (torch.float32, gate.dtype)
    ]
    return torch.minimum(bins[0], bins[1]), torch.maximum(bins[2], bins[3])


def check_cats_observe(backend: Backend, device: torch.device, case: Case) -> None:
    """Magnitudes are counted into each segment's slot, and nowhere else; also when cut into chunks.

    With relu every count is exact. Otherwise the cumulative counts lie between those of all magnitudes at the upper and
    at the lower end of their bounds (`magnitude_interval`).
    """
    s = Segments(case, device)
    values = cats_rows(s)
    gate = s.rows(values)
    start = torch.randint(0, 9, (s.table, reference.NUM_MAGNITUDES), generator=s.generator)
    whole, chunked = start.to(device, copy=True), start.to(device, copy=True)
    backend.cats_observe(gate, case.activation_name, s.offsets, s.slots, whole)
    backend.cats_observe(gate, case.activation_name, s.offsets[:1], s.slots[:0], chunked)  # no segment at all
    assert_same_bits(chunked.cpu(), start, "histogram after a call with no segment")
    for offsets, slot in chunks(s):
        backend.cats_observe(gate, case.activation_name, offsets, slot, chunked)
    for name, table in (("histogram", whole), ("histogram of chunks", chunked)):
        counted = table.cpu() - start
        assert not counted[s.untouched()].any(), f"{name}: counts in slots with nothing to add"
        assert bool((counted >= 0).all()), f"{name}: lost counts"
        for begin, end, slot in s.parts:
            low, high = magnitude_interval(values[begin:end], case.activation_name)
            most, least = (torch.bincount(b, minlength=reference.NUM_MAGNITUDES).cumsum(0) for b in (low, high))
            found = counted[slot].cumsum(0)
            wrong = (found < least) | (found > most)
            if wrong.any():
                at = int(wrong.nonzero()[0])
                raise AssertionError(
                    f"{name} of slot {slot}: {int(found[at])} magnitudes up to bin {at}, "
                    f"expected {int(least[at])} to {int(most[at])}"
                )


def check_chunks_do_not_matter(backend: Backend, device: torch.device, case: Case) -> None:
    """For backends whose activation of a value does not depend on the value's place: chunks give the same counts.

    torch's may: full vectors and the few values left over take different code.
    """
    s = Segments(case, device)
    gate = s.rows(cats_rows(s))
    whole, chunked = (
        torch.zeros(s.table, reference.NUM_MAGNITUDES, dtype=torch.int64, device=device) for _ in range(2)
    )
    backend.cats_observe(gate, case.activation_name, s.offsets, s.slots, whole)
    for offsets, slot in chunks(s):
        backend.cats_observe(gate, case.activation_name, offsets, slot, chunked)
    assert_same_bits(chunked, whole, "histogram of chunks")


def check_segment_stands_alone(backend: Backend, device: torch.device, case: Case) -> None:
    """The statistic and the histogram of a prompt have the same bits whether others are in the call or not."""
    s = Segments(case, device)
    z, gate = s.rows(griffin_rows(s)), s.rows(cats_rows(s))
    statistics = [torch.ones(s.table, case.neurons, device=device) for _ in range(2)]
    histograms = [torch.zeros(s.table, reference.NUM_MAGNITUDES, dtype=torch.int64, device=device) for _ in range(2)]
    backend.griffin_observe(z, s.offsets, s.slots, statistics[0])
    backend.cats_observe(gate, case.activation_name, s.offsets, s.slots, histograms[0])
    for begin, end, slot in s.parts:
        offsets, slots = torch.tensor([0, end - begin], device=device), torch.tensor([slot], device=device)
        alone = [laid_out(rows[begin:end].clone(), case.layout) for rows in (z, gate)]
        backend.griffin_observe(alone[0], offsets, slots, statistics[1])
        backend.cats_observe(alone[1], case.activation_name, offsets, slots, histograms[1])
    assert_same_bits(statistics[1], statistics[0], "statistics of prompts alone")
    assert_same_bits(histograms[1], histograms[0], "histograms of prompts alone")
