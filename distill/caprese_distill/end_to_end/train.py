"""End-to-end distillation (paper, section 3.2): L and R of all layers together, from the layer-wise ones.

    min over L, R of the mean over generated tokens of ||M(x) - M_student(x)||^2     (eq. 8)

with M the last hidden state before the head, or another of `losses`. Adam, linear schedule with warm-up (paper,
appendix E, table 6).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method, method_of
from caprese_kernels.errors import CapreseError

from .. import checkpoint
from ..blocks import find_blocks
from ..checkpoint import CheckpointStore
from ..config import Loss
from ..data.batches import make_batches, pack
from ..data.samples import Sample, split
from ..head import LOGIT_ROWS, Head, divergence
from ..placement import device_of, return_freed
from ..progress import progress_bar
from ..schedule import linear_schedule
from ..selection import selection_settings, selectors_of
from ..student import SharedModel, Student, frozen
from .losses import backward

# Batches are cut from this many batches of shuffled samples, sorted by length: little padding, and almost as random
# as without the sorting.
SORTED_BATCHES = 16


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are table 6's, and the loss is eq. 8's."""

    learning_rate: float
    batch: int = 16  # samples of an optimizer step
    epochs: int = 3
    warmup: float = 0.02  # share of the steps
    seed: int = 0
    gradient_checkpointing: bool = True
    loss: Loss = "hidden"


def default_learning_rate(hidden_size: int) -> float:
    """2e-4 for D <= 2048, 4e-6 for D >= 8192, and between them linear in the logarithms.

    The paper gives only the interval, and says that larger models learn better at smaller rates.
    """
    share = min(max(math.log(hidden_size / 2048) / math.log(8192 / 2048), 0.0), 1.0)
    return 2e-4 * (4e-6 / 2e-4) ** share


