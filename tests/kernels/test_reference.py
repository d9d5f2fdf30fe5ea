"""The reference functions against loops over tokens and neurons, in Python's float64 arithmetic.

Tolerances follow one rule. The loops return, beside each value, its magnitude: the same sums with every term made
positive. A step of arithmetic adds at most eps, of the dtype, times the magnitude; so the error is at most that times
the number of steps.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import ACTIVATION_FUNCTIONS, PackedFF

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)
# Silu's and gelu's slopes stay below 1.13: an error of their argument grows by no more.
SLOPE = 1.13


def act(name: str, u: float) -> float:
    if name == "silu":
        return u / (1.0 + math.exp(-u))
    if name == "gelu":
        return 0.5 * u * (1.0 + math.erf(u / math.sqrt(2.0)))
    if name == "gelu_pytorch_tanh":
        return 0.5 * u * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3)))
    return max(u, 0.0)


class Block:
    """A random FF block twice: packed for the reference, and as lists for the loops."""

    def __init__(
        self,
        depth: int,
        neurons: int,
        rank: int,
        dtype: torch.dtype,
        name: str,
        gated: bool,
        biased: bool,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

        gate, up, down = draw(neurons, depth) if gated else None, draw(neurons, depth), draw(depth, neurons)
        left, right = (draw(depth, rank), draw(rank, depth)) if rank else (None, None)
        biases = {"gate_bias": draw(neurons) if gated else None, "up_bias": draw(neurons), "down_bias": draw(depth)}
        self.biases = biases if biased else dict.fromkeys(biases)
        self.ff = PackedFF.pack(gate, up, down, name, left, right, **self.biases)
        self.parts = {"gate": gate, "up": up, "down": down, "left": left, "right": right}
        self.lists: dict[str, Any] = {
            key: None if t is None else t.double().tolist() for key, t in (self.parts | self.biases).items()
        }
        self.name, self.dtype, self.depth, self.neurons, self.rank = name, dtype, depth, neurons, rank
        self.generator = generator

    def tokens(self, count: int) -> Tensor:
        return torch.randn(count, self.depth, generator=self.generator).to(self.dtype)

    def tolerance(self, magnitude: Tensor) -> Tensor:
        """Half precision rounds g, z and y some 8 times and sums in float32; float32 rounds every term of both sums."""
        steps = 8 + (self.depth + self.neurons + self.rank if self.dtype == torch.float32 else 0)
        return steps * torch.finfo(self.dtype).eps * magnitude + torch.finfo(self.dtype).tiny

    def project(self, x: list[float], rows: str, bias: str, j: int) -> tuple[float, float]:
        terms = [a * b for a, b in zip(x, self.lists[rows][j], strict=True)]
        if self.lists[bias] is not None:
            terms.append(self.lists[bias][j])
        return sum(terms), sum(map(abs, terms))

    def neuron(self, x: list[float], j: int) -> tuple[float, float, float, float]:
        """g_j, z_j and the magnitudes of both."""
        up, up_size = self.project(x, "up", "up_bias", j)
        if self.lists["gate"] is None:
            g = act(self.name, up)
            return g, g, SLOPE * up_size, SLOPE * up_size
        gate, gate_size = self.project(x, "gate", "gate_bias", j)
        g = act(self.name, gate)
        return g, g * up, SLOPE * gate_size, SLOPE * gate_size * up_size

    def loops(self, x: Tensor, keep: list[list[bool]] | None = None, low_rank: bool = False) -> tuple[Tensor, Tensor]:
        """y [T, D] and its magnitudes; `keep` None keeps all neurons."""
        values, sizes = [], []
        for t, token in enumerate(x.double().tolist()):
            y, size = [0.0] * self.depth, [0.0] * self.depth
            for j in range(self.neurons):
                if keep is not None and not keep[t][j]:
                    continue
                _, z, _, z_size = self.neuron(token, j)
                for d in range(self.depth):
                    y[d] += z * self.lists["down"][d][j]
                    size[d] += z_size * abs(self.lists["down"][d][j])
            for m in range(self.rank if low_rank else 0):
                terms = [a * row[m] for a, row in zip(token, self.lists["left"], strict=True)]
                for d in range(self.depth):
                    y[d] += sum(terms) * self.lists["right"][m][d]
                    size[d] += sum(map(abs, terms)) * abs(self.lists["right"][m][d])
            if self.lists["down_bias"] is not None:
                y = [a + b for a, b in zip(y, self.lists["down_bias"], strict=True)]
                size = [a + abs(b) for a, b in zip(size, self.lists["down_bias"], strict=True)]
            values.append(y)
            sizes.append(size)
        return torch.tensor(values, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)


blocks = st.builds(
    Block,
    depth=st.integers(1, 9),
    neurons=st.integers(1, 13),
    rank=st.sampled_from([0, 1, 16]),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)


def assert_within(found: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    excess = ((found.double() - expected).abs() - tolerance).max()
    assert excess <= 0, f"beyond the tolerance by {excess:.1e}: {found} is not {expected}"


@settings(max_examples=60, deadline=None)
@given(block=blocks, count=st.integers(1, 4))
def test_activations_and_dense_block(block: Block, count: int) -> None:
    x = block.tokens(count)
    g, z = reference.activations(x, block.ff)
    wanted = torch.tensor(
        [[block.neuron(token, j) for j in range(block.neurons)] for token in x.double().tolist()], dtype=torch.float64
    )
    assert g.dtype == z.dtype == block.dtype
    assert_within(g, wanted[..., 0], block.tolerance(wanted[..., 2]))
    assert_within(z, wanted[..., 1], block.tolerance(wanted[..., 3]))
    y, magnitude = block.loops(x)
    found = reference.dense_ff(x, block.ff)
    assert found.shape == x.shape
    assert found.dtype == block.dtype
    assert_within(found, y, block.tolerance(magnitude))


@settings(max_examples=60, deadline=None)
@given(block=blocks, count=st.integers(1, 4), data=st.data())
def test_sparse_block(block: Block, count: int, data: st.DataObject) -> None:
    """Any mask, also none and all of the neurons; the low-rank layer is always active."""
    x = block.tokens(count)
    row = st.lists(st.booleans(), min_size=block.neurons, max_size=block.neurons)
    constant = st.booleans().map(lambda kept: [kept] * block.neurons)
    keep = data.draw(st.lists(row | constant, min_size=count, max_size=count))
    y, magnitude = block.loops(x, keep, low_rank=True)
    assert_within(reference.sparse_ff(x, block.ff, torch.tensor(keep)), y, block.tolerance(magnitude))
    slots = torch.tensor([-1, *reversed(range(count))])  # from a table of selections, behind a row of padding
    found = reference.griffin_ff(torch.cat([x[:1], x.flip(0)]), block.ff, torch.tensor(keep), slots)
    assert not found[0].any()
    assert_within(found[1:].flip(0), y, block.tolerance(magnitude))


@settings(max_examples=60, deadline=None)
@given(block=blocks, count=st.integers(1, 4), scaled=st.booleans(), data=st.data())
def test_cats_block(block: Block, count: int, scaled: bool, data: st.DataObject) -> None:
    """Each token has its own threshold; a magnitude, times its neuron's scale if there is one, equal to it is kept."""
    scale = torch.arange(1, block.ff.num_neurons + 1).float() / 3 if scaled else None
    ff = replace(block.ff, scale=scale)
    x = block.tokens(count)
    rows = torch.cat([x[:1], x.flip(0)])  # a row of padding, and slots in another order than tokens
    g, _ = reference.activations(rows, block.ff)
    magnitudes = (g[1:].flip(0).abs().float() * (1.0 if scale is None else scale)).tolist()
    tau = [data.draw(st.sampled_from([*row, 0.0, math.inf])) for row in magnitudes]
    keep = [[m >= t for m in row] for row, t in zip(magnitudes, tau, strict=True)]
    y, magnitude = block.loops(x, keep, low_rank=True)
    slots = torch.tensor([-1, *reversed(range(count))])
    found, kept = reference.cats_ff(rows, ff, torch.tensor(tau), slots)
    assert not found[0].any()
    assert_within(found[1:].flip(0), y, block.tolerance(magnitude))
    assert kept.tolist() == [0, *(sum(row) for row in reversed(keep))]


