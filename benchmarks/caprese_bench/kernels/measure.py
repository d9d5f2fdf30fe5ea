"""Measures a group of cases: compares each output with the reference, then times all of them in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from caprese_kernels.packed import PackedFF, allocate

from ..results.report import Row
from . import cases
from .agreement import check, check_cats, demand
from .cases import Case, Group, Shape
from .dense import DenseWeights, candidates
from .timing import Call, Timer, Timing, cache_bytes, interleave, memory

DTYPE = torch.bfloat16
ITEMSIZE = DTYPE.itemsize
STATISTIC_TOLERANCE = (
    1e-3  # float32 sums of positive terms in another order, with a division and a square root between them
)
CACHES = 4  # weights that calls in turn read, in units of the largest cache


@dataclass
class MeasurementSettings:
    """Settings of a run. `seconds` is the longest that one group is timed."""

    device: str
    backend: str
    repeats: int
    quick: bool
    seconds: float = 30.0


class Memory:
    """The calls that measure the memory's bandwidth, in turn with every group."""

    def __init__(self, device: str):
        self.source, self.bytes, self.calls = memory(device)


@dataclass
class Measured:
    """A group's rows, and the cases that failed."""

    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def turns(needed: int, device: str) -> int:
    """After how many calls, each reading `needed` bytes of its own, the first one's bytes are out of the caches.

    At least two: a block alone, however large, finds the end of its last call in the cache.
    """
    return max(2, ceil(CACHES * cache_bytes(device) / max(needed, 1)))


class Copies:
    """Copies of one block with random weights, so that calls in turn find nothing in the caches."""

    def __init__(self, shape: Shape, device: str, needed: int):
        """`needed` is the smallest number of bytes that a call of the group reads."""
        count = turns(needed, device)
        generator = torch.Generator(device).manual_seed(0)
        d, f, r = shape.hidden_size, shape.neurons, cases.RANK

        def weights(rows: int, columns: int, fan_in: int) -> Tensor:
            empty = allocate(rows, torch.empty(0, columns, dtype=DTYPE, device=device))
            return empty.normal_(std=fan_in**-0.5, generator=generator)

        def copy(weights: Tensor) -> Tensor:
            return allocate(len(weights), weights).copy_(weights)

        gate_up_plus, down_plus = weights(2 * f + r, d, d), weights(f + r, d, f)
        self.shape = shape
        self.packed = [PackedFF(gate_up_plus, down_plus, shape.activation, r)]
        self.packed += [PackedFF(copy(gate_up_plus), copy(down_plus), shape.activation, r) for _ in range(1, count)]
        enough = turns(cases.dense_bytes(d, f, ITEMSIZE), device)
        self.dense = [
            DenseWeights(ff.gate_up_plus[: 2 * f].clone(), ff.down_plus[:f].t().contiguous())
            for ff in self.packed[:enough]
        ]

    def blocks(self, rank: int) -> list[PackedFF]:
        """The copies with only the first `rank` rows of the low-rank layer: shorter views of the same memory."""
        f = self.shape.neurons
        return [
            PackedFF(ff.gate_up_plus[: 2 * f + rank], ff.down_plus[: f + rank], ff.activation, rank)
            for ff in self.packed
        ]


