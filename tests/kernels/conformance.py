"""What every backend of caprese_kernels must do, whatever its device: checks that know only the contract.

Each `check_*` takes a backend, a device and a `Case`, builds the case's inputs from its seed, and asserts. The values
wanted are computed in float64. How far a correct kernel may be from them follows one of two rules:

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
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product

import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from caprese_kernels.packed import ACTIVATION_FUNCTIONS, PackedFF

FLOAT32 = 2.0**-24  # half a unit in the last place, relative
DEVIATIONS = 6.0
SLOPE = 1.13
ACTIVATION_ERROR = 8 * FLOAT32  # 4 ulp
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTEGERS = "integers"  # an activation to `Case`: relu on small integers


@dataclass(frozen=True)
class Case:
    """One block and one batch for it.

    table: each token its `own` slot; all one, `shared`; `pairs` of tokens share one; own slots with `equal` selections;
           own slots, `mixed`: selections of k, all and none of the neurons
    padding: where slots are -1: `none`, `first`, `middle`, `last`, `all`
    layout: of the rows of x, z and gate: `plain`, some `columns` of a wider tensor, every `other` row of a longer one
    """

    depth: int
    neurons: int
    rank: int
    tokens: int
    density: float
    dtype: torch.dtype
    activation: str  # of ACTIVATION_FUNCTIONS, or INTEGERS
    gated: bool = True
    biased: bool = False
    table: str = "own"
    padding: str = "none"
    layout: str = "plain"
    seed: int = 0

    @property
    def id(self) -> str:
        flags = [name for name, on in (("gated", self.gated), ("biased", self.biased)) if on]
        return "-".join(
            [
                f"{self.seed}-D{self.depth}-F{self.neurons}-r{self.rank}-T{self.tokens}-d{self.density}",
                *(DTYPE_NAMES[self.dtype], self.activation, *flags, self.table, self.padding, self.layout),
            ]
        )

    @property
    def integers(self) -> bool:
        return self.activation == INTEGERS

    @property
    def activation_name(self) -> str:
        return "relu" if self.integers else self.activation

    @property
    def selected(self) -> int:
        return reference.griffin_count(self.density, self.neurons)


def covering(choices: dict[str, tuple], seed: int) -> list[Case]:
    """Cases in which any two fields meet in every pair of their values; always the same ones for the same seed."""
    rng = random.Random(seed)
    sizes = [len(values) for values in choices.values()]
    pairs = [
        ((i, a), (j, b))
        for i, j in combinations(range(len(sizes)), 2)
        for a, b in product(range(sizes[i]), range(sizes[j]))
    ]
    rng.shuffle(pairs)
    missing = dict.fromkeys(pairs)
    cases: list[Case] = []
    while missing:
        wanted = dict(next(iter(missing)))
        drawn = [[wanted.get(i, rng.randrange(size)) for i, size in enumerate(sizes)] for _ in range(30)]
        covers = [[pair for pair in combinations(enumerate(picks), 2) if pair in missing] for picks in drawn]
        best = max(range(len(drawn)), key=lambda i: len(covers[i]))
        for pair in covers[best]:
            del missing[pair]
        fields = {name: values[i] for (name, values), i in zip(choices.items(), drawn[best], strict=True)}
        cases.append(Case(**fields, seed=1000 * seed + len(cases)))
    return cases


CHOICES: dict[str, tuple] = {
    "depth": (1, 7, 64, 100, 129, 192, 257),
    "neurons": (1, 7, 64, 100, 129, 257, 560),
    "rank": (0, 1, 16, 256),
    "tokens": (0, 1, 2, 3, 5, 8, 16, 17, 33, 64),
    "density": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    "dtype": tuple(DTYPE_NAMES),
    "activation": (*ACTIVATION_FUNCTIONS, INTEGERS),
    "gated": (True, False),
    "biased": (True, False),
    "table": ("own", "shared", "pairs", "equal", "mixed"),
    "padding": ("none", "first", "middle", "last", "all"),
    "layout": ("plain", "columns", "other"),
}
FEW_CHOICES = CHOICES | {
    "depth": (1, 7, 16, 33),
    "neurons": (1, 7, 32, 45),
    "rank": (0, 1, 16),
    "tokens": (0, 1, 2, 3, 5, 17),
    "density": (0.0, 0.25, 0.5, 1.0),
    "table": ("own", "pairs", "equal", "mixed"),
    "padding": ("none", "first", "middle", "all"),
}
SMALL = covering(FEW_CHOICES, seed=1)
FULL = [
    *covering(CHOICES, seed=2),
    *covering(CHOICES, seed=3),
    *covering(CHOICES, seed=4),
    # A real hidden size; and prompts longer than the chunks in which statistics are taken.
    *(
        Case(1536, 560, 16, t, 0.5, dtype, name, seed=5000 + t)
        for t, dtype, name in [
            (1, torch.bfloat16, "silu"),
            (2, torch.bfloat16, INTEGERS),
            (4, torch.float16, "gelu_pytorch_tanh"),
            (6, torch.float32, "silu"),
        ]
    ),
    *(
        Case(7, 33, 1, 1100, 0.5, dtype, name, layout="columns", table="pairs", seed=6000 + i)
        for i, (dtype, name) in enumerate(product(DTYPE_NAMES, ("silu", INTEGERS)))
    ),
]


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


# -- the feed-forward block ------------------------------------------------------------------------------------------


def check_dense(backend: Backend, device: torch.device, case: Case) -> None:
    """All neurons, no low-rank layer."""
    p = problem(case, device)
    assert_output(backend.dense_ff(p.x, p.ff), p.dense(), p, "dense y")


def check_griffin(backend: Backend, device: torch.device, case: Case) -> None:
    p = problem(case, device)
    assert_output(backend.griffin_ff(p.x, p.ff, p.keep, p.slots), p.griffin(), p, "griffin y")


def check_cats(backend: Backend, device: torch.device, case: Case) -> None:
    """y, and how many neurons each token kept."""
    p = problem(case, device)
    y, kept = backend.cats_ff(p.x, p.ff, p.tau, p.slots)
    assert_output(y, p.cats(), p, "cats y")
    assert_like(kept, (case.tokens,), torch.int64, device)
    least, most = p.surely.sum(dim=1), (p.surely | p.perhaps).sum(dim=1)
    counts = kept.cpu()
    assert bool(((counts >= least) & (counts <= most)).all()), (
        f"kept {counts.tolist()}, expected {least.tolist()} to {most.tolist()}"
    )


def check_padding(backend: Backend, device: torch.device, case: Case) -> None:
    """A row with slot -1 gives zeros, whatever is in x, and changes no other row."""
    p = problem(case, device)
    padding = p.slots < 0
    spoilt, clean = (laid_out(torch.where(padding[:, None], value, p.x), case.layout) for value in (math.nan, 0.0))
    y = backend.griffin_ff(spoilt, p.ff, p.keep, p.slots)
    assert_same_bits(y, backend.griffin_ff(clean, p.ff, p.keep, p.slots), "griffin y beside padding")
    assert not y[padding].any(), "griffin y of padding"
    y, kept = backend.cats_ff(spoilt, p.ff, p.tau, p.slots)
    clean_y, clean_kept = backend.cats_ff(clean, p.ff, p.tau, p.slots)
    assert_same_bits(y, clean_y, "cats y beside padding")
    assert_same_bits(kept, clean_kept, "cats counts beside padding")
    assert not y[padding].any(), "cats y of padding"
    assert not kept[padding].any(), "neurons kept by padding"


def check_dropped_weights_do_not_matter(backend: Backend, device: torch.device, case: Case) -> None:
    """For backends that never read what no token keeps: NaN or infinity there gives the same bits as zero.

    CATS reads the whole gate to decide, so it drops rows of W_1 (of a gated block) and W_2 only.
    """
    p = problem(case, device)

    def output(method: str, dropped: Tensor, value: float) -> Tensor:
        weights = (p.ff.gate_up_plus.clone(), p.ff.down_plus.clone())
        ff = PackedFF(*weights, p.ff.activation, p.ff.rank, p.ff.gate_up_bias, p.ff.down_bias)
        ff.down_plus[: case.neurons][dropped] = value
        if method == "griffin" or case.gated:
            ff.up_plus[: case.neurons][dropped] = value
        if method == "cats":
            return backend.cats_ff(p.x, ff, p.tau, p.slots)[0]
        if ff.gate is not None:
            ff.gate[dropped] = value
        return backend.griffin_ff(p.x, ff, p.keep, p.slots)

    for method, kept in (("griffin", p.keep_rows), ("cats", p.surely | p.perhaps)):
        dropped = ~kept.any(dim=0).to(device)
        wanted = output(method, dropped, 0.0)
        for value in (math.nan, math.inf):
            assert_same_bits(output(method, dropped, value), wanted, f"{method} y, with {value} in dropped weights")


def check_request_stands_alone(backend: Backend, device: torch.device, case: Case, same_bits: bool) -> None:
    """A token alone, or its batch in reverse, gives what the batch does: to the bit, or within twice the bounds."""
    p = problem(case, device)
    count = case.tokens
    calls: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Approx]] = {
        "dense": (lambda x, slots: backend.dense_ff(x, p.ff), p.dense()),
        "griffin": (lambda x, slots: backend.griffin_ff(x, p.ff, p.keep, slots), p.griffin()),
        "cats": (lambda x, slots: backend.cats_ff(x, p.ff, p.tau, slots)[0], p.cats()),
    }
    orders = [[t] for t in sorted({0, count // 3, count // 2, count - 1} & set(range(count)))]
    orders.append(list(reversed(range(count))))
    for name, (call, wanted) in calls.items():
        whole = call(p.x, p.slots)
        for order in orders:
            found = call(p.x[order], p.slots[order])
            what = f"{name} y of tokens {order} and in a batch of {count}"
            if same_bits:
                assert_same_bits(found, whole[order], what)
            else:
                assert_within(found, whole[order].double().cpu(), 2 * wanted.error[order], what)


def check_same_bits_twice(backend: Backend, device: torch.device, case: Case) -> None:
    """Same inputs, same bits; and the inputs are left as they were."""
    p = problem(case, device)
    inputs = [p.x, p.keep, p.slots, p.ff.gate_up_plus, p.ff.down_plus]
    before = [t.clone() for t in inputs]
    s = Segments(case, device)
    z, gate = s.rows(griffin_rows(s)), s.rows(cats_rows(s))

    def run() -> list[Tensor]:
        statistic = torch.zeros(s.table, case.neurons, device=device)
        histogram = torch.zeros(s.table, reference.NUM_MAGNITUDES, dtype=torch.int64, device=device)
        backend.griffin_observe(z, s.offsets, s.slots, statistic)
        backend.cats_observe(gate, case.activation_name, s.offsets, s.slots, histogram)
        chosen = backend.griffin_select(statistic, case.selected)
        tau = backend.cats_threshold(histogram, 0.5)
        y = backend.griffin_ff(p.x, p.ff, p.keep, p.slots)
        return [
            *(backend.dense_ff(p.x, p.ff), y, *backend.cats_ff(p.x, p.ff, p.tau, p.slots)),
            *(statistic, histogram, chosen, tau),
        ]

    names = ("dense y", "griffin y", "cats y", "cats counts", "statistic", "histogram", "selection", "threshold")
    for name, first, second in zip(names, run(), run(), strict=True):
        assert_same_bits(second, first, f"{name}, the second time")
    for tensor, copy in zip(inputs, before, strict=True):
        assert_same_bits(tensor, copy, "an input, after")


# -- statistics ------------------------------------------------------------------------------------------------------


class Segments:
    """Prompts of one call: rows before, between and after them that no slot wants, and slots that no prompt has."""

    table = 8
    slots_list = (3, 0, -1, 5, 1, 6)
    skipped, zero, extreme = 2, 3, 4  # segments that do not count, of a row of zeros, of extreme values

    def __init__(self, case: Case, device: torch.device):
        t = case.tokens
        self.case, self.device = case, device
        lengths = (t, 0, t // 2, 1, 3, max(t - 1, 0))
        self.borders = [2]
        for length in lengths:
            self.borders.append(self.borders[-1] + length)
        self.count = self.borders[-1] + 1
        self.offsets = torch.tensor(self.borders, device=device)
        self.slots = torch.tensor(self.slots_list, device=device)
        self.generator = torch.Generator().manual_seed(case.seed)

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """begin, end and slot of every segment that counts."""
        return [(a, b, s) for (a, b), s in zip(pairwise(self.borders), self.slots_list, strict=True) if s >= 0]

    def rows(self, values: Tensor) -> Tensor:
        """`values` [P, F] on the device in the case's layout, with NaN in some of the rows that do not count."""
        values = values.clone()
        skipped = self.borders[self.skipped]
        values[0] = values[skipped + 1 : self.borders[self.skipped + 1]] = math.nan
        return laid_out(values.to(self.device), self.case.layout)

    def untouched(self) -> list[int]:
        empty = [slot for begin, end, slot in self.parts if begin == end]
        return [*(s for s in range(self.table) if s not in self.slots_list), *empty]


