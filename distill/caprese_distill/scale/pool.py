"""Ray workers that hold a model and run functions of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from textwrap import shorten
from typing import Any

from caprese_kernels.errors import CapreseError

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
