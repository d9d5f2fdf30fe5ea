"""Sums over one pass of a model, from which the best L and R of every rank follow, for many methods and densities.

Shapes are as in `caprese_distill.layer_wise.moments`; a case is a method with a density. X and X'X are the same for all
cases of a layer, so they are summed once. Each layer and case has two D x D matrices of float64 for X'E, and one for
E'E if the spectrum is wanted: 13 MB each at D = 1,280, 103 MB at D = 3,584. For a large model use a few layers at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caprese_distill.data.batches import Batch, make_batches
from caprese_distill.data.samples import Sample
from caprese_distill.layer_wise.moments import Moments
from caprese_distill.layer_wise.solve import RIDGES, reduced_rank
from caprese_distill.selection import keep_mask, select
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.reference import griffin_count, griffin_select
from caprese_kernels.selection import LayerSelector

CaseMethod = Literal["top-k", "griffin", "cats"]


class Case(NamedTuple):
    """What drops neurons: GRIFFIN, CATS, or an oracle that keeps the k largest |z| of each token (figure 2)."""

    method: CaseMethod
    density: float

    def keep(self, batch: Batch, g: Tensor, z: Tensor) -> Tensor:
        """Neurons that the batch's generated tokens keep, [N, F] bool, from g, z [B, T, F]."""
        if self.method == "top-k":
            return griffin_select(z.flatten(0, 1)[batch.rows()].abs(), griffin_count(self.density, z.shape[-1]))
        selector = LayerSelector(Method(self.method, self.density, (), 0), z.shape[-1])
        return keep_mask(selector, batch, select(selector, batch, g, z), g)


@dataclass
class CaseSums:
    """Sums of one layer and case; `gram` is E'E [D, D] of the held-out samples, whose eigenvalues are the spectrum."""

    fit: Moments
    held_out: Moments
    gram: Tensor | None

    def spectrum(self) -> Tensor:
        """Eigenvalues of E'E of the held-out samples, largest first, [D]: the squared singular values of E."""
        assert self.gram is not None
        return torch.linalg.eigvalsh(self.gram).flip(0).clamp(min=0)


Sums = dict[int, dict[Case, CaseSums]]  # by layer


@torch.no_grad()
def run_cases(
    model: Any,
    blocks: Mapping[int, nn.Module],
    samples: Sequence[Sample],
    cases: Sequence[Case],
    spectrum: bool,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Sums:
    """The sums of all cases at all `blocks` (gate_proj, up_proj, down_proj, act_fn), from one pass over the samples.

    A tenth of the samples is held out. `spectrum` also sums E'E. `advance` is called with the number of tokens of each
    batch. Raises CapreseError for activations that are not finite.
    """
    device = next(model.parameters()).device
    depth = model.config.hidden_size
    sums: Sums = {}
    for layer in blocks:
        fit, held_out = (Moments.zeros(depth, device) for _ in range(2))
        sums[layer] = {
            case: CaseSums(_sharing(fit), _sharing(held_out), torch.zeros_like(fit.xe) if spectrum else None)
            for case in cases
        }
    model.eval()
    current: list[Batch] = []

    def measure(layer: int, x: Tensor, g: Tensor, z: Tensor, y: Tensor) -> None:
        _add(layer, blocks[layer], current[0], sums[layer], x, g, z, y)

    with _watched(blocks, measure):
        for batch in make_batches(samples, device):
            current[:] = [batch]
            model.get_decoder()(input_ids=batch.ids(), use_cache=False)
            advance(batch.num_tokens)
    return sums


def _sharing(other: Moments) -> Moments:
    """Moments that share the tensors of X'X, tr(Y'Y) and the number of rows with `other`."""
    return Moments(other.xx, other.xe.clone(), other.ee.clone(), other.yy, other.rows)


def _add(
    layer: int, block: Any, batch: Batch, sums: Mapping[Case, CaseSums], x: Tensor, g: Tensor, z: Tensor, y: Tensor
) -> None:
    """Add a batch's generated tokens to one layer's sums, from x, y [B, T, D] and g, z [B, T, F]."""
    rows = batch.rows()
    x, y, dropped = (each.flatten(0, 1)[rows] for each in (x, y, z))
    first = True
    for case, case_sums in sums.items():
        e = F.linear(torch.where(case.keep(batch, g, z), 0, dropped), block.down_proj.weight).float()
        if not bool(torch.isfinite(e).all() & torch.isfinite(x).all()):
            raise CapreseError(
                f"activations of layer {layer}",
                expected="finite values",
                found=f"NaN or Inf in a batch that begins with line {batch.samples[0].line}",
                fix="use float32, or remove the line",
            )
        part = case_sums.held_out if batch.held_out else case_sums.fit
        if first:
            part.add(x, e, y)  # the shared sums once
        else:
            part.xe += x.float().t() @ e
            part.ee += e.square().sum(dtype=torch.float64)
        first = False
        if batch.held_out and case_sums.gram is not None:
            case_sums.gram += e.t() @ e


@contextmanager
def _watched(blocks: Mapping[int, Any], measure: Callable[..., None]) -> Iterator[None]:
    """Calls measure(layer, x, g, z, y) after each forward of a block: its input, inner activations and output."""
    handles = []
    for layer, block in blocks.items():
        inner: dict[str, Tensor] = {}

        def see_g(_: Any, __: Any, g: Tensor, inner: dict[str, Tensor] = inner) -> None:
            inner["g"] = g

        def see_z(_: Any, args: Any, inner: dict[str, Tensor] = inner) -> None:
            inner["z"] = args[0]

        def see(_: Any, args: Any, y: Tensor, layer: int = layer, inner: dict[str, Tensor] = inner) -> None:
            measure(layer, args[0], inner.pop("g"), inner.pop("z"), y)

        handles += [block.act_fn.register_forward_hook(see_g), block.down_proj.register_forward_pre_hook(see_z)]
        handles.append(block.register_forward_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Fitted:
    """L [D, r], R [r, D] in float64, and ||E - X L R||^2 of the held-out samples."""

    left: Tensor
    right: Tensor
    error: float


def fit_ranks(fit: Moments, held_out: Moments, ranks: Sequence[int]) -> dict[int, Fitted]:
    """The closed form of eq. 7 for several ranks at once, each with the ridge of least held-out error, as in `solve`.

    R's rows are eigenvectors of the same matrix for every rank, so a rank's solution is the first columns of L and the
    first rows of R of the highest rank. Rank 0 is no correction. If X'X is not positive definite, L = R = 0.
    """
    depth, best = len(fit.xx), dict[int, Fitted]()
    nothing = fit.xx.new_zeros(depth, max(ranks)), fit.xx.new_zeros(max(ranks), depth)
    for ridge in RIDGES if max(ranks) else (0.0,):
        left, right = (max(ranks) and reduced_rank(fit, max(ranks), ridge)) or nothing
        for rank in ranks:
            error = held_out.error(left[:, :rank], right[:rank])
            if rank not in best or error < best[rank].error:
                best[rank] = Fitted(left[:, :rank], right[:rank], error)
    return best