def griffin_rows(s: Segments) -> Tensor:
    """z [P, F]; a row of zeros, and rows whose squares overflow and vanish in float32."""
    case = s.case
    info = torch.finfo(case.dtype)
    z = torch.randn(s.count, case.neurons, generator=s.generator).to(case.dtype)
    z[s.borders[s.zero]] = 0
    large, small, one = range(s.borders[s.extreme], s.borders[s.extreme] + 3)
    z[large] = torch.where(z[large] > 0, info.max, -info.max)
    z[small] = info.tiny * torch.randint(1, 5, (case.neurons,), generator=s.generator)
    z[one, -1] = info.max
    return z


def check_tokens_that_are_not_finite(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """A token with an infinite or undefined z adds nothing, as its share of its own norm is undefined."""
    z = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[1, 3], z[4, 99], z[5] = math.inf, math.nan, -math.inf
    offsets, slots = torch.tensor([0, 7], device=device), torch.tensor([0], device=device)
    found, wanted = torch.zeros(1, 100, device=device), torch.zeros(1, 100)
    backend.griffin_observe(z.to(device), offsets, slots, found)
    reference.griffin_observe(z[[0, 2, 3, 6]], torch.tensor([0, 4]), torch.tensor([0]), wanted)
    # Four terms each, with a norm of 100 terms.
    torch.testing.assert_close(found.cpu(), wanted, rtol=120 * FLOAT32, atol=0)


def check_griffin_observe(backend: Backend, device: torch.device, case: Case) -> None:
    """Shares of every segment are added to its slot, and to nothing else; cut into chunks they sum to the same.

    Bounds: a share has a handful of roundings in float32 and a norm of F terms, a slot's sum a term a row; and shares
    beside an outlier may vanish below float32's least number.
    """
    s = Segments(case, device)
    values = griffin_rows(s)
    z = s.rows(values)
    start = 3 * torch.rand(s.table, case.neurons, generator=s.generator)
    squares = values.double().square()
    norms = squares.sum(dim=1, keepdim=True)
    shares = torch.where(norms > 0, squares / norms, 0.0)
    wanted = start.double()
    for begin, end, slot in s.parts:
        wanted[slot] += shares[begin:end].sum(dim=0)
    steps = sum(min(n, DEVIATIONS * math.sqrt(n)) for n in (case.neurons, max(case.tokens, 3))) + 12
    error = steps * FLOAT32 * wanted + s.count * torch.finfo(torch.float32).tiny

    table = start.to(device, copy=True)
    backend.griffin_observe(z, s.offsets, s.slots, table)
    assert_within(table, wanted, error, "statistic")
    zero_slot = s.slots_list[s.zero]
    untouched = [*s.untouched(), zero_slot]
    assert_same_bits(table[untouched].cpu(), start[untouched], "statistic of slots with nothing to add")

    chunked = start.to(device, copy=True)
    backend.griffin_observe(z, s.offsets[:1], s.slots[:0], chunked)  # no segment at all
    assert_same_bits(chunked.cpu(), start, "statistic after a call with no segment")
    for offsets, slot in chunks(s):
        backend.griffin_observe(z, offsets, slot, chunked)
    assert_within(chunked, wanted, error, "statistic of chunks")


def chunks(s: Segments) -> list[tuple[Tensor, Tensor]]:
    """Offsets and slots of calls that see every segment in up to three chunks."""
    calls = []
    for begin, end, slot in s.parts:
        borders = sorted({begin, begin + (end - begin) // 3, begin + (end - begin) // 2, end})
        calls += [
            (torch.tensor(border, device=s.device), torch.tensor([slot], device=s.device))
            for border in pairwise(borders)
        ]
    return calls


def cats_rows(s: Segments) -> Tensor:
    """What goes into the activation, [P, F]; zeros, and values whose exp overflows or vanishes."""
    case = s.case
    gate = 2 * torch.randn(s.count, case.neurons, generator=s.generator)
    gate = (gate.round() if case.integers else gate).to(case.dtype)
    gate[s.borders[s.zero]] = 0
    large, small, one = range(s.borders[s.extreme], s.borders[s.extreme] + 3)
    gate[large], gate[small], gate[one] = 1000, -1000, 16 * gate[one]
    if case.activation_name == "relu":
        gate[large] = torch.finfo(case.dtype).max
    return gate


def magnitude_interval(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The lowest and the highest bin that each |g| may fall into.

    g's error before it is rounded moves it by little; rounding, to the model's dtype first or at once to bfloat16,
    keeps the order. relu is exact.
    """
    g = ACTIVATION_FUNCTIONS[activation](gate.double())
    error = 0.0 if activation == "relu" else ACTIVATION_ERROR * gate.double().abs()
    bins = [
        reference.magnitude_bins(ends.to(dtype))
        for ends in ((g.abs() - error).clamp(min=0), g.abs() + error)
        for dtype in (torch.float32, gate.dtype)
    ]
    return torch.minimum(bins[0], bins[1]), torch.maximum(bins[2], bins[3])


def check_cats_observe(backend: Backend, device: torch.device, case: Case) -> None:
    """Magnitudes are counted into each segment's slot, and nowhere else; also when cut into chunks.

    With relu every count is exact. Otherwise the cumulative counts lie between those of all magnitudes at the upper and
    at the lower end of their bounds (`magnitude_interval`).
    """
    s = Segments(case, device)
    values = cats_rows(s)
    gate = s.rows(values)
    start = torch.randint(0, 9, (s.table, reference.NUM_MAGNITUDES), generator=s.generator)
    whole, chunked = start.to(device, copy=True), start.to(device, copy=True)
    backend.cats_observe(gate, case.activation_name, s.offsets, s.slots, whole)
    backend.cats_observe(gate, case.activation_name, s.offsets[:1], s.slots[:0], chunked)  # no segment at all
    assert_same_bits(chunked.cpu(), start, "histogram after a call with no segment")
    for offsets, slot in chunks(s):
        backend.cats_observe(gate, case.activation_name, offsets, slot, chunked)
    for name, table in (("histogram", whole), ("histogram of chunks", chunked)):
        counted = table.cpu() - start
        assert not counted[s.untouched()].any(), f"{name}: counts in slots with nothing to add"
        assert bool((counted >= 0).all()), f"{name}: lost counts"
        for begin, end, slot in s.parts:
            low, high = magnitude_interval(values[begin:end], case.activation_name)
            most, least = (torch.bincount(b, minlength=reference.NUM_MAGNITUDES).cumsum(0) for b in (low, high))
            found = counted[slot].cumsum(0)
            wrong = (found < least) | (found > most)
            if wrong.any():
                at = int(wrong.nonzero()[0])
                raise AssertionError(
                    f"{name} of slot {slot}: {int(found[at])} magnitudes up to bin {at}, "
                    f"expected {int(least[at])} to {int(most[at])}"
                )


def check_chunks_do_not_matter(backend: Backend, device: torch.device, case: Case) -> None:
    """For backends whose activation of a value does not depend on the value's place: chunks give the same counts.

    torch's may: full vectors and the few values left over take different code.
    """
    s = Segments(case, device)
    gate = s.rows(cats_rows(s))
    whole, chunked = (
        torch.zeros(s.table, reference.NUM_MAGNITUDES, dtype=torch.int64, device=device) for _ in range(2)
    )
    backend.cats_observe(gate, case.activation_name, s.offsets, s.slots, whole)
    for offsets, slot in chunks(s):
        backend.cats_observe(gate, case.activation_name, offsets, slot, chunked)
    assert_same_bits(chunked, whole, "histogram of chunks")


def check_segment_stands_alone(backend: Backend, device: torch.device, case: Case) -> None:
    """The statistic and the histogram of a prompt have the same bits whether others are in the call or not."""
    s = Segments(case, device)
    z, gate = s.rows(griffin_rows(s)), s.rows(cats_rows(s))
    statistics = [torch.ones(s.table, case.neurons, device=device) for _ in range(2)]
    histograms = [torch.zeros(s.table, reference.NUM_MAGNITUDES, dtype=torch.int64, device=device) for _ in range(2)]
    backend.griffin_observe(z, s.offsets, s.slots, statistics[0])
    backend.cats_observe(gate, case.activation_name, s.offsets, s.slots, histograms[0])
    for begin, end, slot in s.parts:
        offsets, slots = torch.tensor([0, end - begin], device=device), torch.tensor([slot], device=device)
        alone = [laid_out(rows[begin:end].clone(), case.layout) for rows in (z, gate)]
        backend.griffin_observe(alone[0], offsets, slots, statistics[1])
        backend.cats_observe(alone[1], case.activation_name, offsets, slots, histograms[1])
    assert_same_bits(statistics[1], statistics[0], "statistics of prompts alone")
    assert_same_bits(histograms[1], histograms[0], "histograms of prompts alone")


# -- selections ------------------------------------------------------------------------------------------------------


def check_griffin_select(backend: Backend, device: torch.device, neurons: int, seed: int = 0) -> None:
    """The k largest of each row, ties to the lower index: random, few different, equal, huge and tiny values."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(neurons, generator=generator)
    rows = torch.stack(
        [
            spread,
            torch.randint(0, 4, (neurons,), generator=generator) / 4,
            torch.ones(neurons),
            torch.zeros(neurons),
            torch.exp(160 * (spread - 0.5)),
            torch.arange(neurons).flip(0).float(),
            (spread < 0.1).float(),
        ]
    )
    for k in sorted({0, 1, neurons // 3, neurons // 2, neurons - 1, neurons}):
        wanted = reference.griffin_select(rows, k)
        found = backend.griffin_select(rows.to(device), k)
        assert_like(found, tuple(rows.shape), torch.bool, device)
        assert_same_bits(found.cpu(), wanted, f"selection of {k} among {neurons}")
        assert_same_bits(backend.griffin_select(rows[1].to(device), k).cpu(), wanted[1], "selection in one row")
        assert backend.griffin_select(rows[:0].to(device), k).shape == (0, neurons)


def check_cats_threshold(backend: Backend, device: torch.device, seed: int = 0) -> None:
    """To the bit what the reference gives on the same device."""
    generator = torch.Generator().manual_seed(seed)
    histogram = torch.zeros(8, reference.NUM_MAGNITUDES, dtype=torch.int64)
    histogram[0, :0x7F80].random_(0, 20, generator=generator)  # all finite magnitudes
    magnitudes = torch.randn(5000, generator=generator).to(torch.bfloat16)
    histogram[1] = torch.bincount(reference.magnitude_bins(magnitudes), minlength=reference.NUM_MAGNITUDES)
    histogram[2, 16_000] = 1
    histogram[3, 16_000] = 7_777
    histogram[4, [0, 15_000]] = torch.tensor([3, 2])
    histogram[5, [16_000, 16_500, 17_000]] = torch.tensor([3 << 31, 5 << 31, (1 << 33) + 1])
    histogram[6, [1, 0x7F7F]] = torch.tensor([1, 1])  # the least subnormal and the largest finite magnitude
    # Row 7 counted nothing.
    table = histogram.to(device)
    for density in (0.0, 0.001, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1.0):
        found = backend.cats_threshold(table, density)
        assert_like(found, (len(histogram),), torch.float32, device)
        assert_same_bits(found, reference.cats_threshold(table, density), f"thresholds for a density of {density}")
        one = backend.cats_threshold(table[1:2], density)
        assert_same_bits(one, found[1:2], "threshold of one row alone")
    assert backend.cats_threshold(table[:0], 0.5).shape == (0,)