def test_a_neuron_left_out_cannot_spoil_the_sum() -> None:
    """Left out means absent: an infinite z of such a neuron does not turn y into NaN."""
    block = Block(4, 3, 0, torch.float32, "relu", gated=True, biased=False)
    block.ff.up_plus[1] = torch.inf
    y = reference.sparse_ff(torch.ones(1, 4), block.ff, torch.tensor([[True, False, True]]))
    assert torch.isfinite(y).all()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-4, 4), min_size=5, max_size=5) | st.just([0] * 5), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    power=st.sampled_from([-12, 0, 12]),
)
def test_griffin_statistic(rows: list[list[int]], dtype: torch.dtype, power: int) -> None:
    """Small integers times a power of two: exact in every dtype. A token of zeros adds nothing."""
    wanted = [0.0] * 5
    for row in rows:
        norm = sum(v * v for v in row)
        for j, v in enumerate(row):
            wanted[j] += v * v / norm if norm else 0.0
    found = reference.griffin_statistic((torch.tensor(rows).double() * 2.0**power).to(dtype))
    assert found.dtype == torch.float32
    # Some 20 roundings in float32, eps 1.2e-7 each, of terms up to 1 a token.
    assert found.tolist() == pytest.approx(wanted, rel=2.4e-6, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_griffin_statistic_of_extreme_values(dtype: torch.dtype) -> None:
    """Squares that overflow or vanish do not: every token other than zero has shares that sum to 1."""
    info = torch.finfo(dtype)
    z = torch.tensor([[info.max, -info.max, 0], [info.tiny, 0, 0], [0, 0, info.max]], dtype=dtype)
    # Halves and ones are exact in float32.
    assert reference.griffin_statistic(z).tolist() == [1.5, 0.5, 1.0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 29), max_size=5), dtype=st.sampled_from(DTYPES))
