"""Estimates a distillation's time by running a few of its batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from caprese_kernels.config import BaseModelInfo, Method

from .blocks import find_blocks
from .data.batches import Batch, make_batches, pack
from .end_to_end.losses import backward
from .head import Head
from .layer_wise.adam import LowRank
from .layer_wise.moments import Moments, Sink
from .layer_wise.passes import feeding
from .layer_wise.solve import RIDGES, reduced_rank
from .layer_wise.weighted import Gradients
from .placement import return_freed
from .prior import PriorSums, feeding_priors
from .selection import Priors, selectors_of, uniform_priors
from .student import Student, frozen
from .work import RemainingWork, Work

PROBES = 3  # batches of a stage that are timed


def estimate_seconds(model: Any, work: Work, remaining: RemainingWork) -> dict[str, float]:
    """Seconds of every stage with remaining work, from running small parts of it; they change nothing."""
    info, method = work.info, work.method
    seconds: dict[str, float] = {}
    device = next(model.parameters()).device
    model.eval()
    priors = work.priors or (uniform_priors(info, method) if method.needs_prior else None)
    if remaining.prior:
        seconds["priors"] = _seconds_of_priors(model, info, method, remaining.prior)
    if remaining.batches:
        sink: Sink
        if work.adam is None:
            sink = Moments.zeros(info.hidden_size, device)
        else:
            sink = LowRank(info.hidden_size, method.rank, torch.Generator().manual_seed(0), device)
        name = "original model" if work.adam is None else "Adam"
        seconds[name] = _seconds_of_pass(model, work, priors, remaining.batches, sink)
    if remaining.weighted:
        seconds["gradients"] = _seconds_of_gradients(model, work, priors, remaining.weighted)
    if remaining.layers:
        seconds["closed form"] = len(remaining.layers) * _seconds_of_solve(info.hidden_size, method.rank, device)
    if work.recipe is not None and (remaining.steps or remaining.evaluations):
        seconds["end to end"] = _seconds_of_training(model, work, priors, remaining)
    return seconds


@torch.no_grad()
def _seconds_of_priors(model: Any, info: BaseModelInfo, method: Method, batches: Sequence[Batch]) -> float:
    device, chosen = next(model.parameters()).device, _spread(batches)
    sums = PriorSums.zeros(dict.fromkeys(method.layers, device), info.intermediate_size)
    with feeding_priors(model, info, method) as feed:
        feed(_small(batches), sums)
        seconds = _timed(device, lambda: [feed(batch, sums) for batch in chosen])
    return seconds / _padded(chosen) * _padded(batches)


@torch.no_grad()
def _seconds_of_pass(model: Any, work: Work, priors: Priors | None, batches: Sequence[Batch], sink: Sink) -> float:
    """One sink takes the rows of all layers: the same work with the memory of one layer."""
    device = next(model.parameters()).device
    sinks, chosen = dict.fromkeys(work.method.layers, sink), _spread(batches)
    with feeding(model, work.info, work.method, priors) as feed:
        feed(_small(batches), sinks)
        seconds = _timed(device, lambda: [feed(batch, sinks) for batch in chosen])
    return seconds / _padded(chosen) * _padded(batches)


def _seconds_of_gradients(model: Any, work: Work, priors: Priors | None, batches: Sequence[Batch]) -> float:
    """The pass of the weighted closed form; one layer's sums, added to twice, stand for those of all layers."""
    device, chosen, info, method = next(model.parameters()).device, _spread(batches), work.info, work.method
    blocks, sums = find_blocks(model, info, method.layers), Moments.zeros(info.hidden_size, device)

    selectors = selectors_of(blocks, method, priors)

    def feed(batch: Batch) -> None:
        target = student.original(batch)
        for gradient in gradients(batch, target).values():
            for _ in range(2):
                sums.add(target, gradient, target)

    with (
        frozen(model, True),
        Student(model, blocks, selectors, *_zeros(info, method)) as student,
        Gradients(model, blocks, student) as gradients,
    ):
        feed(_small(batches))
        seconds = sum(_timed(device, partial(feed, batch)) for batch in chosen)
    return seconds / _padded(chosen) * _padded(batches)


def _zeros(info: BaseModelInfo, method: Method) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """L and R of zeros."""
    shapes = ((info.hidden_size, method.rank), (method.rank, info.hidden_size))
    left, right = ({i: torch.zeros(shape) for i in method.layers} for shape in shapes)
    return left, right


def _seconds_of_solve(depth: int, rank: int, device: torch.device) -> float:
    """Solving one layer: every ridge takes the same time, so that timing one is enough."""
    rows = torch.randn(2 * depth, 2 * depth, generator=torch.Generator().manual_seed(0)).to(device)
    moments = Moments.zeros(depth, device)
    moments.add(rows[:, :depth], rows[:, depth:], rows[:, :depth])

    def solve_one() -> None:
        found = reduced_rank(moments, rank, RIDGES[len(RIDGES) // 2])
        assert found is not None
        moments.error(*found)

    return len(RIDGES) * _timed(device, solve_one)


def _seconds_of_training(model: Any, work: Work, priors: Priors | None, remaining: RemainingWork) -> float:
    info, method, recipe = work.info, work.method, work.recipe
    assert recipe is not None
    device = next(model.parameters()).device
    batches = [batch for step in remaining.steps for batch in pack(step, device)]
    held_out = [batch for batch in make_batches(work.samples, device) if batch.held_out]
    chosen = _spread(batches or held_out)
    blocks = find_blocks(model, info, method.layers)
    selectors = selectors_of(blocks, method, priors)
    head = None if recipe.loss == "hidden" else Head(model)
    states: list[tuple[Tensor, Tensor]] = []  # of the student and of the original

    def forward_pass(batch: Batch) -> None:
        original = student.original(batch)
        states.append((student(batch), original))

    def backward_pass() -> None:
        backward(recipe.loss, *states.pop(), head, 1)

    with (
        frozen(model, recipe.gradient_checkpointing),
        Student(model, blocks, selectors, *_zeros(info, method)) as student,
    ):
        forward_pass(_small(chosen))
        backward_pass()
        return_freed()
        forward_seconds, backward_seconds = 0.0, 0.0
        for batch in chosen:
            forward_seconds += _timed(device, partial(forward_pass, batch))
            backward_seconds += _timed(device, backward_pass)
            return_freed()
        optimizer = torch.optim.Adam(student.parameters())
        optimizer.step()  # allocates its state
        update = _timed(device, optimizer.step)
    rate = forward_seconds / _padded(chosen)
    evaluating = remaining.evaluations * rate * _padded(held_out)
    training = (rate + backward_seconds / _padded(chosen)) * _padded(batches)
    return training + len(remaining.steps) * update + evaluating


def _spread(batches: Sequence[Batch]) -> list[Batch]:
    """PROBES of the batches, spread over their sizes."""
    ordered = sorted(batches, key=lambda b: b.num_padded)
    return [ordered[len(ordered) * (2 * i + 1) // (2 * PROBES)] for i in range(PROBES)]


def _small(batches: Sequence[Batch]) -> Batch:
    """A batch to warm up with: the shortest sample alone."""
    shortest = min((s for batch in batches for s in batch.samples), key=lambda s: len(s.ids))
    return Batch([shortest], False, batches[0].device)


def _padded(batches: Sequence[Batch]) -> int:
    return sum(batch.num_padded for batch in batches)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.monotonic() - started, math.ulp(1.0))
