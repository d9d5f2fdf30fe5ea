"""Plain torch: the definition that every faster kernel is compared with (`backend.Backend` names the functions).

Shapes: x [T, D]; g, z [T, F]; T tokens, D hidden size, F neurons, r rank.
Statistics are float32 whatever the model's dtype, and *add up* over chunks of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import ACTIVATION_FUNCTIONS, CoreFF, PackedFF

NAME = "reference"
NUM_MAGNITUDES = 1 << 15  # a bfloat16's bits without the sign
EXACT_VALUES = 1 << 20  # float32 magnitudes kept as they are, up to 4 MiB a layer; see CatsStatistic
ROWS = 512  # tokens whose statistic is taken at once: bounds the float32 temporaries, which vLLM does not profile


def activations(x: Tensor, ff: PackedFF) -> tuple[Tensor, Tensor]:
    """g = act(x W_g) and z = g * (x W_1) (eq. 1), [T, F] each; without a gate z = g = act(x W_1)."""
    x = _whole(x)
    up = F.linear(x, ff.up_plus[: ff.num_neurons], ff.up_bias)
    if ff.gate is None:
        g = ff.act(up)
        return g, g
    g = ff.act(F.linear(x, ff.gate, ff.gate_bias))
    return g, g * up


def _whole(x: Tensor) -> Tensor:
    """x without gaps between its rows: oneDNN with AMX multiplies what follows a row of odd length by zero, and NaN
    there would spread."""
    return x.contiguous()


def _spared(x: Tensor, slots: Tensor) -> Tensor:
    """x with zeros for padding, which may hold anything (see `_whole`: also for what follows from it)."""
    return torch.where(slots[:, None] >= 0, x, 0)


def dense_ff(x: Tensor, ff: PackedFF, out: Tensor | None = None) -> Tensor:
    """The original block, FF(x) = z W_2 (eq. 1-2): [T, D] -> [T, D]. L and R take no part."""
    _, z = activations(x, ff)
    y = z @ ff.down_plus[: ff.num_neurons]
    return into(out, y if ff.down_bias is None else y + ff.down_bias)


def prompt_ff(x: Tensor, ff: PackedFF, observed: bool) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The original block of prompt tokens with what their statistic needs: y = FF(x) [T, D], and if `observed` z [T, F]
    and what goes into the activation, x W_g (x W_1 without a gate) with its bias [T, F].

    None from a backend that has nothing faster than the model's own layers, as from this one.
    """
    return None


def into(out: Tensor | None, y: Tensor) -> Tensor:
    """y, in `out` where that is given."""
    return y if out is None else out.copy_(y)


def sparse_ff(x: Tensor, ff: PackedFF, keep: Tensor) -> Tensor:
    """The block of generated tokens with the low-rank layer (eq. 9-10), neurons chosen by a mask.

    y = z+ [W_2; R] with z+ = [keep * act(x W_g) * (x W_1), x L]: the r low-rank neurons are always
    active and have gate 1. `keep` [T, F] bool. Dense arithmetic with masks: every weight is read.
    """
    _, z = activations(x, ff)
    return _down_plus(x, torch.where(keep, z, 0), ff)


def griffin_ff(
    x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor, row_plan: object = None, out: Tensor | None = None
) -> Tensor:
    """GRIFFIN for T generated tokens: token t keeps the neurons keep[slots[t]].

    `keep` [S, F] bool, one selection a slot; `slots` [T] int64. A slot of -1 is padding: y is zero there.
    `row_plan` is this layer's of `plan_layers`, or None; it changes no result.
    """
    y = sparse_ff(_spared(x, slots), ff, keep[slots])
    return into(out, torch.where(slots[:, None] >= 0, y, 0))


def plan_layers(keep: Tensor, slots: Tensor) -> None:
    """What `griffin_ff` may share among L layers of the same tokens: `keep` [L, S, F] bool, `slots` [T] int64.

    A backend that reads only the rows it needs lists those of all layers here, in one launch. None: nothing to share.
    """