def test_statistics_add_up_over_chunks(seed: int, cuts: set[int], dtype: torch.dtype) -> None:
    z = torch.randn(30, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
    borders = [0, *sorted(cuts), 30]
    parts = [z[a:b] for a, b in pairwise(borders)]
    found = torch.stack([reference.griffin_statistic(part) for part in parts]).sum(dim=0)
    # Another order of 30 float32 additions: 30 times eps, 3.6e-6.
    torch.testing.assert_close(found, reference.griffin_statistic(z), rtol=3.6e-6, atol=0)
    whole, chunked = (reference.CatsStatistic(z.numel(), dtype) for _ in range(2))
    whole.add(z)
    for part in parts:
        chunked.add(part)
    assert whole.threshold(0.3) == chunked.threshold(0.3), "counts and order statistics have no rounding"


@settings(max_examples=200, deadline=None)
@given(statistic=st.lists(st.integers(0, 4), min_size=1, max_size=40), data=st.data())
def test_griffin_select(statistic: list[int], data: st.DataObject) -> None:
    """The k largest; among equals the lower index. k = 0 and k = F too."""
    k = data.draw(st.integers(0, len(statistic)))
    wanted = sorted(range(len(statistic)), key=lambda j: (-statistic[j], j))[:k]
    found = reference.griffin_select(torch.tensor(statistic, dtype=torch.float32), k)
    assert found.shape == (len(statistic),)
    assert found.dtype == torch.bool
    assert found.nonzero().flatten().tolist() == sorted(wanted)


def test_griffin_select_breaks_ties_in_long_rows() -> None:
    """An unstable sort shows its order only beyond a few dozen equal values."""
    assert reference.griffin_select(torch.ones(10_007), 5_000).nonzero().flatten().tolist() == list(range(5_000))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-4, 4), min_size=5, max_size=5), min_size=1, max_size=6),
    scale=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_weighted_statistic(rows: list[list[int]], scale: list[int], dtype: torch.dtype) -> None:
    """The statistic of z_ij scale_j, with its own norms and with given ones."""
    z, factors = torch.tensor(rows).to(dtype), torch.tensor(scale).float()
    wanted = reference.griffin_statistic(torch.tensor(rows).float() * factors)
    # Products are exact; one rounding of the norm counts twice in each share, of at most 6.
    torch.testing.assert_close(reference.griffin_statistic(z, None, factors), wanted, rtol=0, atol=0)
    norms = reference.griffin_norms(z, factors)
    assert norms.tolist() == pytest.approx((z.double() * factors.double()).norm(dim=1).tolist(), rel=1e-6)
    torch.testing.assert_close(reference.griffin_statistic(z, norms, factors), wanted, rtol=2e-6, atol=1e-12)
    table = torch.zeros(2, 5)
    reference.griffin_observe(z, torch.tensor([0, len(z)]), torch.tensor([1]), table, None, factors)
    torch.testing.assert_close(table[1], wanted, rtol=1e-6, atol=1e-12)


