"""End-to-end distillation on several workers, by Ray Train: every step's samples are shared out among them.

Only L and R are trained, so that is all the workers tell each other of: one sum of their gradients a step, after which
every worker takes the same step. Ray Train replaces all workers when one dies, and they go on from the checkpoint.
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
from caprese_kernels.config import BaseModelInfo, Method
from caprese_kernels.errors import CapreseError

from ..data.samples import Sample, split
from ..end_to_end.train import Group, Recipe, distill_end_to_end, steps_of
from ..progress import progress_bar

FAILURES = 3  # deaths of workers that a run survives (machines that a cluster takes away with notice are not counted)
POLL_SECONDS = 0.5
Work = tuple[Sequence[Sample], BaseModelInfo, Method, Adapters, Recipe]
_MISTAKES = (CapreseError, torch.OutOfMemoryError)  # these would come again


class TorchGroup(Group):
    """The workers of the torch process group that this process is in."""

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def sum_(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)


class _Board:
    """An actor that carries what the workers have to say to the process that started them."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.mistake: Exception | None = None

    def add(self, *scalar: Any) -> None:
        self.scalars.append(scalar)

    def drain(self) -> list[tuple[str, float, int]]:
        scalars, self.scalars = self.scalars, []
        return scalars

    def set_mistake(self, error: Exception) -> None:
        self.mistake = error

    def get_mistake(self) -> Exception | None:
        return self.mistake


@dataclass
class _RemoteWriter:
    """What end_to_end asks of a SummaryWriter, sent to the board."""

    board: Any

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.board.add.remote(name, float(value), step)


def _loop(load: Callable[[], Any], board: Any, resume: Path | None, work: Work) -> Adapters | None:
    """What each worker runs: distill_end_to_end, `work` being its arguments from the samples to the recipe.

    A mistake is raised, so that workers waiting for this one are stopped. Ray Train then tries again, whatever it
    was; the second attempt ends without one.
    """
    import ray

    if ray.get(board.get_mistake.remote()) is not None:
        return None
    group = TorchGroup()
    writer = _RemoteWriter(board) if group.rank == 0 else None
    try:
        return distill_end_to_end(load().eval(), *work, resume, None, writer, group)
    except _MISTAKES as error:
        ray.get(board.set_mistake.remote(error))
        raise


def train(
    load: Callable[[], Any],
    num_workers: int,
    resources: Mapping[str, float],
    samples: Sequence[Sample],
    info: BaseModelInfo,
    method: Method,
    initial: Adapters,
    recipe: Recipe,
    resume: Path | None,
    console: Console | None,
    writer: Any,
    scratch: Path,
) -> Adapters:
    """end_to_end.distill_end_to_end on workers that hold the model which `load` returns there.

    `resume` and `scratch`, a directory for Ray Train's own files, must be good on every node. Raises what a worker
    raised, or CapreseError when workers die more often than FAILURES.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    board = ray.remote(_Board).options(num_cpus=0).remote()
    trainer = TorchTrainer(
        partial(_loop, load, board, resume and resume.absolute(), (samples, info, method, initial, recipe)),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if "GPU" in resources else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu="GPU" in resources, resources_per_worker=dict(resources)
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(scratch.absolute()),
            failure_config=FailureConfig(max_failures=FAILURES, controller_failure_limit=FAILURES),
        ),
    )
    try:
        with _watched(board, steps_of(split(samples)[0], recipe), console, writer):
            adapters = _fit(trainer).return_value
        mistake = ray.get(board.get_mistake.remote())
    except TrainingFailedError as error:
        raise CapreseError(
            "workers",
            expected=f"no more than {FAILURES} deaths in a run",
            found=shorten(str(error), 300),
            fix="run again to go on from the checkpoint, with more memory or a lower --max-length",
        ) from None
    finally:
        ray.kill(board)
    if mistake is not None:
        raise mistake
    assert isinstance(adapters, Adapters)
    return adapters


def _fit(trainer: Any) -> Any:
    """trainer.fit() in a thread: in the main one Ray Train takes Ctrl-C for itself, for good, and ends with code 0."""
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(trainer.fit())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return done.result()


@contextlib.contextmanager
def _watched(board: Any, steps: Sequence[Sequence[Sample]], console: Console | None, writer: Any) -> Iterator[None]:
    """The progress bar, and `writer`, fed from the board by a thread, while this one waits for Ray Train."""
    import ray

    done = [0, *itertools.accumulate(sum(len(s.ids) for s in part) for part in steps)]  # tokens after each step
    last, stop = 0, threading.Event()
    with progress_bar(console, "tok/s") as bar:
        line = bar.add_task("end to end", total=done[-1])

        def look() -> None:
            nonlocal last
            for name, value, step in ray.get(board.drain.remote()):
                if writer:
                    writer.add_scalar(name, value, step)
                if name != "loss":
                    continue
                if step != last + 1:  # a checkpoint of an earlier run, or after a death
                    bar.update(line, first=done[step - 1])
                    if console:
                        console.print(f"going on after step {step - 1} of {len(steps)}")
                last = step
                bar.update(line, completed=done[step], description=f"end to end, loss {value:.3g}")

        def watch() -> None:
            while not stop.wait(POLL_SECONDS):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            look()