def core_ff(x: Tensor, ff: CoreFF, slots: Tensor, out: Tensor | None = None) -> Tensor:
    """The part of y (eq. 9-10) that all generated tokens share: core neurons, L and R, bias. [T, D] -> [T, D].

    y = [act(x W_g) * (x W_1), x L] [W_2; R] over the core's neurons. `slots` [T] int64: -1 is padding, y is zero there.
    The tail is added to it: `griffin_ff` of the block without L and R, with selections that leave the core out.
    """
    x, bias = _spared(x, slots), None if ff.up_bias is None else F.pad(ff.up_bias, (0, ff.rank))
    z = F.linear(x, ff.up_plus, bias)
    neurons = z[:, : ff.num_neurons]
    if ff.gate is None:
        neurons.copy_(ff.act(neurons))
    else:
        neurons.mul_(ff.act(F.linear(x, ff.gate, ff.gate_bias)))
    y = z @ ff.down_plus
    return into(out, torch.where(slots[:, None] >= 0, y if ff.down_bias is None else y + ff.down_bias, 0))


def cats_ff(
    x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor, out: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CATS for T generated tokens: token t keeps the neurons with |g| >= tau[slots[t]] (eq. 5-6), compared in float32.

    Where the block has a scale, |g_j| scale_j is compared instead.
    `tau` [S] float32, one threshold a slot; `slots` [T] int64, -1 for padding, where y is zero and nothing is kept.
    Returns y [T, D] and the number of neurons kept: int64 [T]. A `kept` that is given is added to, and returned: [T],
    or [] for the sum over all tokens.
    """
    x = _spared(x, slots)
    g, z = activations(x, ff)
    valid = slots[:, None] >= 0
    keep = (magnitudes(g, ff.scale) >= tau[slots, None]) & valid
    y = into(out, torch.where(valid, _down_plus(x, torch.where(keep, z, 0), ff), 0))
    return y, add_kept(kept, keep.sum(dim=1))


def add_kept(kept: Tensor | None, counts: Tensor) -> Tensor:
    """`counts` int64 [T] added to `kept` [T] or [] (their sum); `counts` itself without one."""
    return counts if kept is None else kept.add_(counts if kept.dim() else counts.sum())


def _down_plus(x: Tensor, z: Tensor, ff: PackedFF) -> Tensor:
    if ff.rank:
        z = torch.cat([z, F.linear(_whole(x), ff.up_plus[ff.num_neurons :])], dim=1)
    y = z @ ff.down_plus
    return y if ff.down_bias is None else y + ff.down_bias


def down_norms(ff: PackedFF) -> Tensor:
    """||w2_j|| of every neuron's row of W_2: float32 [F]. The `scale` of the weighted score, and of scaled CATS."""
    rows = ff.down_plus[: ff.num_neurons]
    return torch.cat([part.float().norm(dim=1) for part in rows.split(ROWS)])


def griffin_norms(z: Tensor, scale: Tensor | None = None) -> Tensor:
    """||z_i|| of each token in z [T, F]: float32 [T]. For a block whose neurons are split among devices.

    With `scale` [F] float32, of z_ij scale_j instead (computed in float32).
    Over all its neurons it is torch.hypot of the parts' norms; not finite where z is not, or float32 cannot hold it.
    """
    parts = []
    for part in z.split(ROWS):
        part = part.float() if scale is None else part.float() * scale
        largest = part.abs().amax(dim=1, keepdim=True)
        squares = torch.where(largest > 0, part / largest, 0.0).square()
        parts.append(squares.sum(dim=1).sqrt() * largest[:, 0])
    return torch.cat(parts)


def griffin_statistic(z: Tensor, norms: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """s^2 of the tokens in z [T, F]: sum_i z_ij^2 / ||z_i||^2, float32 [F] (paper, section 2.2).

    With `scale` [F] float32 the score is weighted: z_ij scale_j takes z_ij's place. For scale_j = ||w2_j|| that is the
    size of what neuron j adds to the block's output.

    A token with ||z_i|| = 0 adds nothing. Add the results of a prompt's chunks. Where z holds a part of the block's
    neurons, `norms` [T] float32 are ||z_i|| over all of them; a token whose norm is not finite adds nothing.
    """
    z = z.float() if scale is None else z.float() * scale
    if norms is not None:
        norms = norms[:, None]
        return torch.where((norms > 0) & norms.isfinite(), z / norms, 0.0).square().sum(dim=0)
    # Scaling by the largest entry first keeps the squares of half-precision outliers finite.
    largest = z.abs().amax(dim=1, keepdim=True)
    z = torch.where(largest > 0, z / largest, 0.0)
    squares = z.square()
    norms = squares.sum(dim=1, keepdim=True)
    return torch.where(norms > 0, squares / norms, 0.0).sum(dim=0)


def griffin_observe(
    z: Tensor,
    offsets: Tensor,
    slots: Tensor,
    statistic: Tensor,
    norms: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """statistic[slots[i]] += s^2 of the rows offsets[i] to offsets[i + 1] of z, for each of n segments.

    z [P, F]; `offsets` [n + 1] int64, ascending; `slots` [n] int64, different, -1 to skip; `statistic` [S, F] float32.
    `norms` [P] float32 are ||z_i|| where z holds a part of the block's neurons (`griffin_norms`); None: of z itself.
    `scale` [F] float32 weights the score (`griffin_statistic`); `norms` are then of the scaled z.
    """
    for begin, end, slot in _segments(offsets, slots):
        for first in range(begin, end, ROWS):
            rows = slice(first, min(first + ROWS, end))
            statistic[slot] += griffin_statistic(z[rows], None if norms is None else norms[rows], scale)


def round_end(dense: int, interval: int) -> int:
    """The length at which a text whose first `dense` tokens ran the original block runs all others through it, too.

    These are the rho = `interval` generated tokens that ran the sparse block, and the newest one, which ran no block
    yet. Their statistic is added to that of the first `dense` (s^2 and counts add up), and a new selection is made from
    the sum: the one that a prompt of the whole text so far would make (paper, section 4.3.1).
    """
    return dense + interval + 1


def griffin_count(density: float, num_neurons: int) -> int:
    """k = floor(d F)."""
    return math.floor(density * num_neurons)


def griffin_select(statistic: Tensor, k: int) -> Tensor:
    """Mask, bool, of the k largest in each row of s^2 [F] or [n, F]; ties go to the lower index."""
    order = torch.sort(statistic, dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(statistic, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :k], True)


def core_count(core: float, k: int) -> int:
    """floor(kappa k): how many of a selection's k neurons every request shares."""
    return math.floor(core * k)


def griffin_core(prior: Tensor, count: int) -> Tensor:
    """Mask, bool [F], of the `count` neurons of largest prior p [F]; ties go to the lower index."""
    return griffin_select(prior, count)


def griffin_blend(statistic: Tensor, prior: Tensor | None, weight: float) -> Tensor:
    """b_j = (1 - lambda) s_j^2 / sum_l s_l^2 + lambda p_j / sum_l p_l: float32, the shape of `statistic` [F] or [n, F].

    `weight` is lambda, `prior` p [F] float32. Sums are over the neurons given, so that a device which holds a part of
    a block's neurons needs none of the others'. A row of zeros (no prompt token counted) leaves the prior alone.
    With lambda = 0 the statistic is returned as it is: the same order, to the bit.
    """
    if weight == 0.0 or prior is None:
        return statistic
    total = statistic.sum(dim=-1, keepdim=True)
    own = torch.where(total > 0, statistic / total, 0.0)
    return (1.0 - weight) * own + weight * (prior / prior.sum())


def griffin_select_tail(
    blended: Tensor, k: int, core: Tensor, find: Callable[[Tensor, int], Tensor] = griffin_select
) -> Tensor:
    """Mask, bool, of k neurons in each row of b [F] or [n, F]: the core, and the largest b_j among the rest.

    `core` [F] bool holds at most k neurons. Ties go to the lower index. `find` is a backend's griffin_select.
    """
    rest = (~core).nonzero()[:, 0]
    keep = core.expand(blended.shape).clone()
    keep[..., rest] = find(blended[..., rest], k - int(core.sum()))
    return keep


def magnitudes(g: Tensor, scale: Tensor | None = None) -> Tensor:
    """|g|, or |g_j| scale_j with `scale` [F] float32: what CATS's threshold is compared with, in float32."""
    return g.detach().abs().float() if scale is None else g.detach().abs().float() * scale


def magnitude_bins(magnitudes: Tensor) -> Tensor:
    """The histogram bin of each magnitude: its bits once rounded to bfloat16. int64, flat."""
    # Non-negative bfloat16 numbers order as their bit patterns do.
    return magnitudes.detach().abs().to(torch.bfloat16).view(torch.int16).long().flatten()


def cats_observe(
    gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor, scale: Tensor | None = None
) -> None:
    """Count |g|, g = activation(gate), of the rows offsets[i] to offsets[i + 1] into histogram[slots[i]].

    With `scale` [F] float32, |g_j| scale_j.
    gate [P, F] is what goes into the activation: x W_g, or x W_1 without a gate; its rows may be strided.
    `offsets` [n + 1] int64, ascending; `slots` [n] int64, different, -1 to skip; `histogram` [S, NUM_MAGNITUDES] int64.
    """
    act = ACTIVATION_FUNCTIONS[activation]
    for begin, end, slot in _segments(offsets, slots):
        for part in gate[begin:end].split(ROWS):
            histogram[slot] += torch.bincount(magnitude_bins(magnitudes(act(part), scale)), minlength=NUM_MAGNITUDES)


def _segments(offsets: Tensor, slots: Tensor) -> Iterator[tuple[int, int, int]]:
    for (begin, end), slot in zip(pairwise(offsets.tolist()), slots.tolist(), strict=True):
        if slot >= 0:
            yield begin, end, slot


def cats_threshold(histogram: Tensor, density: float) -> Tensor:
    """tau of each row of `histogram` [n, NUM_MAGNITUDES] int64: float32 [n].

    The (1-d) quantile of all values counted, linear between neighbours. At density 1 nothing is
    dropped: tau = 0, below which no magnitude lies. A row that counted nothing gives tau = 0 too.
    """
    ends = histogram.cumsum(dim=1)
    total = ends[:, -1:]
    # float64 holds every rank: there are fewer than 2^53 values.
    rank = ((1.0 - density) * (total - 1).double()).clamp(min=0)
    # The value of rank i is the first magnitude whose cumulative count exceeds i.
    ranks = torch.cat([rank.floor(), rank.ceil()], dim=1).long()
    bins = torch.searchsorted(ends, ranks, right=True).clamp(max=NUM_MAGNITUDES - 1)
    below, above = bins.to(torch.int16).view(torch.bfloat16).float().unbind(dim=1)
    tau = torch.lerp(below, above, (rank - rank.floor()).float()[:, 0])
    return torch.where((total[:, 0] > 0) & (density < 1.0), tau, 0.0)


@dataclass
class CatsStatistic:
    """The magnitudes |g| of one prompt's tokens at one layer; adds up over chunks.

    A histogram over the 32,768 magnitudes of bfloat16, exact for a bfloat16 model. A float32 model
    has finer magnitudes, so a short prompt (`num_values` = prompt tokens x F up to EXACT_VALUES)
    keeps the values themselves. Which of the two depends on the prompt's length alone, never on
    how it was cut into chunks.
    """

    num_values: int
    dtype: torch.dtype
    scale: Tensor | None = None  # [F] float32: |g_j| scale_j in place of |g_j|
    histogram: Tensor | None = None  # [NUM_MAGNITUDES] int64
    values: list[Tensor] = field(default_factory=list)  # float32

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32 and self.num_values <= EXACT_VALUES

    def add(self, g: Tensor) -> None:
        """Add the tokens of g [T, F]."""
        if self.exact:
            self.values.append(magnitudes(g, self.scale).flatten())
            return
        counts = torch.bincount(magnitude_bins(magnitudes(g, self.scale)), minlength=NUM_MAGNITUDES)
        self.histogram = counts if self.histogram is None else self.histogram + counts

    def threshold(self, density: float) -> Tensor:
        """tau, the (1-d) quantile of all magnitudes added, as `cats_threshold`: float32 scalar."""
        if self.histogram is not None:
            return cats_threshold(self.histogram[None], density)[0]
        ordered = torch.cat(self.values).sort().values
        if density >= 1.0:
            return torch.zeros((), device=ordered.device)
        rank = (1.0 - density) * (len(ordered) - 1)
        low = math.floor(rank)
        return torch.lerp(ordered[low], ordered[math.ceil(rank)], rank - low)