def test_down_norms_leave_the_low_rank_rows_out() -> None:
    ff = PackedFF(torch.zeros(8, 2), torch.tensor([[3.0, 4.0], [0, 0], [0, 2], [9, 9], [9, 9]]), "silu", rank=2)
    assert reference.down_norms(ff).tolist() == [5.0, 0.0, 2.0]


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=20),
    weight=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    core=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    data=st.data(),
)
def test_core_and_tail(counts: list[tuple[int, int]], weight: float, core: float, data: st.DataObject) -> None:
    """The floor(kappa k) of largest prior, then the k - core of largest blend among the rest; ties to the lower."""
    own, prior = ([pair[i] for pair in counts] for i in (0, 1))
    k = data.draw(st.integers(0, len(own)))
    total, whole = sum(own), sum(prior)
    blend = [(1 - weight) * (s / total if total else 0.0) + weight * p / whole for s, p in zip(own, prior, strict=True)]
    found = reference.griffin_blend(torch.tensor(own).float(), torch.tensor(prior).float(), weight)
    assert found.tolist() == pytest.approx(blend if weight else own, rel=1e-6)
    best = sorted(range(len(own)), key=lambda j: (-prior[j], j))[: math.floor(core * k)]
    mask = reference.griffin_core(torch.tensor(prior).float(), reference.core_count(core, k))
    assert mask.nonzero().flatten().tolist() == sorted(best)
    rest = sorted(set(range(len(own))) - set(best), key=lambda j: (-found[j].item(), j))
    keep = reference.griffin_select_tail(torch.stack([found, found.flip(0)]), k, mask)
    assert keep[0].nonzero().flatten().tolist() == sorted([*best, *rest[: k - len(best)]])
    assert keep[1][mask].all()
    assert keep[1].sum() == k


def test_without_a_prior_the_selection_is_griffins() -> None:
    statistic = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    assert reference.griffin_blend(statistic, None, 0.0) is statistic
    none = torch.zeros(50, dtype=torch.bool)
    assert torch.equal(reference.griffin_select_tail(statistic, 20, none), reference.griffin_select(statistic, 20))