def measure(group: Group, settings: MeasurementSettings, backend: Backend, memory: Memory) -> Measured:
    """The rows of a group. A case whose output is wrong, or that raises an exception, is an error without a row."""
    device, shape, measured = settings.device, group.shape, Measured()
    statistics = group.section == "statistics"
    copies = Copies(shape, device, min(_needed(case, shape) for case in group.cases))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(group.tokens, shape.hidden_size, generator=generator).to(device, DTYPE)
    timers: dict[Any, Timer] = {None: Timer(memory.calls, device)}
    known: dict[Any, Row] = {}  # the columns of a case that are known before it is timed

    def attempt(key: Any, what: str, prepare: Callable[[], tuple[list[Call], Row]], graph: bool = True) -> None:
        try:
            calls, known[key] = prepare()
            timers[key] = Timer(calls, device, graph)
        except Exception as error:  # whatever a kernel or a compiler raises, the other cases are still measured
            reason = str(error).strip().split("\n")[0]
            measured.errors.append(f"{group.section}, {shape.name}, {group.tokens} tokens, {what}: {reason}")

    expected = reference.dense_ff(x, copies.packed[0])
    for name, make in candidates(device, shape.activation, compiled=not settings.quick).items():
        attempt(name, f"dense ({name})", partial(_dense, make, copies, x, expected))
    prepare = {"statistics": _statistics, "core": _core}.get(group.section, _forward)
    # The reference's statistics read segment bounds on the host, which a CUDA graph cannot do.
    graph = not (statistics and backend is reference)
    for case in group.cases:
        attempt(case, _describe(case), partial(prepare, case, backend, copies, x, generator), graph)

    timings = interleave(timers, settings.repeats, settings.seconds)
    bandwidth = memory.bytes / timings.pop(None).median / 1e9
    dense = {name: each for name, each in timings.items() if isinstance(name, str)}
    if not dense:
        measured.errors.append(
            f"{group.section}, {shape.name}: no dense block ran, so there is nothing to compare with"
        )
        return measured
    best = min(dense, key=lambda name: dense[name].median)
    common = {
        "section": group.section,
        "shape": shape.name,
        "hidden_size": shape.hidden_size,
        "neurons": shape.neurons,
        "tokens": group.tokens,
    }

    def row(timed: Timing, columns: Row, **names: Any) -> Row:
        speed = columns["required_mb"] / timed.median / 1e3
        return {
            **common,
            **names,
            **columns,
            "time_us": timed.median * 1e6,
            "min_us": timed.least * 1e6,
            "iqr_us": timed.iqr * 1e6,
            "gb_s": speed,
            "bandwidth_gb_s": bandwidth,
            "bandwidth_share": speed / bandwidth,
            "ratio": timed.median / dense[best].median,
            "samples": timed.samples,
        }

    candidate_times = ", ".join(f"{name} {each.median * 1e6:.0f} us" for name, each in dense.items())
    measured.rows.append(row(dense[best], known[best], method="dense", kernel=best) | {"candidates": candidate_times})
    for case, timed in timings.items():
        if isinstance(case, Case):
            names = {"method": case.method, "kernel": settings.backend, "density": case.density, "rank": case.rank}
            names |= {"selection": case.selection, "overlap": case.overlap}
            measured.rows.append(row(timed, known[case], **names))
    return measured


def _needed(case: Case, shape: Shape) -> int:
    k = reference.griffin_count(case.density, shape.neurons)
    if case.method in ("griffin", "core"):
        return cases.griffin_bytes(shape.hidden_size, k, case.rank, ITEMSIZE)
    return cases.cats_bytes(shape.hidden_size, shape.neurons, k, case.rank, ITEMSIZE)


def _describe(case: Case) -> str:
    more = "" if case.selection is None else f", {case.selection}"
    more += "" if case.overlap is None else f" {case.overlap:g}"
    return f"{case.method}, density {case.density:g}, rank {case.rank}{more}"


def _dense(
    make: Callable[[DenseWeights], Callable[[Tensor], Tensor]], copies: Copies, x: Tensor, expected: Tensor
) -> tuple[list[Call], Row]:
    runs = [make(weights) for weights in copies.dense]
    error = check(runs[0](x), expected)
    shape = copies.shape
    needed = cases.dense_bytes(shape.hidden_size, shape.neurons, ITEMSIZE)
    return [partial(run, x) for run in runs], {"required_mb": needed / 1e6, "error": error}


def _forward(
    case: Case, backend: Backend, copies: Copies, x: Tensor, generator: torch.Generator
) -> tuple[list[Call], Row]:
    """Calls of griffin_ff or cats_ff over the copies, and the row's columns that are known before timing.

    As the engine calls them: y and counts go where they belong, and the list of rows, which the engine makes once a
    step for all layers, is there already (`caprese bench decode` times it too).
    """
    shape, blocks = copies.shape, copies.blocks(case.rank)
    ff, out = blocks[0], torch.empty_like(x)
    if case.method == "griffin":
        keep, slots = (table.to(x.device) for table in cases.selections(case, shape.neurons, generator))
        plans = backend.plan_layers(keep[None], slots)
        run = partial(backend.griffin_ff, x, row_plan=None if plans is None else plans[0], out=out)
        error = check(run(ff, keep, slots), reference.griffin_ff(x, ff, keep, slots))
        union = int(keep.any(dim=0).sum())
        needed = cases.griffin_bytes(shape.hidden_size, union, case.rank, ITEMSIZE)
        note: Row = {"kept_share": float(keep.float().mean())}
        if case.selection:
            note["mean_overlap"] = cases.pairwise_overlap(keep)
        calls: list[Call] = [partial(run, each, keep, slots) for each in blocks]
    else:
        g, z = reference.activations(x, ff)
        tau, slots = cases.thresholds(g, case.density), torch.arange(len(x), device=x.device)
        error = check_cats(backend.cats_ff(x, ff, tau, slots), reference.cats_ff(x, ff, tau, slots), g, z, tau, ff)
        mask = g.abs().float() >= tau[:, None]
        union = int(mask.any(dim=0).sum())
        needed = cases.cats_bytes(shape.hidden_size, shape.neurons, union, case.rank, ITEMSIZE)
        note = {"kept_share": float(mask.float().mean())}
        kept = torch.zeros((), dtype=torch.int64, device=x.device)
        calls = [partial(backend.cats_ff, x, each, tau, slots, out=out, kept=kept) for each in blocks]
    return calls, {**note, "union": union, "required_mb": needed / 1e6, "error": error}


