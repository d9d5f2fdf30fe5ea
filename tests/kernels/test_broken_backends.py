"""The contract's checks against broken backends: each must refuse the one that breaks what it checks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.backend import Backend
from caprese_kernels.packed import ACTIVATION_FUNCTIONS, PackedFF
from tests.kernels import conformance, observation
from tests.kernels.cases import FULL, SMALL, Case

CPU = torch.device("cpu")
Run = Callable[[Any], None]
BROKEN: list[tuple[str, Callable[..., Any], Run]] = []


def broken(function: str, refused_by: Run) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a stand-in for that function of the reference."""

    def register(replacement: Callable[..., Any]) -> Callable[..., Any]:
        BROKEN.append((function, replacement, refused_by))
        return replacement

    return register


def over(check: Callable[..., None], *cases: Case, **options: Any) -> Run:
    def run(backend: Any) -> None:
        for case in cases or SMALL:
            check(backend, CPU, case, **options)

    return run


dense = over(conformance.check_dense)
griffin = over(conformance.check_griffin)
cats = over(conformance.check_cats)
padding = over(conformance.check_padding)
out = over(conformance.check_out)
alone = over(conformance.check_request_stands_alone, same_bits=True)
about_alone = over(conformance.check_request_stands_alone, same_bits=False)
twice = over(conformance.check_same_bits_twice)
dropped = over(conformance.check_dropped_weights_do_not_matter)
observe_shares = over(observation.check_griffin_observe)
shards = over(observation.check_shards)
observe_magnitudes = over(observation.check_cats_observe)
chunks = over(observation.check_chunks_do_not_matter)
segments = over(observation.check_segment_stands_alone)


def selection(backend: Any) -> None:
    conformance.check_griffin_select(backend, CPU, 129)


def threshold(backend: Any) -> None:
    conformance.check_cats_threshold(backend, CPU)


def changed(ff: PackedFF, **fields: Any) -> PackedFF:
    """The block with other fields."""
    names = ("gate_up_plus", "down_plus", "activation", "rank", "gate_up_bias", "down_bias")
    return PackedFF(**({name: getattr(ff, name) for name in names} | fields))


@broken("dense_ff", dense)
def forgets_down_bias(x: Tensor, ff: PackedFF) -> Tensor:
    return reference.dense_ff(x, changed(ff, down_bias=None))


@broken("dense_ff", dense)
def forgets_gate_bias(x: Tensor, ff: PackedFF) -> Tensor:
    if ff.gate is None or ff.gate_up_bias is None:
        return reference.dense_ff(x, ff)
    mask = torch.arange(2 * ff.num_neurons) >= ff.num_neurons
    return reference.dense_ff(x, changed(ff, gate_up_bias=ff.gate_up_bias * mask))


@broken("dense_ff", dense)
def prompt_with_low_rank(x: Tensor, ff: PackedFF) -> Tensor:
    return reference.sparse_ff(x, ff, torch.ones(len(x), ff.num_neurons, dtype=torch.bool))


@broken("dense_ff", dense)
def one_gelu_for_both(x: Tensor, ff: PackedFF) -> Tensor:
    return reference.dense_ff(x, changed(ff, activation=ff.activation.removesuffix("_pytorch_tanh")))