@pytest.mark.parametrize(
    ("density", "neurons", "k"), [(0.5, 160, 80), (0.5, 97, 48), (1.0, 97, 97), (0.01, 97, 0), (0.25, 8960, 2240)]
)
def test_griffin_count_is_the_floor(density: float, neurons: int, k: int) -> None:
    assert reference.griffin_count(density, neurons) == k


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    density=st.floats(0.001, 0.999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_cats_threshold_is_the_quantile(seed: int, shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    """For float32 from the values themselves, for bfloat16 from its histogram: the same order statistics."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    statistic = reference.CatsStatistic(g.numel(), dtype)
    statistic.add(g)
    assert (statistic.histogram is None) == (dtype == torch.float32)
    tau = statistic.threshold(density)
    assert tau.dtype == torch.float32
    wanted = torch.quantile(g.abs().double().flatten(), 1.0 - density)
    # One interpolation in float32 between values below 5: three roundings of 2^-24 each.
    assert float(tau) == pytest.approx(float(wanted), rel=2e-7, abs=5 * 2e-7)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), count=st.integers(1, 30))
def test_histogram_is_exact_for_bfloat16(data: st.DataObject, count: int) -> None:
    """Any finite bit patterns, zeros and denormals among them: at a rank that is whole, tau is that very value."""
    bits = data.draw(st.lists(st.integers(0, 0x7F7F), min_size=count, max_size=count))
    signs = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    g = torch.tensor([b - 0x8000 if s else b for b, s in zip(bits, signs, strict=True)], dtype=torch.int16)
    statistic = reference.CatsStatistic(count, torch.bfloat16)
    statistic.add(g.view(torch.bfloat16)[:, None])
    assert statistic.histogram is not None
    assert statistic.histogram.tolist() == torch.bincount(torch.tensor(bits), minlength=1 << 15).tolist()
    half = torch.tensor(sorted(bits), dtype=torch.int16).view(torch.bfloat16).float()
    if count % 2:
        assert statistic.threshold(0.5) == half[count // 2]
    assert statistic.threshold(1e-12) == half[-1]


def test_long_float32_prompts_use_the_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond EXACT_VALUES the quantile has bfloat16's precision; the prompt's whole length decides."""
    g = torch.randn(50, 40, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(reference, "EXACT_VALUES", g.numel() - 1)
    statistic = reference.CatsStatistic(g.numel(), torch.float32)
    for part in g.split(7):  # each chunk alone is short
        statistic.add(part)
    assert statistic.histogram is not None
    assert not statistic.values
    # A bfloat16 has 8 bits of precision: rounding to nearest moves a value by up to 2^-8 of it.
    assert float(statistic.threshold(0.4)) == pytest.approx(float(torch.quantile(g.abs(), 0.6)), rel=2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_density_one_keeps_all(dtype: torch.dtype) -> None:
    """Also neurons with smaller magnitudes than any in the prompt, and zeros."""
    block = Block(6, 11, 0, dtype, "relu", gated=True, biased=False)
    x = block.tokens(5)
    g, z = reference.activations(x, block.ff)
    statistic = reference.CatsStatistic(g.numel(), dtype)
    statistic.add(g + 1)
    small = x * 2.0**-6
    y, kept = reference.cats_ff(small, block.ff, statistic.threshold(1.0)[None], torch.zeros(5, dtype=torch.int64))
    assert kept.tolist() == [11] * 5
    assert torch.equal(y, reference.dense_ff(small, block.ff))
    keep = reference.griffin_select(reference.griffin_statistic(z), reference.griffin_count(1.0, 11))
    assert keep.all()
    slots = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(reference.griffin_ff(x, block.ff, keep[None], slots), reference.dense_ff(x, block.ff))


@pytest.mark.parametrize("rank", [0, 3])
def test_packing(rank: int) -> None:
    """One neuron, one row, in each matrix; L and R follow."""
    block = Block(5, 7, rank, torch.float32, "silu", gated=True, biased=True)
    ff, parts = block.ff, block.parts
    assert (ff.hidden_size, ff.num_neurons, ff.rank, ff.num_matrices) == (5, 7, rank, 3)
    assert ff.up_plus.shape == ff.down_plus.shape == (7 + rank, 5)
    assert all(t is not None and t.is_contiguous() for t in (ff.gate, ff.up_plus, ff.down_plus))
    assert torch.equal(ff.up_plus[:7], parts["up"])
    assert torch.equal(ff.down_plus[:7], parts["down"].t())
    if rank:
        assert torch.equal(ff.up_plus[7:], parts["left"].t())
        assert torch.equal(ff.down_plus[7:], parts["right"])


@settings(max_examples=30, deadline=None)
@given(block=blocks, data=st.data())
def test_permuted_neurons(block: Block, data: st.DataObject) -> None:
    """The same block in another order of its neurons, in the same storage; L and R stay where they are."""
    ff = block.ff
    order = torch.tensor(data.draw(st.permutations(range(ff.num_neurons))))
    gate, up, down = (None if t is None else t.clone() for t in (ff.gate, ff.up_plus, ff.down_plus))
    biases, storage = [None if b is None else b.clone() for b in (ff.gate_bias, ff.up_bias)], ff.up_plus.data_ptr()
    ff.permute(order)
    rows = torch.cat([order, torch.arange(ff.num_neurons, ff.num_neurons + ff.rank)])
    assert ff.up_plus.data_ptr() == storage
    for found, before, moved in (
        (ff.gate, gate, order), (ff.up_plus, up, rows), (ff.down_plus, down, rows),
        (ff.gate_bias, biases[0], order), (ff.up_bias, biases[1], order),
    ):  # fmt: skip
        assert (found is None) == (before is None)
        assert found is None or before is None or torch.equal(found, before[moved])


def test_packing_refuses_what_does_not_fit() -> None:
    silu = "silu"
    gate, up, down = torch.zeros(7, 5), torch.zeros(7, 5), torch.zeros(5, 7)
    left, right = torch.zeros(5, 2), torch.zeros(2, 5)
    with pytest.raises(CapreseError, match=r"gate of shape \(7, 5\); found \(6, 5\)"):
        PackedFF.pack(gate[:6], up, down, silu)
    with pytest.raises(CapreseError, match=r"down_plus \[F \+ 0, D\].*found \[6, 5\] and \[14, 5\]"):
        PackedFF.pack(gate, up, down[:, :6], silu)
    with pytest.raises(CapreseError, match=r"down_plus \[F \+ 2, D\].*found \[8, 5\] and \[16, 5\]"):
        PackedFF.pack(gate, up, down, silu, left, right[:1])
    for half in ({"left": left}, {"right": right}):  # one without the other, with a gate and without
        for gates in (gate, None):
            with pytest.raises(CapreseError, match="L and R"):
                PackedFF.pack(gates, up, down, silu, **half)
