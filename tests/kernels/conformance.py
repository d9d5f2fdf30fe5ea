"""What every backend of caprese_kernels must do, whatever its device: checks that know only the contract.

Each `check_*` takes a backend, a device and a `cases.Case`, builds the case's inputs from its seed, and asserts.
`problem` says what is wanted and why a bound is what it is; `observation` has the checks of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from caprese_kernels.packed import PackedFF
from tests.kernels.cases import Case
from tests.kernels.observation import Segments, cats_rows, griffin_rows
from tests.kernels.problem import (
    Approx,
    assert_like,
    assert_output,
    assert_same_bits,
    assert_within,
    laid_out,
    problem,
)

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


def check_out(backend: Backend, device: torch.device, case: Case) -> None:
    """y goes into the rows of a larger tensor, with the same bits; what is counted is added to what was there."""
    p = problem(case, device)
    core = p.ff.core(case.neurons // 2)
    calls: dict[str, Callable[[Tensor | None], Tensor]] = {
        "dense": lambda out: backend.dense_ff(p.x, p.ff, out=out),
        "griffin": lambda out: backend.griffin_ff(p.x, p.ff, p.keep, p.slots, out=out),
        "core": lambda out: backend.core_ff(p.x, core, p.slots, out=out),
        "cats": lambda out: backend.cats_ff(p.x, p.ff, p.tau, p.slots, out=out)[0],
    }
    for name, call in calls.items():
        wide = torch.full((case.tokens + 2, case.depth), math.nan, dtype=case.dtype, device=device)
        out = wide[1:-1]
        y = call(out)
        assert y.data_ptr() == out.data_ptr(), f"{name}: y is out"
        assert_same_bits(out, call(None), f"{name} y in out")
        assert bool(wide[[0, -1]].isnan().all()), f"{name}: rows beside out"
    counts = backend.cats_ff(p.x, p.ff, p.tau, p.slots)[1]
    for start in (torch.arange(case.tokens, device=device), torch.tensor(7, device=device)):
        kept = start.clone()
        found = backend.cats_ff(p.x, p.ff, p.tau, p.slots, kept=kept)[1]
        assert found.data_ptr() == kept.data_ptr(), "the counts are in kept"
        assert_same_bits(kept, start + (counts if kept.dim() else counts.sum()), "counts added")


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
