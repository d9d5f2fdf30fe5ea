"""End-to-end distillation on several workers, by Ray Train: every step's samples are shared out among them.

Only L and R are trained, so the workers exchange only one sum of their gradients a step, after which all take the same
step. When a worker dies, Ray Train replaces all of them, and they continue from the checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from torch import Tensor

from caprese_kernels.adapters import Adapters
from caprese_kernels.errors import CapreseError

from ..data.samples import Sample, split
from ..end_to_end.train import RankContext, Recipe, distill_end_to_end, steps_of
from ..progress import progress_bar

FAILURES = 3  # deaths of workers that a run survives (machines that the cluster announces to remove do not count)
POLL_SECONDS = 0.5
_LASTING = (CapreseError, torch.OutOfMemoryError)  # errors that a second attempt would raise again


@dataclass(frozen=True)
class Workers:
    """`count` workers, each with the model that `load` returns there.

    `load` is sent to the workers (see `cluster.Pool`). `resources` of each: "CPU", and "GPU" for a GPU. `scratch` is a
    directory for Ray Train's own files, which all nodes share.
    """

    load: Callable[[], Any]
    count: int
    resources: Mapping[str, float]
    scratch: Path


class TorchRankContext(RankContext):
    """This process among those of its torch process group."""

    def __init__(self, writer: Any = None) -> None:
        super().__init__(writer)
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def all_reduce(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)


class _Mailbox:
    """An actor that carries scalars and an error from the workers to the process that started them."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.error: Exception | None = None

    def add(self, *scalar: Any) -> None:
        self.scalars.append(scalar)

    def drain(self) -> list[tuple[str, float, int]]:
        scalars, self.scalars = self.scalars, []
        return scalars

    def set_error(self, error: Exception) -> None:
        self.error = error

    def get_error(self) -> Exception | None:
        return self.error


@dataclass
class _RemoteWriter:
    """The part of a SummaryWriter that training uses; sends to the mailbox."""

    mailbox: Any

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.mailbox.add.remote(name, float(value), step)


def _train_worker(
    load: Callable[[], Any],
    mailbox: Any,
    samples: Sequence[Sample],
    initial: Adapters,
    recipe: Recipe,
    resume: Path | None,
) -> Adapters | None:
    """Runs on each worker: `distill_end_to_end` with the model that `load` returns.

    A lasting error is raised, so that workers waiting for this one are stopped. Ray Train then tries again, whatever
    the error was; the second attempt returns None.
    """
    import ray

    if ray.get(mailbox.get_error.remote()) is not None:
        return None
    ranks = TorchRankContext()
    ranks.writer = _RemoteWriter(mailbox) if ranks.rank == 0 else None
    try:
        return distill_end_to_end(load().eval(), samples, initial, recipe, resume, None, ranks)
    except _LASTING as error:
        ray.get(mailbox.set_error.remote(error))
        raise


def train(
    workers: Workers,
    samples: Sequence[Sample],
    initial: Adapters,
    recipe: Recipe,
    resume: Path | None,
    console: Console | None,
    writer: Any,
) -> Adapters:
    """`distill_end_to_end` on `workers`; every node reads and writes the checkpoint `resume`.

    Raises what a worker raised, or CapreseError when workers die more often than FAILURES.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()  # no other node loses it
    use_gpu = "GPU" in workers.resources
    trainer = TorchTrainer(
        partial(_train_worker, workers.load, mailbox, samples, initial, recipe, resume and resume.absolute()),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=use_gpu, resources_per_worker=dict(workers.resources)
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(workers.scratch.absolute()),
            failure_config=FailureConfig(max_failures=FAILURES, controller_failure_limit=FAILURES),
        ),
    )
    try:
        with _progress_from(mailbox, steps_of(split(samples)[0], recipe), console, writer):
            adapters = _fit(trainer).return_value
        error = ray.get(mailbox.get_error.remote())
    except TrainingFailedError as failure:
        raise CapreseError(
            "workers",
            expected=f"no more than {FAILURES} deaths in a run",
            found=shorten(str(failure), 300),
            fix="run again to continue from the checkpoint, with more memory or a lower --max-length",
        ) from None
    finally:
        ray.kill(mailbox)
    if error is not None:
        raise error
    assert isinstance(adapters, Adapters)
    return adapters


def _fit(trainer: Any) -> Any:
    """trainer.fit() in a thread: in the main thread Ray Train replaces the handler of Ctrl-C and exits with code 0."""
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(trainer.fit())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return done.result()


@contextlib.contextmanager
def _progress_from(
    mailbox: Any, steps: Sequence[Sequence[Sample]], console: Console | None, writer: Any
) -> Iterator[None]:
    """Within it, a thread feeds the progress bar and `writer` from the mailbox, while this one waits for Ray Train."""
    import ray

    done = [0, *itertools.accumulate(sum(len(s.ids) for s in part) for part in steps)]  # tokens after each step
    last, stop = 0, threading.Event()
    with progress_bar(console, "tok/s") as bar:
        line = bar.add_task("end to end", total=done[-1])

        def update() -> None:
            nonlocal last
            for name, value, step in ray.get(mailbox.drain.remote()):
                if writer:
                    writer.add_scalar(name, value, step)
                if name != "loss":
                    continue
                if step != last + 1:  # resumed from a checkpoint of an earlier run, or after a death
                    bar.update(line, first=done[step - 1])
                    if console:
                        console.print(f"going on after step {step - 1} of {len(steps)}")
                last = step
                bar.update(line, completed=done[step], description=f"end to end, loss {value:.3g}")

        def watch() -> None:
            while not stop.wait(POLL_SECONDS):
                update()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            update()
