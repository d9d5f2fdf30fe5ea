"""The closed form weighted by the end-to-end gradient: a token's weight is what an error there does to the answer.

Equation 7 weights every generated token alike, though most come out right whatever the FF block loses. Here the row of
generated token n has, in layer i, the weight

    w_n = ||g_n|| / mean ||g|| + FLOOR,   g_n = d KL(original || student) / d FF_i(x_n),

the divergence of the two distributions of the next token, summed over the generated tokens; g_n of token n and layer i
sees all later layers and tokens. The student is the sparse model with the adapters of the unweighted closed form: the
gradient shows what those left wrong. It takes one more pass over the samples, forward and backward; no activation is
stored.

    adapters = distill_weighted(model, samples, distill_layer_wise(model, samples, info, method))
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from caprese_kernels.adapters import Adapters
from caprese_kernels.config import Method, method_of

from ..blocks import find_blocks
from ..checkpoint import digest
from ..data.batches import Batch, make_batches
from ..data.samples import Sample
from ..head import LOGIT_ROWS, Head, divergence
from ..placement import device_of
from ..progress import progress_bar
from ..selection import selectors_of
from ..student import Student, check_gradient, frozen
from .moments import Moments, Observer
from .passes import Pass, block_devices, checkpointed, pass_identity
from .solve import Solution, ratio, solve

FLOOR = 1.0  # with less (0.1), the demo model's easy task loses what its hard one wins: see docs/distill.md


@dataclass
class WeightedPass:
    """Sums of one pass, up to batch number `batches`. `alike` weights every row by 1, `scaled` by ||g_n||: the mean of
    ||g|| is known only at the end, and sums add up."""

    alike: Pass
    scaled: Pass
    norms: dict[int, Tensor]  # sum of ||g_n|| over the rows to fit, [] float64
    seconds: float = 0.0

    @classmethod
    def begin(cls, devices: Mapping[int, torch.device], depth: int) -> WeightedPass:
        """All zero; `devices` has the device of each layer's sums."""
        norms = {i: torch.zeros((), dtype=torch.float64, device=device) for i, device in devices.items()}
        return cls(Pass.begin(devices, depth), Pass.begin(devices, depth), norms)

    @property
    def batches(self) -> int:
        return self.alike.batches

    @batches.setter
    def batches(self, count: int) -> None:
        self.alike.batches = count

    @property
    def position(self) -> str:
        return self.alike.position

    def add(self, layer: int, held_out: bool, rows: tuple[Tensor, Tensor, Tensor], gradient: Tensor) -> None:
        """Add N rows of a layer: x, e, y and the gradient at its FF block's output, [N, D] each."""
        norm = gradient.float().norm(dim=1)
        root = norm.sqrt()[:, None]
        x, e, y = (part.float() for part in rows)
        for sums, factor in ((self.alike, None), (self.scaled, root)):
            part = sums.held_out if held_out else sums.fit
            part[layer].add(*((x, e, y) if factor is None else (x * factor, e * factor, y * factor)))
        if not held_out:
            self.norms[layer] += norm.sum(dtype=torch.float64)

    def weighted(self, layer: int) -> tuple[Moments, Moments]:
        """The weighted moments to fit and held out; every row alike where there is no gradient at all."""
        alike, scaled = self.alike, self.scaled
        mean = float(self.norms[layer]) / max(int(alike.fit[layer].rows), 1)
        if mean == 0.0:
            return alike.fit[layer], alike.held_out[layer]
        pairs = ((alike.fit, scaled.fit), (alike.held_out, scaled.held_out))
        return tuple(_blend(a[layer], s[layer], mean) for a, s in pairs)  # type: ignore[return-value]

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"norms.{i}": norm for i, norm in self.norms.items()}
        for name, part in (("alike", self.alike), ("scaled", self.scaled)):
            tensors |= {f"{name}.{key}": tensor for key, tensor in part.snapshot()[0].items()}
        return tensors, {"batches": self.batches, "seconds": self.seconds}

    def resume(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        for name, part in (("alike", self.alike), ("scaled", self.scaled)):
            part.resume(
                {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}, progress
            )
        for i, norm in self.norms.items():
            norm.copy_(tensors[f"norms.{i}"])
        self.seconds = progress["seconds"]


def _blend(alike: Moments, scaled: Moments, mean: float) -> Moments:
    """Moments of weights ||g_n|| / mean + FLOOR; `rows` still counts rows."""
    sums = {
        f.name: getattr(scaled, f.name) / mean + FLOOR * getattr(alike, f.name)
        for f in fields(Moments)
        if f.name != "rows"
    }
    return Moments(**sums, rows=alike.rows)


class _Rows(dict[str, Tensor]):
    """A layer's rows of one batch, as `Observer` measures them: x, e and y [N, D]."""

    def add(self, x: Tensor, e: Tensor, y: Tensor) -> None:
        self.update(x=x, e=e, y=y)


class Gradients:
    """g_n of a batch: the gradient of KL(original || student) at each sparse FF block's output."""

    def __init__(self, model: Any, blocks: Mapping[int, nn.Module], student: Student):
        self.student, self.head = student, Head(model)
        self.probes: dict[int, Tensor] = {}
        self.handles = [block.register_forward_hook(self._hook(i)) for i, block in blocks.items()]

    def __enter__(self) -> Gradients:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def __call__(self, batch: Batch, target: Tensor) -> dict[int, Tensor]:
        """By layer, [N, D] in the model's dtype; `target` [N, D] is `student.original(batch)`."""
        self.probes = {
            i: torch.zeros_like(target, device=left.device, requires_grad=True) for i, left in self.student.left.items()
        }
        with torch.enable_grad():
            hidden = self.student(batch)
            chunks = zip(hidden.detach().split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True)
            at_hidden = torch.cat([_divergence_gradient(*chunk, self.head) for chunk in chunks])
            found = torch.autograd.grad(hidden, list(self.probes.values()), at_hidden)
        return dict(zip(self.probes, found, strict=True))

    def _hook(self, layer: int) -> Any:
        def add_probe(_: nn.Module, __: object, y: Tensor) -> Tensor | None:
            if not self.student.sparse:
                return None
            assert self.student.batch is not None
            return y.flatten(0, 1).index_add(0, self.student.batch.rows(), self.probes[layer]).view_as(y)

        return add_probe


def _divergence_gradient(hidden: Tensor, target: Tensor, head: Head) -> Tensor:
    """d KL / d hidden of some tokens, [N, D]."""
    hidden = hidden.requires_grad_()
    return torch.autograd.grad(divergence(hidden, target, head), hidden)[0]


def weighted_identity(model: Any, samples: Sequence[Sample], method: Method, initial: Adapters) -> dict[str, Any]:
    """All that the weighted sums depend on: a checkpoint with another identity is not resumed."""
    return pass_identity(model, samples, method, priors=initial.prior) | {
        "weighting": "gradient",
        "initial adapters": digest(initial.tensors()),
    }


@torch.no_grad()
def run_weighted_pass(
    model: Any,
    samples: Sequence[Sample],
    initial: Adapters,
    resume: Path | None = None,
    console: Console | None = None,
    gradient_checkpointing: bool = True,
) -> WeightedPass:
    """Feed every sample to the original model and to the student with the adapters `initial`, forward and backward, and
    sum the weighted moments. `resume` as in `run_pass`: a killed run continues from that file, to the same bits.

    CapreseError for a gradient that is not finite; it names the layer and the samples.
    """
    info, method = initial.config.base_model, method_of(initial.config)
    device = device_of(model.get_input_embeddings())
    blocks = find_blocks(model, info, method.layers)
    selectors = selectors_of(blocks, method, initial.prior)
    state = WeightedPass.begin(block_devices(model, info, method), info.hidden_size)
    batches = make_batches(samples, device)
    identity = weighted_identity(model, samples, method, initial) if resume else {}
    with (
        checkpointed("gradients", state, batches, resume, identity, console) as record,
        frozen(model, gradient_checkpointing),
        Observer(blocks, selectors) as observer,
        Student(model, blocks, selectors, initial.left, initial.right) as student,
        Gradients(model, blocks, student) as gradients,
    ):
        for batch in batches[state.batches :]:
            rows = {i: _Rows() for i in method.layers}
            observer.expect(batch, rows)
            target = student.original(batch)
            observer.expect(batch, {})  # the student's pass is not the original's
            for i, gradient in gradients(batch, target).items():
                check_gradient(gradient, i, batch)
                state.add(i, batch.held_out, (rows[i]["x"], rows[i]["e"], rows[i]["y"]), gradient)
            record(1)
    return state


def distill_weighted(
    model: Any,
    samples: Sequence[Sample],
    initial: Adapters,
    resume: Path | None = None,
    console: Console | None = None,
    gradient_checkpointing: bool = True,
) -> Adapters:
    """Adapters by the weighted closed form, from those of the unweighted one (`initial`), in the model's dtype.

    The ridge is the one of least weighted held-out error. The `errors` in `training` stay those of eq. 7, which weights
    every row alike, so that they compare; they are larger than those of `initial`, which minimizes them.
    """
    method = method_of(initial.config)
    state = run_weighted_pass(model, samples, initial, resume, console, gradient_checkpointing)
    started, solutions = time.monotonic(), {}
    with progress_bar(console, "layers/s") as bar:
        for i in bar.track(method.layers, description="closed form, weighted"):
            found = solve(*state.weighted(i), method.rank, model.dtype)
            solutions[i] = _with_errors(found, state.alike.fit[i], state.alike.held_out[i])
    seconds = state.seconds + time.monotonic() - started
    before = initial.config.training
    numbers = ("ridge", "error_before", "error_after", "remaining", "remaining_fit")
    training = before | {
        "weighting": "gradient",
        "seconds": round(before["seconds"] + seconds, 1),
        "errors": {str(i): {key: getattr(s, key) for key in numbers} for i, s in solutions.items()},
    }
    config = initial.config.model_copy(update={"training": training})
    left, right = {i: s.left for i, s in solutions.items()}, {i: s.right for i, s in solutions.items()}
    return Adapters(config, left, right, initial.prior)


def _with_errors(found: Solution, fit: Moments, held_out: Moments) -> Solution:
    """`found` with the errors of its L and R over these moments."""
    pair = found.left.double(), found.right.double()
    error = held_out.error(*pair)
    return replace(
        found,
        error_before=ratio(float(held_out.ee), float(held_out.yy)),
        error_after=ratio(error, float(held_out.yy)),
        remaining=ratio(error, float(held_out.ee)),
        remaining_fit=ratio(fit.error(*pair), float(fit.ee)),
    )