@broken("dense_ff", dense)
def forgets_tail_of_hidden_size(x: Tensor, ff: PackedFF) -> Tensor:
    head = torch.arange(ff.hidden_size) < max(16 * (ff.hidden_size // 16), 1)
    return reference.dense_ff(torch.where(head, x, 0), ff)


@broken("dense_ff", over(conformance.check_dense, *FULL[::7]))
def sums_in_model_dtype(x: Tensor, ff: PackedFF) -> Tensor:
    _, z = reference.activations(x, ff)
    y = torch.zeros_like(x) if ff.down_bias is None else ff.down_bias.expand_as(x)
    for j in range(ff.num_neurons):
        y = y + z[:, j, None] * ff.down_plus[j]
    return y


@broken("dense_ff", over(conformance.check_dense, *FULL[::7]))
def multiplies_in_tf32(x: Tensor, ff: PackedFF) -> Tensor:
    """10 bits of mantissa, as tensor cores have for float32 by default."""
    if x.dtype == torch.float32:
        x = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return reference.dense_ff(x, ff)


@broken("griffin_ff", griffin)
def drops_low_rank(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    rows = len(ff.gate_up_plus) - ff.rank
    plain = changed(ff, gate_up_plus=ff.gate_up_plus[:rows], down_plus=ff.down_plus[: ff.num_neurons], rank=0)
    return reference.griffin_ff(x, plain, keep, slots)


@broken("griffin_ff", griffin)
def ignores_padding(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    return reference.griffin_ff(x, ff, keep, slots.clamp(min=0))


@broken("griffin_ff", out)
def _a_new_tensor_in_place_of_out(*arguments, **more):
    return reference.griffin_ff(*arguments)


@broken("cats_ff", out)
def _counts_that_replace_what_was_there(x, ff, tau, slots, out=None, kept=None):
    y, counts = reference.cats_ff(x, ff, tau, slots, out)
    return y, counts if kept is None else kept.copy_(counts if kept.dim() else counts.sum())


@broken("griffin_ff", padding)
def multiplies_padding_by_zero(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    return reference.griffin_ff(x, ff, keep, slots.clamp(min=0)) * (slots >= 0)[:, None]


@broken("griffin_ff", griffin)
def first_selection_for_all(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    first = slots.max() if len(slots) else 0
    return reference.griffin_ff(x, ff, keep, torch.where(slots >= 0, first, slots))


@broken("griffin_ff", griffin)
def token_for_slot(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    return reference.griffin_ff(x, ff, keep, torch.where(slots >= 0, torch.arange(len(slots)), slots))


@broken("griffin_ff", griffin)
def union_for_all(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    return reference.griffin_ff(x, ff, keep[slots[slots >= 0]].any(dim=0).expand_as(keep), slots)


@broken("griffin_ff", griffin)
def second_tile_reads_slots_of_first(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    return reference.griffin_ff(x, ff, keep, torch.where(slots >= 0, slots[torch.arange(len(slots)) % 16], slots))


@broken("griffin_ff", over(conformance.check_griffin, *FULL[::7]))
def drops_last_of_many_neurons(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    last = torch.arange(ff.num_neurons) == 559
    return reference.griffin_ff(x, ff, keep & ~last, slots)


@broken("griffin_ff", alone)
@broken("griffin_ff", about_alone)
def depends_on_batch(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    y = reference.griffin_ff(x, ff, keep, slots)
    return y if len(x) == 1 else y * 1.125


@broken("griffin_ff", dropped)
def reads_all_weights(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    return reference.griffin_ff(x, ff, keep, slots)


class CountsCalls:
    calls = 0


@broken("griffin_ff", twice)
def varies(x: Tensor, ff: PackedFF, keep: Tensor, slots: Tensor) -> Tensor:
    CountsCalls.calls += 1
    return reference.griffin_ff(x, ff, keep, slots) + CountsCalls.calls % 2


@broken("cats_ff", cats)
def greater_but_not_equal(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return reference.cats_ff(x, ff, torch.nextafter(tau, torch.tensor(torch.inf)), slots)


@broken("cats_ff", cats)
def forgets_sign(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    g, _ = reference.activations(x, ff)
    valid = slots[:, None] >= 0
    keep = (g.float() >= tau[slots, None]) & valid
    return torch.where(valid, reference.sparse_ff(x, ff, keep), 0), keep.sum(dim=1)


@broken("cats_ff", cats)
def compares_z(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    _, z = reference.activations(x, ff)
    valid = slots[:, None] >= 0
    keep = (z.abs().float() >= tau[slots, None]) & valid
    return torch.where(valid, reference.sparse_ff(x, ff, keep), 0), keep.sum(dim=1)


@broken("cats_ff", cats)
def counts_low_rank(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    y, kept = reference.cats_ff(x, ff, tau, slots)
    return y, kept + ff.rank * (slots >= 0)


@broken("cats_ff", padding)
def counts_padding(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    y, kept = reference.cats_ff(x, ff, tau, slots)
    return y, kept.masked_fill(slots < 0, ff.num_neurons)


@broken("cats_ff", cats)
def one_threshold_for_all(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    first = slots.max() if len(slots) else 0
    return reference.cats_ff(x, ff, tau, torch.where(slots >= 0, first, slots))


@broken("cats_ff", dropped)
def reads_all_of_up_and_down(x: Tensor, ff: PackedFF, tau: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    return reference.cats_ff(x, ff, tau, slots)


@broken("griffin_select", selection)
def ties_to_higher(statistic: Tensor, k: int) -> Tensor:
    return reference.griffin_select(statistic.flip(-1), k).flip(-1)


@broken("griffin_select", selection)
def one_too_many(statistic: Tensor, k: int) -> Tensor:
    return reference.griffin_select(statistic, min(k + 1, statistic.shape[-1]))


@broken("griffin_select", selection)
def compares_in_bfloat16(statistic: Tensor, k: int) -> Tensor:
    return reference.griffin_select(statistic.bfloat16(), k)


@broken("griffin_select", selection)
def all_equal_to_the_last(statistic: Tensor, k: int) -> Tensor:
    least = statistic.sort(dim=-1, descending=True).values[..., max(k, 1) - 1 : max(k, 1)]
    return (statistic >= least) & (k > 0)


@broken("griffin_observe", observe_shares)
def overwrites_statistic(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    statistic[slots[slots >= 0]] = 0
    reference.griffin_observe(z, offsets, slots, statistic)


@broken("griffin_observe", observe_shares)
def observes_padding(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    reference.griffin_observe(z, offsets, slots.clamp(min=0), statistic)


@broken("griffin_observe", observe_shares)
def starts_at_row_zero(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    reference.griffin_observe(z, offsets - offsets[0], slots, statistic)


@broken("griffin_observe", observe_shares)
def without_norm(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    for begin, end, slot in reference._segments(offsets, slots):
        statistic[slot] += z[begin:end].float().square().sum(dim=0)


@broken("griffin_observe", observe_shares)
def squares_overflow(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    for begin, end, slot in reference._segments(offsets, slots):
        squares = z[begin:end].float().square()
        statistic[slot] += (squares / squares.sum(dim=1, keepdim=True)).nan_to_num().sum(dim=0)


@broken("griffin_observe", observe_shares)
def drops_last_token(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    for begin, end, slot in reference._segments(offsets, slots):
        statistic[slot] += reference.griffin_statistic(z[begin : max(end - 1, begin + 1)])


@broken("griffin_observe", shards)
def norms_of_its_own(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor, norms: Tensor) -> None:
    reference.griffin_observe(z, offsets, slots, statistic)


@broken("griffin_observe", shards)
def norms_squared(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor, norms: Tensor) -> None:
    reference.griffin_observe(z, offsets, slots, statistic, norms.square())


@broken("griffin_norms", shards)
def norms_overflow(z: Tensor) -> Tensor:
    return z.float().square().sum(dim=1).sqrt()


@broken("griffin_observe", segments)
def sums_depend_on_place(z: Tensor, offsets: Tensor, slots: Tensor, statistic: Tensor) -> None:
    """Chunks at multiples of two rows of the whole call, not of the prompt."""
    for begin, end, slot in reference._segments(offsets, slots):
        for row in range(begin, end, 2):
            statistic[slot] += reference.griffin_statistic(z[row - row % 2 : row + 2][: end - row].clone())


@broken("cats_observe", observe_magnitudes)
def overwrites_histogram(gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor) -> None:
    histogram[slots[slots >= 0]] = 0
    reference.cats_observe(gate, activation, offsets, slots, histogram)


@broken("cats_observe", observe_magnitudes)
def one_bin_higher(gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor) -> None:
    counts = torch.zeros_like(histogram)
    reference.cats_observe(gate, activation, offsets, slots, counts)
    histogram += counts.roll(1, dims=1)


@broken("cats_observe", observe_magnitudes)
def truncates_to_bfloat16(gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor) -> None:
    for begin, end, slot in reference._segments(offsets, slots):
        g = ACTIVATION_FUNCTIONS[activation](gate[begin:end]).float().abs().contiguous()
        histogram[slot] += torch.bincount((g.view(torch.int32) >> 16).flatten(), minlength=reference.NUM_MAGNITUDES)


@broken("cats_observe", observe_magnitudes)
def skips_activation(gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor) -> None:
    for begin, end, slot in reference._segments(offsets, slots):
        bins = reference.magnitude_bins(gate[begin:end])
        histogram[slot] += torch.bincount(bins, minlength=reference.NUM_MAGNITUDES)


@broken("cats_observe", chunks)
def counts_calls(gate: Tensor, activation: str, offsets: Tensor, slots: Tensor, histogram: Tensor) -> None:
    reference.cats_observe(gate, activation, offsets, slots, histogram)
    histogram[slots, 0] += 1


@broken("cats_threshold", threshold)
def counts_in_int32(histogram: Tensor, density: float) -> Tensor:
    return reference.cats_threshold(histogram.clamp(max=2**31 - 1), density)


@broken("cats_threshold", threshold)
def no_interpolation(histogram: Tensor, density: float) -> Tensor:
    ends = histogram.cumsum(dim=1)
    ranks = ((1.0 - density) * (ends[:, -1:] - 1).double()).clamp(min=0).long()
    bins = torch.searchsorted(ends, ranks, right=True).clamp(max=reference.NUM_MAGNITUDES - 1)
    tau = bins.to(torch.int16).view(torch.bfloat16).float()[:, 0]
    return torch.where((ends[:, -1] > 0) & (density < 1.0), tau, 0.0)


@broken("cats_threshold", threshold)
def density_one_drops(histogram: Tensor, density: float) -> Tensor:
    return reference.cats_threshold(histogram, min(density, 1 - 2**-53))


@broken("cats_threshold", threshold)
def empty_row_is_nan(histogram: Tensor, density: float) -> Tensor:
    tau = reference.cats_threshold(histogram, density)
    return torch.where(histogram.sum(dim=1) > 0, tau, torch.nan)


@pytest.mark.parametrize(
    ("function", "replacement", "refused_by"),
    [pytest.param(*entry, id=f"{entry[1].__name__}-{i}") for i, entry in enumerate(BROKEN)],
)
def test_refuses(function: str, replacement: Callable[..., Any], refused_by: Run) -> None:
    functions = {name: getattr(reference, name) for name in vars(Backend) if hasattr(reference, name)}
    with pytest.raises(AssertionError):
        refused_by(SimpleNamespace(**(functions | {function: replacement})))


def test_reference_passes_what_refuses_others() -> None:
    """The checks above refuse their broken backends for what is broken."""
    for run in {refused_by: None for _, _, refused_by in BROKEN}:
        if run not in (alone, chunks, dropped):  # the reference promises none of these
            run(reference)