def _core(
    case: Case, backend: Backend, copies: Copies, x: Tensor, generator: torch.Generator
) -> tuple[list[Call], Row]:
    """Calls of core_ff over the copies: the last floor(d F) neurons are every token's."""
    count, slots = reference.griffin_count(case.density, copies.shape.neurons), x.new_zeros(len(x), dtype=torch.int64)
    blocks = copies.blocks(case.rank)
    keep = torch.zeros(1, copies.shape.neurons, dtype=torch.bool, device=x.device)
    keep[:, copies.shape.neurons - count :] = True
    own: Callable[..., Tensor] = backend.core_ff
    if backend.NAME == "cpu":
        own = partial(own, path="kernel")
    run = own if case.selection == "kernel" else reference.core_ff
    cores = [block.core(count) for block in blocks]
    error = check(run(x, cores[0], slots), reference.griffin_ff(x, blocks[0], keep, slots))
    columns = {"kept_share": count / copies.shape.neurons, "union": count, "error": error}
    return [partial(run, x, core, slots) for core in cores], columns | {
        "required_mb": _needed(case, copies.shape) / 1e6
    }


def _statistics(
    case: Case, backend: Backend, copies: Copies, x: Tensor, generator: torch.Generator
) -> tuple[list[Call], Row]:
    """Calls that compute a prompt's statistic and select by it. Required bytes: the activations, read once."""
    shape, ff, device = copies.shape, copies.packed[0], x.device
    f, tokens = shape.neurons, len(x)
    offsets, slots = torch.tensor([0, tokens], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    if case.method == "griffin":
        _, source = reference.activations(x, ff)
        ours, expected = (torch.zeros(1, f, device=device) for _ in range(2))
        k = reference.griffin_count(case.density, f)

        def run(source: Tensor, table: Tensor = ours) -> Tensor:
            backend.griffin_observe(source, offsets, slots, table)
            return backend.griffin_select(table, k)

        keep = run(source)
        reference.griffin_observe(source, offsets, slots, expected)
        error = float(((ours - expected).norm() / expected.norm()).nan_to_num(torch.inf))
        demand(error <= STATISTIC_TOLERANCE, f"s^2 within {STATISTIC_TOLERANCE:g} of the reference", f"{error:.2g}")
        wrong = int((keep != reference.griffin_select(ours, k)).sum())
        demand(wrong == 0, "the reference's selection by the same statistic", f"{wrong} neurons selected differently")
    else:
        source = torch.nn.functional.linear(x, ff.gate_up_plus[: 2 * f])  # its gate columns, as in vLLM
        ours, expected = (torch.zeros(1, reference.NUM_MAGNITUDES, dtype=torch.int64, device=device) for _ in range(2))

        def run(source: Tensor, table: Tensor = ours) -> Tensor:
            backend.cats_observe(source, shape.activation, offsets, slots, table)
            return backend.cats_threshold(table, case.density)

        tau = run(source[:, :f])
        reference.cats_observe(source[:, :f], shape.activation, offsets, slots, expected)
        counted = int(ours.sum())
        demand(counted == tokens * f, f"{tokens * f} magnitudes counted", str(counted))
        right = reference.cats_threshold(expected, case.density)
        error = float(((tau - right).abs() / right).max().nan_to_num(torch.inf))
        # An activation computed in another way may round to a neighbour, at most 2^-7 away.
        demand(error <= 2**-7, "the reference's threshold up to one step of bfloat16", f"{error:.2g} away")
    needed = tokens * f * ITEMSIZE
    views = [source] + [source.clone() for _ in range(1, turns(needed, device.type))]
    return [partial(run, view[:, :f]) for view in views], {"required_mb": needed / 1e6, "error": error}
