"""A case's inputs, the values wanted in float64, and how far from them a correct kernel may be. One of two rules:

*Integers.* Weights and tokens are -1, 0 and 1 with few non-zeros, and the activation is relu: every value up to y is an
integer of at most 256, which all dtypes hold and every order of additions gives. Any difference is an error: a neuron
too many, one missing in a tail, `>` for `>=` at a threshold that is itself a magnitude.

*Random numbers.* Each float64 value carries a bound of its error, the plain sum of what every step may add, and its
scale, the root of the sum of the squares (`Arithmetic`). Roundings are independent and as often up as down, and what
multiplies them on the way to y has a random sign: so they stay below DEVIATIONS scales (Hoeffding: exceeded with a
probability of 2 exp(-18) = 3e-8 a value). The lesser of the two counts. The steps are:
- a product with n terms is accumulated in float32, in any order: n roundings of 2^-24 of a partial sum. That is at most
  the sum of the terms' magnitudes; and, their signs being random, at most DEVIATIONS times the root of their squares;
- what goes into the activation, g, z, x L and y are rounded to the model's dtype, at most eps/2 of their size or half
  the least subnormal number. A bias may come before or after that rounding: it is counted twice. A kernel that keeps
  float32 in between stays within the same bounds;
- silu's and gelu's slopes stay below 1.13, so an error of the argument u grows by no more; an exp of 4 ulp, and gelu's
  1 + erf, which cancels for negative u, add ACTIVATION_ERROR of |u|. relu is exact.

CATS compares the rounded |g|: a neuron whose bounds hold tau may fall on either side. Thresholds are set midway in the
widest gap near the wanted quantile, which leaves few such neurons; those widen the bounds of y by all they could add,
and those of the count by one each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from caprese_kernels.packed import ACTIVATION_FUNCTIONS, PackedFF
from tests.kernels.cases import Case

FLOAT32 = 2.0**-24  # half a unit in the last place, relative
DEVIATIONS = 6.0
SLOPE = 1.13
ACTIVATION_ERROR = 8 * FLOAT32  # 4 ulp


@dataclass(frozen=True)
class Approx:
    """float64 values, and how far from them a correct kernel's may be: `bound` at most, and DEVIATIONS `scale`."""

    value: Tensor
    bound: Tensor
    scale: Tensor

    @property
    def error(self) -> Tensor:
        return torch.minimum(self.bound, DEVIATIONS * self.scale)

    def where(self, mask: Tensor) -> Approx:
        return Approx(*(torch.where(mask, t, 0) for t in (self.value, self.bound, self.scale)))

    def beside(self, other: Approx) -> Approx:
        """Both, along the columns."""
        pairs = ((self.value, other.value), (self.bound, other.bound), (self.scale, other.scale))
        return Approx(*(torch.cat(pair, dim=1) for pair in pairs))


class Arithmetic:
    """The bounds of the module's docstring; all of them zero for integers."""

    def __init__(self, dtype: torch.dtype, exact: bool):
        info = torch.finfo(dtype)
        self.float32 = 0.0 if exact else FLOAT32
        self.unit = 0.0 if exact else info.eps / 2
        self.least = 0.0 if exact else info.tiny * info.eps / 2

    def rounded(self, a: Approx) -> Approx:
        step = self.unit * (a.value.abs() + a.error) + self.least
        step = torch.where((a.value == 0) & (a.bound == 0), 0, step)
        return Approx(a.value, a.bound + step, torch.hypot(a.scale, step))

    def linear(self, x: Approx, weight: Tensor, bias: Tensor | None) -> Approx:
        """x [T, n] times weight [n, m], rounded to the model's dtype."""
        offset = torch.zeros(()) if bias is None else bias
        terms, squares = weight.shape[0] + 2, weight.square()
        sizes = x.value.abs() @ weight.abs() + offset.abs()
        partial = torch.minimum(sizes, DEVIATIONS * (x.value.square() @ squares).sqrt() + offset.abs())
        y = Approx(
            x.value @ weight,
            x.bound @ weight.abs() + terms * self.float32 * sizes,
            (x.scale.square() @ squares + terms * (self.float32 * partial).square()).sqrt(),
        )
        if bias is None:
            return self.rounded(y)
        y = self.rounded(y)
        return self.rounded(Approx(y.value + bias, y.bound, y.scale))

    def activation(self, name: str, u: Approx) -> Approx:
        value = ACTIVATION_FUNCTIONS[name](u.value)
        if name == "relu":
            return self.rounded(Approx(value, u.bound, u.scale).where(u.value > -u.error))
        step = ACTIVATION_ERROR * u.value.abs()
        return self.rounded(Approx(value, SLOPE * u.bound + step, torch.hypot(SLOPE * u.scale, step)))

    def times(self, a: Approx, b: Approx) -> Approx:
        both = a.error * b.error
        return self.rounded(
            Approx(
                a.value * b.value,
                a.value.abs() * b.bound + b.value.abs() * a.bound + both,
                torch.hypot(a.value * b.scale, b.value * a.scale) + both,
            )
        )


