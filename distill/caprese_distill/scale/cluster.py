"""Distillation on several workers, by Ray (`--num-workers N`): each holds the model, and takes a share of the data.

Moments add up, so a worker sums those of a shard (some batches in a row) by itself, and the shards' sums are added in
the shards' order: the result does not depend on which worker had which shard, or which was done first. Workers whose
matrix products have the same bits (the same GPUs, or CPUs with the same number of threads) give the same bits however
many they are, and one process's moments to float64's rounding. Ray itself starts dead workers again and repeats what
they had begun. This process holds no model: it has the sums, the checkpoint and the progress bar.
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
from ..data.samples import Sample
from ..end_to_end.train import Recipe
from ..layer_wise.adam import AdamSettings
from ..layer_wise.closed_form import BATCH_TOKENS, Pass, check, close, feeding, make_batches, prepare, recorded
from ..layer_wise.moments import Batch, Moments
from ..layer_wise.solve import Solution, solve
from .ray_training import train

# A pass is cut into as many shards as this, unless they would have more batches than that: enough shards for the
# workers to end at about the same time, and few, because a shard's sums (2 * 8 * D^2 bytes a layer) travel once each.
SHARDS, SHARD_BATCHES = 32, 64
RETRIES = 3  # deaths over one and the same shard, after which it is the shard's fault, or the machine's


def connect(num_workers: int, device: str = "auto") -> tuple[str, dict[str, float]]:
    """Join the Ray cluster of RAY_ADDRESS, or start one on this machine.

    Returns "cpu" or "cuda", where the workers are to run, and what each of them has: a GPU, or its part of the CPUs,
    which is also its number of threads. Raises CapreseError where Ray is missing or unreachable, or where fewer
    CPUs or GPUs are free than there are to be workers (Ray itself would wait for them).
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
    """The most CPUs that each worker can have, of `free` ones; a worker's are all on one of the `nodes`, CPUs each."""
    return next(
        n for n in range(free // num_workers, 0, -1) if sum(node // n for node in nodes) >= num_workers or n == 1
    )


class _Worker:
    """Runs functions of the model, which it loads when the first one comes (an error is then that function's)."""

    def __init__(self, load: Callable[[], Any]):
        self.load = load

    @cached_property
    def model(self) -> Any:
        return self.load().eval()

    def run(self, index: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, Any]:
        return index, function(self.model, *arguments)


class Pool:
    """`num_workers` workers, each with the model that `load` returns there; to be used in a `with` statement.

    `load` travels to the workers, so it is a function of some module and its arguments (functools.partial). A path in
    it must be good on every node. `connect` comes first.
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
        """function(model, *job) of every job, in the jobs' order, each by the worker that was free first.

        An error of the function is raised here. A worker that dies is started again, and its job repeated; when
        it dies of that again and again, CapreseError tells how.
        """
        import ray

        numbered, early, wanted = enumerate(jobs), dict[int, Any](), 0

        def submit(count: int) -> None:
            for job in itertools.islice(numbered, count):
                self.pool.submit(lambda actor, job: actor.run.remote(job[0], function, job[1]), job)

        submit(2 * len(self.actors))  # no more than these are under way or early, however slow one of them is
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
                expected=f"one that lives through its share of the work in {1 + RETRIES} attempts",
                found=shorten(str(error).strip().splitlines()[-1], 300),
                fix="give them more memory, or a lower --max-length; what is done is kept if the run has checkpoints",
            ) from None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments) on one of the workers."""
        return next(self.map(function, [arguments]))


def shards(batches: Sequence[Batch], done: int = 0) -> list[list[Batch]]:
    """The batches from number `done` on, cut at places that do not depend on it, and where those held out begin."""
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
    """layerwise.run_pass on the workers of `pool`, sums in this process's memory; the same checkpoint serves both."""
    identity, device = pool.call(_prepare, samples, info, method, resume is not None)
    state = Pass.begin(dict.fromkeys(method.layers, torch.device("cpu")), info.hidden_size)
    batches = make_batches(samples, device)
    identity |= {"batch": BATCH_TOKENS[device.type]}  # of this process: it is here that batches are cut
    with recorded(state, batches, resume, identity, console) as record:
        parts = shards(batches, state.batches)
        for part, sums in zip(parts, pool.map(_sum_shard, ((info, method, part) for part in parts)), strict=True):
            for i, moments in (state.held_out if part[0].held_out else state.fit).items():
                for field, value in zip(fields(Moments), sums[i], strict=True):
                    total = getattr(moments, field.name).numpy()
                    total += value
            record(len(part))
    return state


class Cluster:
    """The stages' work on `num_workers` workers, each with `resources` and the model that `load` returns there.

    `connect` comes first. One set of workers serves until the end of the layer-wise stage and then gives its CPUs or
    GPUs back; Ray Train starts those of the end-to-end stage. Every node reads and writes `scratch`, a directory, and
    the checkpoint.
    """

    def __init__(self, load: Callable[[], Any], num_workers: int, resources: Mapping[str, float], scratch: Path):
        self.load, self.num_workers, self.resources, self.scratch = load, num_workers, resources, scratch
        self.pool: Pool | None = None

    def close(self) -> None:
        if self.pool:
            self.pool.close()
        self.pool = None

    def workers(self) -> Pool:
        self.pool = self.pool or Pool(self.load, self.num_workers, self.resources)
        return self.pool

    def fingerprint(self, samples: Sequence[Sample], **settings: Any) -> dict[str, Any]:
        """checkpoint.fingerprint of the workers' model."""
        return self.workers().call(_fingerprint, samples, settings)

    def layer_wise(
        self,
        samples: Sequence[Sample],
        info: BaseModelInfo,
        method: Method,
        resume: Path | None = None,
        console: Console | None = None,
        adam: AdamSettings | None = None,
    ) -> Adapters:
        """layerwise.distill_layer_wise without `adam`: the pass by shards, then the closed form by layers."""
        if adam is not None:
            raise CapreseError(
                "--solver", expected="closed-form with --num-workers", found="adam", fix="take out one of the two"
            )
        pool = self.workers()
        with contextlib.closing(self):
            dtype = pool.call(_dtype)
            check(samples, dtype)
            state = run_pass(pool, samples, info, method, resume, console)
            return close(state, samples, info, method, dtype, console, partial(pool.map, _solve))

    def end_to_end(
        self,
        samples: Sequence[Sample],
        info: BaseModelInfo,
        method: Method,
        initial: Adapters,
        recipe: Recipe,
        resume: Path | None = None,
        console: Console | None = None,
        writer: Any = None,
    ) -> Adapters:
        """end_to_end.distill_end_to_end, every step's samples shared out among the workers."""
        self.close()
        work = (samples, info, method, initial, recipe, resume, console, writer)
        return train(self.load, self.num_workers, self.resources, *work, self.scratch)


# What workers run. Matrices come and go as numpy arrays, which Ray keeps in shared memory without a copy.


def _dtype(model: Any) -> torch.dtype:
    return model.dtype


def _fingerprint(model: Any, samples: Sequence[Sample], settings: Mapping[str, Any]) -> dict[str, Any]:
    return checkpoint.fingerprint(model, samples, **settings, dtype=str(model.dtype))


def _prepare(
    model: Any, samples: Sequence[Sample], info: BaseModelInfo, method: Method, digest: bool
) -> tuple[dict[str, Any], torch.device]:
    return prepare(model, samples, info, method, digest, parts=1), next(model.parameters()).device


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
