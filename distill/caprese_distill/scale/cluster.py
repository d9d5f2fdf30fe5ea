"""Distillation on several workers, by Ray (`--num-workers N`): each holds the model and processes a share of the data.

Moments add up, so a worker sums those of a shard (consecutive batches) alone, and the shards' sums are added in the
shards' order: the result does not depend on which worker had which shard, nor on which finished first. Workers whose
matrix products have the same bits (the same GPUs, or CPUs with the same number of threads) give the same bits for any
number of workers, equal to one process's moments up to float64 rounding. Dead workers are replaced and their shards
repeated. This process holds no model, only the sums, the checkpoint and the progress bar.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method

from .. import checkpoint
from ..data.batches import BATCH_TOKENS, Batch, make_batches, pack
from ..data.samples import Sample, split
from ..layer_wise.closed_form import check_samples, solve_layers, with_priors
from ..layer_wise.moments import Moments
from ..layer_wise.passes import Pass, checkpointed, feeding, prepare_pass
from ..layer_wise.solve import Solution, solve
from ..prior import PriorSums, feeding_priors, prior_identity
from ..quality import Quality, measure_adapters
from ..selection import Priors
from ..work import Work
from .pool import Pool
from .ray_training import Workers, train

# A pass is cut into SHARDS shards of at most SHARD_BATCHES batches (then into more shards): enough for the workers to
# finish at about the same time, but few, because each shard's sums (2 * 8 * D^2 bytes a layer) are sent once.
SHARDS, SHARD_BATCHES = 32, 64


def shards(batches: Sequence[Batch], done: int = 0) -> list[list[Batch]]:
    """The batches from number `done` on, cut at places independent of `done`, and where held-out batches begin."""
    size = min(SHARD_BATCHES, math.ceil(len(batches) / SHARDS))
    fit = sum(not b.held_out for b in batches)
    cuts = [done, *(c for c in sorted({*range(0, fit, size), *range(fit, len(batches), size)}) if c > done)]
    return [list(batches[a:b]) for a, b in zip(cuts, [*cuts[1:], len(batches)], strict=True) if a < b]


def run_pass(
    pool: Pool,
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    resume: Path | None = None,
    console: Console | None = None,
    priors: Priors | None = None,
) -> Pass:
    """`passes.run_pass` on the workers of `pool`, the sums in this process; the checkpoint is the same."""
    identity, device = pool.call(_prepare_pass, samples, info, method, resume is not None, priors)
    state = Pass.begin(dict.fromkeys(method.layers, torch.device("cpu")), info.hidden_size)
    batches = make_batches(samples, device)
    identity |= {"batch": BATCH_TOKENS[device.type]}  # this process's: it cuts the batches
    with checkpointed("original model", state, batches, resume, identity, console) as record:
        parts = shards(batches, state.batches)
        jobs = ((info, method, part, priors) for part in parts)
        for part, sums in zip(parts, pool.map(_sum_shard, jobs), strict=True):
            for i, moments in (state.held_out if part[0].held_out else state.fit).items():
                for field, value in zip(fields(Moments), sums[i], strict=True):
                    total = getattr(moments, field.name).numpy()
                    total += value
            record(len(part))
    return state


def run_prior_pass(
    pool: Pool, samples: Sequence[Sample], info: BaseModelInfo, method: Method, resume: Path, console: Console | None
) -> dict[int, Tensor]:
    """`prior.collect_priors` on the workers of `pool`, the sums in this process; the checkpoint is the same."""
    identity, device = pool.call(_prepare_prior_pass, samples, method)
    batches = pack(samples, device)
    identity |= {"batch": BATCH_TOKENS[device.type]}  # this process's: it cuts the batches
    state = PriorSums.zeros(dict.fromkeys(method.layers, torch.device("cpu")), info.intermediate_size)
    with checkpoint.checkpointed("priors", state, batches, resume, identity, console) as record:
        parts = shards(batches, state.batches)
        jobs = ((info, method, part) for part in parts)
        for part, sums in zip(parts, pool.map(_sum_priors, jobs), strict=True):
            for i, total in state.sums.items():
                total += torch.from_numpy(np.array(sums[i]))
            record(len(part))
    return state.priors()


class Cluster:
    """Computes the stages on Ray workers, after `connect`.

    One set of workers serves until the end of the layer-wise stage and then releases its CPUs or GPUs; Ray Train starts
    its own for the end-to-end stage. Every node reads and writes the checkpoint.
    """

    def __init__(self, workers: Workers):
        self.workers = workers
        self._pool: Pool | None = None

    def close(self) -> None:
        """End the workers of the layer-wise stage."""
        if self._pool:
            self._pool.close()
        self._pool = None

    def pool(self) -> Pool:
        """The workers of the layer-wise stage, started at the first call."""
        self._pool = self._pool or Pool(self.workers.load, self.workers.count, self.workers.resources)
        return self._pool

    def fingerprint(self, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
        """`checkpoint.fingerprint` of the workers' model."""
        return self.pool().call(_fingerprint, samples, settings)

    def priors(self, work: Work, resume: Path, console: Console | None = None) -> dict[int, Tensor]:
        """`collect_priors` of the samples to fit, the pass by shards."""
        return run_prior_pass(self.pool(), split(work.samples)[0], work.info, work.method, resume, console)

    def layer_wise(self, work: Work, resume: Path | None = None, console: Console | None = None) -> Adapters:
        """`distill_layer_wise` in closed form: the pass by shards, then the solutions by layers."""
        assert work.adam is None, "DistillConfig allows Adam in one process only"
        pool = self.pool()
        with contextlib.closing(self):
            dtype = pool.call(_dtype)
            check_samples(work.samples, dtype)
            state = run_pass(pool, work.samples, work.info, work.method, resume, console, work.priors)
            solve_all = partial(pool.map, _solve)
            solved = solve_layers(state, work.samples, work.info, work.method, dtype, console, solve_all)
            return with_priors(solved, work.priors)

    def end_to_end(
        self,
        work: Work,
        initial: Adapters,
        resume: Path | None = None,
        console: Console | None = None,
        writer: Any = None,
    ) -> Adapters:
        """`distill_end_to_end`, every step's samples shared out among the workers."""
        assert work.recipe is not None
        self.close()
        return train(self.workers, work.samples, initial, work.recipe, resume, console, writer)

    def quality(
        self, samples: Sequence[Sample], adapters: Adapters, console: Console | None = None
    ) -> dict[str, Quality]:
        """`measure_adapters` on one worker, which takes a small part of the run's time."""
        self.close()
        with Pool(self.workers.load, 1, self.workers.resources) as pool:
            return pool.call(_quality, adapters, samples)