class Problem:
    """A case's inputs on a device, and the values wanted on the CPU in float64."""

    def __init__(self, case: Case, device: torch.device):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        self.arithmetic = Arithmetic(case.dtype, case.integers)
        weights = self._weights()
        self.ff = PackedFF(*(w.to(device) if isinstance(w, Tensor) else w for w in weights))
        ff = PackedFF(*(w.double() if isinstance(w, Tensor) else w for w in weights))
        x = self.draw_tokens()
        self.x = laid_out(x.to(device), case.layout)
        self._project(x, ff)
        slots = self._slots()
        self.valid = (slots >= 0)[:, None]
        keep, tau = self._keep(slots), self._tau(slots)
        self.slots, self.keep, self.tau = slots.to(device), keep.to(device), tau.to(device)
        self.keep_rows = keep[slots] & self.valid  # [T, F]
        size, error, thresholds = self.g.value.abs(), self.g.error, tau[slots].double()[:, None]
        self.surely = ((size - error >= thresholds) | (thresholds == 0)) & self.valid
        self.perhaps = (size + error >= thresholds) & self.valid & ~self.surely

    def draw(self, *shape: int, share: float = 2 / 3) -> Tensor:
        """Values of the model's dtype: normal, of length about 1 a row; or -1 and 1 with that share of the values."""
        if not self.case.integers:
            return (torch.randn(shape, generator=self.generator) * shape[-1] ** -0.5).to(self.case.dtype)
        signs = torch.randint(0, 2, shape, generator=self.generator) * 2 - 1
        return (signs * (torch.rand(shape, generator=self.generator) < share)).to(self.case.dtype)

    def draw_tokens(self) -> Tensor:
        depth, tokens = self.case.depth, self.case.tokens
        if not self.case.integers:
            return self.draw(tokens, depth) * depth**0.5
        # At most 4 non-zeros: what goes into the activation stays within 5, z within 25.
        rank = torch.rand(tokens, depth, generator=self.generator).argsort(dim=1)
        return torch.where(rank < 4, self.draw(tokens, depth, share=1.0), 0)

    def _weights(self) -> tuple[Tensor, Tensor, str, int, Tensor | None, Tensor | None]:
        case = self.case
        inputs = case.neurons * (2 if case.gated else 1)
        gate_up_plus = self.draw(inputs + case.rank, case.depth)
        # A quarter of non-zeros keeps integers y within 256.
        down_plus = self.draw(case.neurons + case.rank, case.depth, share=0.25)
        biases = (self.draw(inputs), self.draw(case.depth)) if case.biased else (None, None)
        return gate_up_plus, down_plus, case.activation_name, case.rank, *biases

    def _project(self, x: Tensor, ff: PackedFF) -> None:
        arithmetic, none = self.arithmetic, torch.zeros(x.shape, dtype=torch.float64)
        exact = Approx(x.double(), none, none)
        up = arithmetic.linear(exact, ff.up_plus[: ff.num_neurons].t(), ff.up_bias)
        gate = up if ff.gate is None else arithmetic.linear(exact, ff.gate.t(), ff.gate_bias)
        self.g = arithmetic.activation(ff.activation, gate)
        self.z = self.g if ff.gate is None else arithmetic.times(self.g, up)
        self.low_rank = arithmetic.linear(exact, ff.up_plus[ff.num_neurons :].t(), None)
        self.down_plus, self.down_bias = ff.down_plus, ff.down_bias

    def _slots(self) -> Tensor:
        tokens, table = self.case.tokens, self.case.table
        slots = torch.randperm(tokens + 3, generator=self.generator)[:tokens]
        if table == "shared":
            slots = slots[:1].expand(tokens).clone()
        if table == "pairs":
            slots = slots[torch.arange(tokens) // 2]
        where = {"none": slice(0), "first": slice(1), "middle": tokens // 2, "last": slice(-1, None)}
        if tokens:
            slots[where.get(self.case.padding, slice(None))] = -1
        return slots

    def _keep(self, slots: Tensor) -> Tensor:
        """keep [S, F]: random sets of k neurons."""
        case = self.case
        order = torch.rand(case.tokens + 3, case.neurons, generator=self.generator).argsort(dim=1)
        if case.table == "equal":
            order = order[:1].expand_as(order)
        count = torch.full((case.tokens + 3, 1), case.selected)
        if case.table == "mixed":
            count[slots[1::3]], count[slots[2::3]] = case.neurons, 0
        return order < count

    def _tau(self, slots: Tensor) -> Tensor:
        """tau [S]: about the (1-d) quantile of |g| of the slot's tokens; NaN where no token looks."""
        tau = torch.full((self.case.tokens + 3,), math.nan)
        sizes = self.g.value.abs()
        for slot in set(slots.tolist()) - {-1}:
            equal = self.case.table == "equal"
            tau[slot] = self._gap(sizes.flatten() if equal else sizes[slots == slot].flatten())
        if self.case.table == "mixed":
            tau[slots[1::3]], tau[slots[2::3]] = 0.0, math.inf
        return tau

    def _gap(self, sizes: Tensor) -> float:
        """Midway in the widest gap near the quantile; for integers the quantile itself, a magnitude that occurs."""
        if self.case.density in (0.0, 1.0):
            return math.inf if self.case.density == 0.0 else 0.0
        sizes = sizes.sort().values
        rank = math.floor((1 - self.case.density) * (len(sizes) - 1))
        if self.case.integers:
            return float(sizes[rank])
        reach = 1 + len(sizes) // 50
        near = sizes[max(rank - reach, 0) : rank + reach + 1]
        if len(near) == 1:
            return float(near[0]) / 2
        widest = int(near.diff().argmax())
        return float((near[widest] + near[widest + 1]) / 2)

    def output(self, keep: Tensor, perhaps: Tensor | None = None, low_rank: bool = True) -> Approx:
        """y for neurons kept, and others that perhaps are."""
        neurons = self.case.neurons
        z, down = self.z.where(keep), self.down_plus[:neurons]
        if low_rank:
            z, down = z.beside(self.low_rank), self.down_plus
        y = self.arithmetic.linear(z, down, self.down_bias)
        if self.case.integers:
            assert not y.value.numel() or y.value.abs().max() <= 256, "the case leaves the integers of bfloat16"
        if perhaps is None:
            return y
        most = torch.where(perhaps, self.z.value.abs() + self.z.error, 0) @ self.down_plus[:neurons].abs()
        most *= 1 + 2 * self.arithmetic.unit
        return Approx(y.value, y.bound + most, y.scale + most / DEVIATIONS)

    def dense(self) -> Approx:
        return self.output(torch.ones_like(self.keep_rows), low_rank=False)

    def griffin(self) -> Approx:
        return self.output(self.keep_rows).where(self.valid)

    def cats(self) -> Approx:
        return self.output(self.surely, self.perhaps).where(self.valid)


@lru_cache(maxsize=2)
def problem(case: Case, device: torch.device) -> Problem:
    return Problem(case, device)


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same rows with other strides; NaN lies in between."""
    count, width = rows.shape
    if layout == "columns":
        wide = rows.new_full((count, width + 8), math.nan)
        view = wide[:, 3 : 3 + width]
    elif layout == "other":
        view = rows.new_full((2 * count, width), math.nan)[::2]
    else:
        return rows
    view.copy_(rows)
    return view


def assert_like(found: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert (tuple(found.shape), found.dtype, found.device.type) == (shape, dtype, device.type)


def assert_within(found: Tensor, wanted: Tensor, error: Tensor, what: str) -> None:
    wrong = ~((found.double().cpu() - wanted).abs() <= error)  # also where it is NaN
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values beyond their bounds; at {at} found "
            f"{float(found[at]):.8g}, expected {float(wanted[at]):.8g} within {float(error[at]):.1e}"
        )


def assert_output(y: Tensor, wanted: Approx, p: Problem, what: str) -> None:
    assert_like(y, (p.case.tokens, p.case.depth), p.case.dtype, p.x.device)
    assert_within(y, wanted.value, wanted.error, what)


def assert_same_bits(found: Tensor, wanted: Tensor, what: str) -> None:
    """The two zeros are taken for the same."""
    assert found.shape == wanted.shape, what
    assert found.dtype == wanted.dtype, what
    different = int((found != wanted).sum())  # no result may be NaN, which differs from itself
    assert not different, f"{what}: {different} of {found.numel()} values differ"
