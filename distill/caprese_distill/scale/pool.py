"""Ray workers that hold a model and run functions of it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from textwrap import shorten
from typing import Any

from caprese_kernels.errors import CapreseError

RETRIES = 3  # after so many more deaths of workers on the same shard, or of new workers, the run fails
START_SECONDS = 300.0  # a run without a worker waits so long for one to start: a place, a process and its imports

logger = logging.getLogger(__name__)


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

    def start(self) -> None:
        """Returns once the process is there."""

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(self.model, *arguments)


class Pool:
    """Workers, each with the model that `load` returns there; use it in a `with` statement, after `connect`.

    `load` is sent to the workers, so it must be a module's function with its arguments (functools.partial), and paths
    in it must exist on every node.

    A worker that dies, alone or with its node, is replaced by a new one. Ray could restart it itself, but its callers
    would then wait without end where no node has room for it. Here a job is given only to a worker that has started,
    and a run that has none left waits for START_SECONDS.
    """

    def __init__(self, load: Callable[[], Any], num_workers: int, resources: Mapping[str, float]):
        import ray

        self._load = load
        self._actor = ray.remote(_Worker).options(
            num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_restarts=0, max_task_retries=0
        )
        self.num_workers = num_workers
        self._started: list[Any] = []
        self._starting: dict[Any, Any] = {}  # what `start` will return -> the worker
        self._failed_starts = 0  # since a worker last started
        for _ in range(num_workers):
            self._start()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        import ray

        for actor in (*self._started, *self._starting.values()):
            ray.kill(actor)
        self._started, self._starting = [], {}

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """function(model, *job) of every job, in the jobs' order, each on the first free worker.

        Re-raises an error of the function. The job of a worker that dies is repeated on another; CapreseError if a job
        kills 1 + RETRIES workers, or if no worker is left and none can be started.
        """
        import ray

        numbered, early, wanted, taken = enumerate(jobs), dict[int, Any](), 0, 0
        repeated: list[tuple[int, tuple[Any, ...]]] = []
        deaths, idle = Counter[int](), list(self._started)
        running: dict[Any, tuple[Any, tuple[int, tuple[Any, ...]]]] = {}  # result -> (worker, job)
        while True:
            # The most jobs running or waiting for an earlier one, however slow that is: two a worker.
            while idle and (repeated or taken < wanted + 2 * self.num_workers):
                job = repeated.pop(0) if repeated else next(numbered, None)
                if job is None:
                    break
                taken = max(taken, job[0] + 1)
                actor = idle.pop()
                running[actor.run.remote(function, job[1])] = actor, job
            if idle and not running and not repeated:
                return
            done = self._first(running)
            if done in self._starting:
                idle += self._finish_start(done)
                continue
            actor, job = running.pop(done)
            try:
                early[job[0]] = ray.get(done)
                idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                self._started.remove(actor)
                ray.kill(actor)  # where it is only out of reach
                self._start()
                deaths[job[0]] += 1
                if deaths[job[0]] > RETRIES:
                    raise _dead(error, f"survives its share of the work in {1 + RETRIES} attempts") from None
                logger.warning("a worker was lost, its share of the work is repeated: %s", _reason(error))
                repeated.append(job)
            while wanted in early:
                yield early.pop(wanted)
                wanted += 1

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(model, *arguments) on one of the workers."""
        return next(self.map(function, [arguments]))

    def _start(self) -> None:
        actor = self._actor.remote(self._load)
        self._starting[actor.start.remote()] = actor

    def _first(self, running: Iterable[Any]) -> Any:
        """The first of `running`, or of the workers being started, to end. CapreseError if nothing can."""
        import ray

        results = list(running)
        # What runs ends, for Ray reports a lost worker or node as an error; what is started may wait for a place.
        wait = None if results else START_SECONDS
        done, _ = ray.wait([*self._starting, *results], num_returns=1, timeout=wait)
        if done:
            return done[0]
        raise CapreseError(
            "workers",
            expected=f"a place on the Ray cluster for at least one within {START_SECONDS:.0f} s",
            found="none: a node was lost, or others use its CPUs or GPUs",
            fix="add a node or lower --num-workers; the same command continues from the checkpoint",
        )

    def _finish_start(self, result: Any) -> list[Any]:
        """The worker that has started; none if it died at that. Then a new one is tried, RETRIES times."""
        import ray

        actor = self._starting.pop(result)
        try:
            ray.get(result)
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts <= RETRIES:
                self._start()
            elif not self._started:
                raise _dead(error, f"starts in {1 + RETRIES} attempts") from None
            return []
        self._failed_starts = 0
        self._started.append(actor)
        return [actor]


def _dead(error: Exception, what: str) -> CapreseError:
    return CapreseError(
        "workers",
        expected=f"one that {what}",
        found=_reason(error),
        fix="give them more memory, or a lower --max-length; the same command continues from the checkpoint",
    )


def _reason(error: Exception) -> str:
    return shorten(str(error).strip().splitlines()[-1], 300)