# What workers run. Matrices are passed as numpy arrays, which Ray keeps in shared memory without a copy.


def _dtype(model: Any) -> torch.dtype:
    return model.dtype


def _fingerprint(model: Any, samples: Sequence[Sample], settings: Mapping[str, Any]) -> dict[str, Any]:
    return checkpoint.fingerprint(model, samples, **settings, dtype=str(model.dtype))


def _prepare_pass(
    model: Any, samples: Sequence[Sample], info: BaseModelInfo, method: Method, digest: bool, priors: Priors | None
) -> tuple[dict[str, Any], torch.device]:
    device = next(model.parameters()).device
    return prepare_pass(model, samples, info, method, digest, parts=1, priors=priors), device


def _prepare_prior_pass(model: Any, samples: Sequence[Sample], method: Method) -> tuple[dict[str, Any], torch.device]:
    return prior_identity(model, samples, method), next(model.parameters()).device


@torch.no_grad()
def _sum_priors(model: Any, info: BaseModelInfo, method: Method, batches: Sequence[Batch]) -> dict[int, np.ndarray]:
    device = next(model.parameters()).device
    state = PriorSums.zeros(dict.fromkeys(method.layers, device), info.intermediate_size)
    with feeding_priors(model, info, method) as feed:
        for batch in batches:
            feed(batch, state)
    return {i: total.cpu().numpy() for i, total in state.sums.items()}


def _quality(model: Any, adapters: Adapters, samples: Sequence[Sample]) -> dict[str, Quality]:
    return measure_adapters(model, adapters, samples)


@torch.no_grad()
def _sum_shard(
    model: Any, info: BaseModelInfo, method: Method, batches: Sequence[Batch], priors: Priors | None
) -> dict[int, list[np.ndarray]]:
    device = next(model.parameters()).device
    sums = {i: Moments.zeros(info.hidden_size, device) for i in method.layers}
    with feeding(model, info, method, priors) as feed:
        for batch in batches:
            feed(batch, sums)
    return {i: [getattr(m, f.name).cpu().numpy() for f in fields(m)] for i, m in sums.items()}


def _solve(model: Any, fit: Moments, held_out: Moments, rank: int, dtype: torch.dtype) -> Solution:
    device = next(model.parameters()).device
    fit, held_out = (Moments(*(getattr(m, f.name).to(device) for f in fields(m))) for m in (fit, held_out))
    solution = solve(fit, held_out, rank, dtype)
    return replace(solution, left=solution.left.cpu(), right=solution.right.cpu())