class RankContext:
    """This process among those that share every step's samples: the only one. `writer` is a TensorBoard SummaryWriter
    (rank 0), or None."""

    rank, size = 0, 1

    def __init__(self, writer: Any = None):
        self.writer = writer

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the processes, in place."""


def steps_of(samples: Sequence[Sample], recipe: Recipe) -> list[list[Sample]]:
    """The samples of every optimizer step, all epochs, longest first within a step.

    The seed and the epoch's number determine an epoch's order, so that a resumed run has the same.
    """
    steps = []
    for epoch in range(recipe.epochs):
        draw = random.Random(f"{recipe.seed} {epoch}")
        order = draw.sample(list(samples), len(samples))
        chunk = recipe.batch * SORTED_BATCHES
        ordered = [
            s for i in range(0, len(order), chunk) for s in sorted(order[i : i + chunk], key=lambda s: -len(s.ids))
        ]
        batches = [ordered[i : i + recipe.batch] for i in range(0, len(ordered), recipe.batch)]
        steps += draw.sample(batches, len(batches))
    return steps


class Trainer:
    """The student, its optimizer and the steps done; `run` does the rest of them."""

    def __init__(
        self,
        model: Any,
        student: SharedModel,
        samples: Sequence[Sample],
        recipe: Recipe,
        ranks: RankContext,
    ):
        self.student, self.recipe, self.ranks = student, recipe, ranks
        self.device = device_of(model.get_input_embeddings())
        fit, _ = split(samples)
        self.steps = steps_of(fit, recipe)
        self.held_out = [batch for batch in make_batches(samples, self.device) if batch.held_out]
        self.optimizer = torch.optim.Adam(student.parameters(), lr=recipe.learning_rate)
        self.step, self.seconds = 0, 0.0
        self.errors: list[float] = []  # held out, relative; before the first epoch and after each
        self.divergences: list[float] = []  # KL held out, nats a token, at the same times; empty for the loss "hidden"
        self.head = None if recipe.loss == "hidden" else Head(model)
        self.best: list[Tensor] = []  # the parameters after `best_epoch`

    @property
    def best_epoch(self) -> int:
        """The epoch with the smallest held-out KL (hidden: error); 0: before the first."""
        measured = self.divergences or self.errors
        return measured.index(min(measured))

    @property
    def position(self) -> str:
        return f"step {self.step} of {len(self.steps)}"

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and progress for a checkpoint, between steps."""
        tensors: dict[str, Tensor] = {}
        for n, p in enumerate(self.student.parameters()):
            tensors[f"parameter.{n}"] = p.detach()
            tensors |= {f"{key}.{n}": value for key, value in self.optimizer.state[p].items()}
        tensors |= {f"best.{n}": p for n, p in enumerate(self.best)}
        lists = {"errors": self.errors, "divergences": self.divergences}
        return tensors, {"step": self.step, "seconds": self.seconds, **lists}

    @torch.no_grad()
    def resume(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        self.best = []
        for n, p in enumerate(self.student.parameters()):
            p.copy_(tensors[f"parameter.{n}"])
            state = {key.removesuffix(f".{n}"): tensor for key, tensor in tensors.items() if key.endswith(f".{n}")}
            del state["parameter"]
            self.best.append(state.pop("best").to(p.device))
            if state:  # none yet before the first step; Adam keeps its "step" on the CPU
                self.optimizer.state[p] = {k: t if k == "step" else t.to(p.device) for k, t in state.items()}
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.errors, self.divergences = list(progress["errors"]), list(progress["divergences"])

    def check_same_step(self, path: Path | None) -> None:
        """CapreseError unless all processes resume at the same step: a node that does not see the file starts anew."""
        steps = torch.zeros(self.ranks.size, dtype=torch.int64)
        steps[self.ranks.rank] = self.step
        self.ranks.all_reduce(steps)
        if len(steps.unique()) > 1:
            raise CapreseError(
                f"checkpoint {path}",
                expected="one file that all nodes see",
                found=f"steps {steps.tolist()} by worker",
                fix="give an --output in a directory that the nodes share",
            )

    def run(self, store: CheckpointStore, console: Console | None) -> None:
        """Train to the end, with a checkpoint every minute or so and the held-out error at every epoch's end.

        The parameters end as they were after the best epoch: as at the start, if training did not help.
        """
        tokens = [sum(len(s.ids) for s in part) for part in self.steps]
        per_epoch = len(self.steps) // self.recipe.epochs
        started = time.monotonic() - self.seconds
        with progress_bar(console, "tok/s") as bar:
            done = sum(tokens[: self.step])
            line = bar.add_task(self.student.title, total=sum(tokens), completed=done, first=done)
            self._evaluate_held_out(bar)
            while self.step < len(self.steps):
                loss = self._step(self.steps[self.step])
                self.step += 1
                self.seconds = time.monotonic() - started
                self._report_step(bar, line, loss, tokens[self.step - 1])
                if self.step % per_epoch == 0:
                    self._evaluate_held_out(bar)
                if self.ranks.rank == 0:
                    store.save_if_due()
        self.seconds = time.monotonic() - started
        with torch.no_grad():
            for p, best in zip(self.student.parameters(), self.best, strict=True):
                p.copy_(best)

    def _step(self, samples: Sequence[Sample]) -> float:
        """One optimizer step; the loss, mean over the generated tokens of all samples."""
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * linear_schedule(
            self.step, len(self.steps), self.recipe.warmup
        )
        self.optimizer.zero_grad(set_to_none=False)
        rows, mine = sum(s.num_rows for s in samples), samples[self.ranks.rank :: self.ranks.size]
        total = torch.zeros((), dtype=torch.float64)
        for batch in pack(mine, self.device) if mine else ():
            target = self.student.original(batch)
            total += backward(self.recipe.loss, self.student(batch), target, self.head, rows)
            return_freed()
        self.ranks.all_reduce(total)
        for p in self.student.parameters():
            if p.grad is None:  # this process has none of the step's samples
                p.grad = torch.zeros_like(p)
            self.ranks.all_reduce(p.grad)
        if not math.isfinite(float(total)):
            raise CapreseError(
                f"{self.student.title} loss",
                expected="a finite number",
                found=f"{float(total)} in step {self.step + 1}, samples of lines {[s.line for s in samples]}",
                fix="use a lower --learning-rate, or --dtype bfloat16 or float32",
            )
        self.optimizer.step()
        return float(total)

    @torch.no_grad()
    def _evaluate_held_out(self, bar: Progress) -> None:
        """Append the held-out error ||M - M_student||^2 / ||M||^2 to `errors`, once an epoch; KL to `divergences`."""
        epoch = self.step * self.recipe.epochs // len(self.steps)
        if len(self.errors) > epoch:
            return
        sums = torch.zeros(4, dtype=torch.float64)
        mine = self.held_out[self.ranks.rank :: self.ranks.size]
        line = bar.add_task(f"held out, epoch {epoch}", total=sum(b.num_tokens for b in mine), visible=bool(mine))
        for batch in mine:
            target = self.student.original(batch)
            found = self.student(batch)
            sums[0] += float((found.float() - target.float()).square().sum(dtype=torch.float64))
            sums[1] += float(target.float().square().sum(dtype=torch.float64))
            if self.head is not None:
                parts = zip(found.split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True)
                sums[2] += sum(float(divergence(part, of, self.head)) for part, of in parts)
                sums[3] += len(found)
            bar.advance(line, batch.num_tokens)
        bar.remove_task(line)
        self.ranks.all_reduce(sums)
        self.errors.append(float(sums[0] / sums[1]))
        if self.head is not None:
            self.divergences.append(float(sums[2] / sums[3]))
        if self.best_epoch == epoch:
            self.best = [p.detach().clone() for p in self.student.parameters()]
        if self.ranks.writer:
            self.ranks.writer.add_scalar("held-out error", self.errors[-1], self.step)
            if self.head is not None:
                self.ranks.writer.add_scalar("held-out KL", self.divergences[-1], self.step)

    def _report_step(self, bar: Progress, line: TaskID, loss: float, tokens: int) -> None:
        bar.update(line, advance=tokens, description=f"{self.student.title}, loss {loss:.3g}")
        if self.ranks.writer:
            self.ranks.writer.add_scalar("loss", loss, self.step)
            self.ranks.writer.add_scalar("learning rate", self.optimizer.param_groups[0]["lr"], self.step)


def train(
    model: Any,
    student: SharedModel,
    samples: Sequence[Sample],
    recipe: Recipe,
    resume: Path | None,
    identity: Mapping[str, Any],
    console: Console | None = None,
    ranks: RankContext | None = None,
) -> Trainer:
    """Train the student to the end, from the checkpoint `resume` if that belongs to a run with the same identity."""
    ranks = ranks or RankContext()
    trainer, barrier = Trainer(model, student, samples, recipe, ranks), torch.zeros(1)
    if ranks.rank:  # rank 0 alone renames files of other runs
        ranks.all_reduce(barrier)
    store = CheckpointStore(trainer, resume, console, identity)
    if not ranks.rank:
        ranks.all_reduce(barrier)
    trainer.check_same_step(resume)
    trainer.run(store, console)
    return trainer


def training_identity(
    model: Any, samples: Sequence[Sample], method: Method, initial: Mapping[str, Tensor], recipe: Recipe
) -> dict[str, Any]:
    """All that the result of a training depends on: a checkpoint with another identity is not resumed."""
    versions = {
        "dtype": str(model.dtype),
        "device": str(device_of(model.get_input_embeddings())),
        "torch": torch.__version__,
        "kept": "best epoch",  # whose L and R a checkpoint holds, too
    }
    settings = selection_settings(method, None) | {"initial adapters": checkpoint.digest(initial)}
    return checkpoint.fingerprint(model, samples, **settings, **asdict(recipe), **versions)


def distill_end_to_end(
    model: Any,
    samples: Sequence[Sample],
    initial: Adapters,
    recipe: Recipe,
    resume: Path | None = None,
    console: Console | None = None,
    ranks: RankContext | None = None,
) -> Adapters:
    """Adapters for `model` (a transformers causal LM) by the recipe's loss, from `initial`, in the model's dtype.

    The samples held out are those of the layer-wise stage. `training` gains the recipe, the seconds and the held-out
    error ||M - M_student||^2 / ||M||^2 before the first epoch and after each (and the KL, in nats a token, for a loss
    of logits). The adapters are those of the epoch where the KL, or else the error, is smallest, `kept_epoch`: as 0,
    `initial` itself, if no epoch is better. With `resume`, a killed run with the same model, samples, initial adapters
    and settings continues from that file, to the same bits.
    """
    method = method_of(initial.config)
    identity = training_identity(model, samples, method, initial.tensors(), recipe) if resume is not None else {}
    blocks = find_blocks(model, initial.config.base_model, method.layers)
    selectors = selectors_of(blocks, method, initial.prior)
    with (
        frozen(model, recipe.gradient_checkpointing),
        Student(model, blocks, selectors, initial.left, initial.right) as student,
    ):
        trainer = train(model, student, samples, recipe, resume, identity, console, ranks)
        left, right = (
            {i: p.detach().to(model.dtype).cpu() for i, p in part.items()} for part in (student.left, student.right)
        )
    before = initial.config.training
    found: dict[str, Any] = {"steps": trainer.step, "seconds": round(trainer.seconds, 1)}
    found |= {"kept_epoch": trainer.best_epoch, "held_out_errors": trainer.errors}
    if trainer.divergences:
        found |= {"held_out_kl": trainer.divergences}
    training = before | {
        "stage": "end-to-end",
        "seconds": round(before["seconds"] + trainer.seconds, 1),
        "end_to_end": asdict(recipe) | found,
    }
    return Adapters(initial.config.model_copy(update={"training": training}), left, right, initial.prior)
