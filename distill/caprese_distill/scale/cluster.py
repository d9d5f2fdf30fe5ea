"""Distillation on several workers, by Ray (`--num-workers N`): each holds the model and processes a share of the data.

Moments add up, so a worker sums those of a shard (consecutive batches) alone, and the shards' sums are added in the
shards' order: the result does not depend on which worker had which shard, nor on which finished first. Workers whose
matrix products have the same bits (the same GPUs, or CPUs with the same number of threads) give the same bits for any
number of workers, equal to one process's moments up to float64 rounding. Ray restarts dead workers and repeats their
shards. This process holds no model, only the sums, the checkpoint and the progress bar.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from rich.console import Console

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from .. import checkpoint
from ..data.batches import BATCH_TOKENS, Batch, make_batches
from ..data.samples import Sample
from ..layer_wise.closed_form import check_samples, solve_layers
from ..layer_wise.moments import Moments
from ..layer_wise.passes import Pass, checkpointed, feeding, prepare_pass
from ..layer_wise.solve import Solution, solve
from ..work import Work
from .ray_training import Workers, train

# A pass is cut into SHARDS shards of at most SHARD_BATCHES batches (then into more shards): enough for the workers to
# finish at about the same time, but few, because each shard's sums (2 * 8 * D^2 bytes a layer) are sent once.
SHARDS, SHARD_BATCHES = 32, 64
RETRIES = 3  # after so many more deaths of workers on the same shard, the run fails


def connect(num_workers: int, device: str = "auto") -> tuple[str, dict[str, float]]:
    """Join the Ray cluster of RAY_ADDRESS, or start one on this machine.

    Returns the workers' device, "cpu" or "cuda", and the resources of each: a GPU, or its share of the CPUs, which is
    also its number of threads. CapreseError if Ray is missing or unreachable, or if fewer CPUs or GPUs are free than
    `num_workers` (Ray itself would wait for them).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 40 s each, where there is no cluster
    try:
        import ray
    except ImportError:
        raise CapreseError(
            "--num-workers", expected="Ray", found="no module ray", fix="pip install 'caprese-vllm[ray]'"
        ) from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        try:
            ray.init(address, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CapreseError(
                "Ray",
                expected="a cluster at RAY_ADDRESS, or room for one on this machine",
                found=shorten(str(error), 250),
                fix="start it (ray start --head), or unset RAY_ADDRESS",
            ) from None
    free = ray.available_resources()
    gpus, cpus = int(free.get("GPU", 0)), int(free.get("CPU", 0))
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    found, kind = (gpus, "GPUs") if device == "cuda" else (cpus, "CPUs")
    if num_workers > found:
        raise CapreseError(
            "--num-workers",
            expected=f"at most {found}, the {kind} that Ray has free",
            found=str(num_workers),
            fix="lower it",
        )
    if device == "cuda":
        return device, {"GPU": 1, "CPU": 1}
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return device, {"CPU": threads_of(nodes, num_workers, cpus)}


def threads_of(nodes: Sequence[int], num_workers: int, free: int) -> int:
    """The most CPUs that each worker can have of the `free` ones, all on one node; `nodes` has each node's CPUs."""
    return next(
        n for n in range(free // num_workers, 0, -1) if sum(node // n for node in nodes) >= num_workers or n == 1
    )


class _Worker:
    """Runs functions of the model. It loads the model at the first call, so that a loading error reaches the caller."""

    def __init__(self, load: Callable[[], Any]):
        self.load = load

    @cached_property
    def model(self) -> Any:
        return self.load().eval()

    def run(self, index: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, Any]:
        return index, function(self.model, *arguments)


class Pool:
    """Workers, each with the model that `load` returns there; use it in a `with` statement, after `connect`.

    `load` is sent to the workers, so it must be a module's function with its arguments (functools.partial), and paths
    in it must exist on every node.
    """

    def __init__(self, load: Callable[[], Any], num_workers: int, resources: Mapping[str, float]):
        import ray
        from ray.util import ActorPool

        actor = ray.remote(_Worker).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        self.actors = [actor.remote(load) for _ in range(num_workers)]
        self.pool = ActorPool(self.actors)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """function(model, *job) of every job, in the jobs' order, each on the first free worker.

        Re-raises an error of the function. A worker that dies is restarted and its job repeated; CapreseError if that
        job kills it 1 + RETRIES times.
        """
        import ray

        numbered, early, wanted = enumerate(jobs), dict[int, Any](), 0

        def submit(count: int) -> None:
            for job in itertools.islice(numbered, count):
                self.pool.submit(lambda actor, job: actor.run.remote(job[0], function, job[1]), job)

        submit(2 * len(self.actors))  # the most jobs running or waiting for an earlier one, however slow that is
        try:
            while self.pool.has_next():
                index, result = self.pool.get_next_unordered()
                early[index] = result
                while wanted in early:
                    yield early.pop(wanted)
                    wanted += 1
                    submit(1)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise CapreseError(
                "workers",
                expected=f"one that survives its share of the work in {1 + RETRIES} attempts",
                found=shorten(str(error).strip().splitlines()[-1], 300),
                fix="give them more memory, or a lower --max-length; the same command continues from the checkpoint",
            ) from None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments) on one of the workers."""
        return next(self.map(function, [arguments]))


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
) -> Pass:
    """`passes.run_pass` on the workers of `pool`, the sums in this process; the checkpoint is the same."""
    identity, device = pool.call(_prepare_pass, samples, info, method, resume is not None)
    state = Pass.begin(dict.fromkeys(method.layers, torch.device("cpu")), info.hidden_size)
    batches = make_batches(samples, device)
    identity |= {"batch": BATCH_TOKENS[device.type]}  # this process's: it cuts the batches
    with checkpointed(state, batches, resume, identity, console) as record:
        parts = shards(batches, state.batches)
        for part, sums in zip(parts, pool.map(_sum_shard, ((info, method, part) for part in parts)), strict=True):
            for i, moments in (state.held_out if part[0].held_out else state.fit).items():
                for field, value in zip(fields(Moments), sums[i], strict=True):
                    total = getattr(moments, field.name).numpy()
                    total += value
            record(len(part))
    return state


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

    def layer_wise(self, work: Work, resume: Path | None = None, console: Console | None = None) -> Adapters:
        """`distill_layer_wise` in closed form: the pass by shards, then the solutions by layers."""
        assert work.adam is None, "DistillConfig allows Adam in one process only"
        pool = self.pool()
        with contextlib.closing(self):
            dtype = pool.call(_dtype)
            check_samples(work.samples, dtype)
            state = run_pass(pool, work.samples, work.info, work.method, resume, console)
            solve_all = partial(pool.map, _solve)
            return solve_layers(state, work.samples, work.info, work.method, dtype, console, solve_all)

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


# What workers run. Matrices are passed as numpy arrays, which Ray keeps in shared memory without a copy.


def _dtype(model: Any) -> torch.dtype:
    return model.dtype


def _fingerprint(model: Any, samples: Sequence[Sample], settings: Mapping[str, Any]) -> dict[str, Any]:
    return checkpoint.fingerprint(model, samples, **settings, dtype=str(model.dtype))


def _prepare_pass(
    model: Any, samples: Sequence[Sample], info: BaseModelInfo, method: Method, digest: bool
) -> tuple[dict[str, Any], torch.device]:
    return prepare_pass(model, samples, info, method, digest, parts=1), next(model.parameters()).device


@torch.no_grad()
def _sum_shard(
    model: Any, info: BaseModelInfo, method: Method, batches: Sequence[Batch]
) -> dict[int, list[np.ndarray]]:
    device = next(model.parameters()).device
    sums = {i: Moments.zeros(info.hidden_size, device) for i in method.layers}
    with feeding(model, info, method) as feed:
        for batch in batches:
            feed(batch, sums)
    return {i: [getattr(m, f.name).cpu().numpy() for f in fields(m)] for i, m in sums.items()}


def _solve(model: Any, fit: Moments, held_out: Moments, rank: int, dtype: torch.dtype) -> Solution:
    device = next(model.parameters()).device
    fit, held_out = (Moments(*(getattr(m, f.name).to(device) for f in fields(m))) for m in (fit, held_out))
    solution = solve(fit, held_out, rank, dtype)
    return replace(solution, left=solution.left.cpu(), right=solution.right.cpu())
