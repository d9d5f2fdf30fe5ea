"""The paper's layer-wise solver: Adam on eq. 7 (section 3.1, hyperparameters of appendix E, Table 6).

Every layer's L and R is trained on its own, all from the same forward passes of the original model
("previous FF blocks are assumed to be from the original model"). No activation is stored: each
epoch runs the model again. The closed form (`solve`) reaches the optimum of the same loss in one
pass; this solver serves comparisons, and models whose D x D moments do not fit into memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from caprese_kernels.errors import CapreseError

from ..schedule import linear_schedule
from .solve import Solution, balance, ratio


@dataclass(frozen=True)
class AdamSettings:
    """Hyperparameters; the defaults are the paper's."""

    lr: float = 1e-3
    batch: int = 128  # samples of a step; an epoch's last step may have fewer
    epochs: int = 20
    warmup: float = 0.02  # share of the steps
    seed: int = 0  # of the first L, and of the order of samples in each epoch


class LowRank:
    """L [D, r] and R [r, D] of one layer, with the loss and gradient of the rows added since the last step.

    float32 whatever the model's dtype: a bfloat16 weight loses every step below 1/512 of itself, as
    Adam's steps are once the rate has fallen, and rounds larger ones to a few values.
    """

    def __init__(self, depth: int, rank: int, generator: torch.Generator, device: torch.device | str = "cpu"):
        left = torch.randn(depth, rank, generator=generator) * depth**-0.5
        self.left = nn.Parameter(left.to(device))
        self.right = nn.Parameter(torch.zeros(rank, depth, device=device))
        self.clear()

    def clear(self) -> None:
        """Begin a step: drop the gradients and sums of the last one."""
        self.left.grad = self.right.grad = None
        self.after, self.before = torch.zeros(2, dtype=torch.float64, device=self.left.device)

    def add(self, x: Tensor, e: Tensor, y: Tensor) -> None:
        """Add N rows, x, e [N, D] of any floating dtype, to the sums ||E - X L R||^2 and ||E||^2."""
        x, e = x.to(self.left.dtype), e.to(self.left.dtype)
        with torch.enable_grad():
            loss = (e - x @ self.left @ self.right).square().sum()
            loss.backward()
        self.after += loss.detach()
        self.before += e.square().sum()


class Residual:
    """Adds to `sums` [3] float64, over rows, ||e - x L R||^2, ||e||^2 and ||y||^2, for L and R as they are stored.

    The same figures as `Moments.error` without D x D sums.
    """

    def __init__(self, left: Tensor, right: Tensor, sums: Tensor):
        self.left, self.right, self.sums = left.float(), right.float(), sums

    def add(self, x: Tensor, e: Tensor, y: Tensor) -> None:
        """Add N rows: x, e, y [N, D] of any floating dtype."""
        x, e = x.float(), e.float()
        rows = (e - x @ self.left @ self.right, e, y.float())
        self.sums += torch.stack([t.square().sum(dtype=torch.float64) for t in rows])


class Descent:
    """Adam on eq. 7 for all layers, up to step `step` of `steps`; then the pass for the errors of the result.

    One optimizer for all: Adam treats every number on its own, so the layers stay independent.
    """

    def __init__(
        self, layers: Sequence[int], depth: int, rank: int, samples: int, settings: AdamSettings, device: torch.device
    ):
        self.settings, self.samples = settings, samples
        self.steps = settings.epochs * math.ceil(samples / settings.batch)
        self.layers = {i: LowRank(depth, rank, _generator(settings.seed, "layer", i), device) for i in layers}
        self.sums = {
            part: {i: torch.zeros(3, dtype=torch.float64, device=device) for i in layers}
            for part in ("fit", "held_out")
        }
        parameters = [p for layer in self.layers.values() for p in (layer.left, layer.right)]
        self.optimizer = torch.optim.Adam(parameters)
        self.step = 0  # done
        self.batches = 0  # of the pass for the errors, done
        self.tokens = 0  # fed in all
        self.seconds = 0.0
        self.seconds_training = 0.0

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return math.ceil(self.step * self.settings.epochs / self.steps)

    @property
    def position(self) -> str:
        done = f"step {self.step} of {self.steps}"
        return f"{done} and batch {self.batches} of the pass for the errors" if self.batches else done

    def draw(self) -> list[int]:
        """Indices of the next step's samples: each epoch takes all of them once, in its own order."""
        epoch, step = divmod(self.step, self.steps // self.settings.epochs)
        order = torch.randperm(self.samples, generator=_generator(self.settings.seed, "epoch", epoch)).tolist()
        return order[step * self.settings.batch : (step + 1) * self.settings.batch]

    def update(self, rows: int) -> float:
        """A step of Adam on the mean over the `rows` rows that each layer was given.

        Returns ||E - X L R||^2 / ||E||^2 before the step, the mean of the layers.
        """
        remaining = [ratio(self._finite(i, layer.after), float(layer.before)) for i, layer in self.layers.items()]
        (group,) = self.optimizer.param_groups
        group["lr"] = self.settings.lr * linear_schedule(self.step, self.steps, self.settings.warmup)
        for parameter in group["params"]:
            parameter.grad /= rows
        self.optimizer.step()
        for layer in self.layers.values():
            layer.clear()
        self.step += 1
        return sum(remaining) / len(remaining)

    def residuals(self, dtype: torch.dtype) -> dict[str, dict[int, Residual]]:
        """The sinks of the pass for the errors, by part ("fit", "held_out") and layer."""
        pairs = self._stored(dtype)
        return {
            part: {i: Residual(*pairs[i], sums) for i, sums in by_layer.items()} for part, by_layer in self.sums.items()
        }

    def solutions(self, dtype: torch.dtype) -> dict[int, Solution]:
        """L and R of each layer in `dtype`, with the errors of that pass."""
        found = {}
        for i, (left, right) in self._stored(dtype).items():
            self._finite(i, self.sums["fit"][i])
            after, before, output = self.sums["held_out"][i].tolist()
            fit_after, fit_before, _ = self.sums["fit"][i].tolist()
            found[i] = Solution(
                left,
                right,
                ridge=None,
                error_before=ratio(before, output),
                error_after=ratio(after, output),
                remaining=ratio(after, before),
                remaining_fit=ratio(fit_after, fit_before),
            )
        return found

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and progress for a checkpoint, between steps."""
        tensors = {f"{part}.{i}": sums for part, by_layer in self.sums.items() for i, sums in by_layer.items()}
        for i, layer in self.layers.items():
            tensors |= {f"L.{i}": layer.left.detach(), f"R.{i}": layer.right.detach()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
        names = ("step", "batches", "tokens", "seconds", "seconds_training")
        return tensors, {name: getattr(self, name) for name in names}

    def resume(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Take the state of a snapshot of a run with the same layers, samples and settings."""
        with torch.no_grad():
            for i, layer in self.layers.items():
                layer.left.copy_(tensors[f"L.{i}"])
                layer.right.copy_(tensors[f"R.{i}"])
            for part, by_layer in self.sums.items():
                for i, sums in by_layer.items():
                    sums.copy_(tensors[f"{part}.{i}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for name, number in progress.items():
            setattr(self, name, number)

    def _stored(self, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """L and R as the adapter file has them; balanced, because R starts at zero and float16 has no small numbers."""
        balanced = {i: balance(d.left.detach().double(), d.right.detach().double()) for i, d in self.layers.items()}
        return {i: (left.to(dtype), right.to(dtype)) for i, (left, right) in balanced.items()}

    def _finite(self, layer: int, sums: Tensor) -> float:
        """The first of `sums`; CapreseError if any of them is NaN or Inf (`Observer` has checked the activations)."""
        if not torch.isfinite(sums).all():
            raise CapreseError(
                f"Adam, layer {layer}",
                expected="a finite loss",
                found=f"NaN or Inf at step {self.step} of {self.steps}",
                fix=f"use a learning rate below {self.settings.lr:g}",
            )
        return float(sums.flatten()[0])


def _generator(*purpose: object) -> torch.Generator:
    """Random numbers of one purpose, the same on every device."""
    return torch.Generator().manual_seed(random.Random(repr(purpose)).getrandbits(63))
