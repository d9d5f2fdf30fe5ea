"""The Triton backend against the contract: on a GPU, or on the CPU through Triton's interpreter.

Triton decides between compiler and interpreter when it is imported; other tests import it with vLLM. So
`test_gpu.py` runs this module as a process of its own, with TRITON_INTERPRET=1 where there is no GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from caprese_kernels import gpu, reference
from caprese_kernels.gpu import crossover, gather, gather_kernels, masked, statistics, tuning
from caprese_kernels.packed import PackedFF
from tests.kernels import conformance, observation, scaled, shared_core
from tests.kernels.cases import FULL, INTEGERS, SMALL, Case
from tests.kernels.problem import Problem, problem

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if CUDA:
    # The contract's bounds are those of sums in float32; torch lets cuBLAS add parts of them in half precision.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
else:
    from tests.support import interpreter

    interpreter.mend()

PATHS = ("gather", "masked")


def backend(path: str) -> Any:
    """The module with one path for any number of tokens."""
    functions = {name: getattr(gpu, name) for name in gpu.__all__}
    return SimpleNamespace(
        **functions | {name: partial(functions[name], path=path) for name in ("griffin_ff", "cats_ff")}
    )


BACKENDS = {path: backend(path) for path in PATHS}
# Compiling a kernel for each kind of case takes a GPU's test far longer than running it.
CASES = SMALL[::8] if CUDA else SMALL
INTEGER_CASES = [case for case in CASES if case.integers][:: 1 if CUDA else 4]
FF_CHECKS = (conformance.check_griffin, conformance.check_cats)
ONCE_CHECKS = (  # of what does not depend on the path
    conformance.check_dense,
    observation.check_griffin_observe,
    observation.check_shards,
    observation.check_cats_observe,
)
SLOW_CHECKS = (
    conformance.check_same_bits_twice,
    observation.check_chunks_do_not_matter,
    observation.check_segment_stands_alone,
)


def stands_alone(module: Any, device: torch.device, case: Case) -> None:
    # Another number of tokens is another order of additions.
    conformance.check_request_stands_alone(module, device, case, same_bits=False)


def each(checks: tuple[Callable[..., None], ...], cases: list[Case], paths: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(check, path, case, id=f"{check.__name__}-{path}-{case.id}")
        for case in cases
        for path in paths
        for check in checks
    ]


@pytest.mark.parametrize(
    ("check", "path", "case"),
    [
        *each(FF_CHECKS, CASES, ("gather",)),
        *each(FF_CHECKS, CASES[::2], ("masked",)),
        *each((conformance.check_padding,), CASES[::4], PATHS),
        *each((conformance.check_out,), CASES[::7], PATHS),
        *each((conformance.check_dropped_weights_do_not_matter,), CASES[::3], ("gather",)),
        *each(ONCE_CHECKS, CASES[::5], ("gather",)),
        *each((*SLOW_CHECKS, stands_alone), CASES[::8], ("gather",)),
        *each((stands_alone,), CASES[3::8], ("masked",)),
        *each((scaled.check_scaled_statistic, scaled.check_scaled_histogram), CASES[2::8], ("gather",)),
        *each((shared_core.check_core, shared_core.check_core_padding), CASES[1::8], ("gather",)),
        *each((scaled.check_scaled_cats,), INTEGER_CASES, PATHS),
    ],
)
def test_conforms(check: Callable[..., None], path: str, case: Case) -> None:
    check(BACKENDS[path], DEVICE, case)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small blocks have many tiles in every direction, and tails in each."""
    for name, value in {
        "UP_ONE": tuning.Tile(rows=8, columns=32, warps=4, stages=3),
        "UP_DOT": tuning.Tile(rows=16, columns=32, warps=4, stages=3),
        "DOWN_ONE": tuning.Tile(rows=8, columns=32, warps=4, stages=3),
        "DOWN_DOT": tuning.Tile(rows=16, columns=32, warps=4, stages=3),
        "WARPS_PER_SM": 24,
        "MAX_TOKENS": 16,
        "PLAN_BLOCK": 32,
        "MASK_BLOCK": 64,
        "OBSERVED_TOKENS": 2,
        "LIST_BLOCK": 16,
        "ROW_BLOCK": 16,
        "COUNT_BLOCK": 64,
    }.items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(statistics, "COLUMNS", 16)
    monkeypatch.setattr(statistics, "PARTS", 2)


TILED = [
    *(
        Case(70, 65, 1 + 16 * (t % 2), t, 0.5, dtype, name, gated, biased, table, padding, layout, seed=7000 + t)
        for t, dtype, name, gated, biased, table, padding, layout in [
            (1, torch.bfloat16, "silu", True, False, "own", "none", "plain"),
            (2, torch.float16, "gelu", True, True, "own", "none", "other"),
            (2, torch.float32, INTEGERS, False, True, "shared", "none", "plain"),
            (5, torch.float32, INTEGERS, True, True, "equal", "middle", "columns"),
            (17, torch.bfloat16, INTEGERS, True, False, "mixed", "first", "plain"),
            (33, torch.float16, "gelu_pytorch_tanh", False, True, "pairs", "last", "plain"),
        ]
    ),
    Case(40, 65, 256, 64, 0.1, torch.bfloat16, INTEGERS, seed=7100),
    Case(65, 40, 256, 3, 0.75, torch.bfloat16, "silu", padding="first", seed=7200),
]


if CUDA:
    TILED = TILED[::2]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("check", "path", "case"),
    [
        *each(FF_CHECKS, TILED, ("gather",)),
        *each(FF_CHECKS, TILED[::2], ("masked",)),
        *each((conformance.check_dropped_weights_do_not_matter,), TILED[-5:-4], ("gather",)),
        *each(ONCE_CHECKS, TILED[1:4:2], ("gather",)),
    ],
)
def test_many_tiles(check: Callable[..., None], path: str, case: Case) -> None:
    check(BACKENDS[path], DEVICE, case)


@pytest.mark.parametrize("case", [c for c in FULL if c.depth == 1536 and c.tokens == 1], ids=lambda c: c.id)
@pytest.mark.parametrize("check", [conformance.check_griffin, conformance.check_cats])
def test_real_hidden_size(check: Callable[..., None], case: Case) -> None:
    check(BACKENDS["gather"], DEVICE, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_that_are_not_finite(dtype: torch.dtype) -> None:
    observation.check_tokens_that_are_not_finite(gpu, DEVICE, dtype)


@pytest.mark.parametrize("neurons", [1, 7, 129, 10_007])
def test_selects(neurons: int) -> None:
    conformance.check_griffin_select(gpu, DEVICE, neurons)


def test_thresholds() -> None:
    conformance.check_cats_threshold(gpu, DEVICE)


def test_selects_every_bit() -> None:
    """Neighbouring float32 numbers are distinguished, from the least subnormal to the largest."""
    bits = torch.tensor([0, 1, 2, 0x00800000, 0x3F800000, 0x3F800001, 0x7F7FFFFE, 0x7F7FFFFF], dtype=torch.int32)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    values = bits[order].view(torch.float32)
    for k in range(9):
        found = gpu.griffin_select(values.to(DEVICE), k)
        assert found.tolist() == (order >= 8 - k).tolist()


# -- plan --------------------------------------------------------------------------------------------------------------


def random_selections(*shape: int, density: float = 0.5, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density).to(DEVICE)


@pytest.mark.parametrize("block", [32, tuning.PLAN_BLOCK])
@pytest.mark.parametrize("slots", [[2], [-1], [], [0, 0, -1, 0], [4, -1, 1, 2], list(range(-1, 5)) * 14])
def test_plan_lists_the_union(monkeypatch: pytest.MonkeyPatch, block: int, slots: list[int]) -> None:
    """For each of three layers, in one launch: ascending, each row once, also beyond one tile of tokens."""
    monkeypatch.setattr(tuning, "PLAN_BLOCK", block)
    keep = random_selections(3, 5, 101, density=0.3)
    keep[1] = False
    keep[2, 2] = True
    plans = gpu.plan_rows(keep, torch.tensor(slots, dtype=torch.int64, device=DEVICE))
    valid = [slot for slot in slots if slot >= 0]
    for layer in range(3):
        found = plans[layer]
        count = int(found.count)
        wanted = keep[layer, valid].any(dim=0).nonzero().flatten().tolist() if valid else None
        assert count == (-1 if wanted is None else len(wanted))
        assert found.rows[: max(count, 0)].tolist() == (wanted or [])


def test_a_plan_made_beforehand_gives_the_same_bits() -> None:
    block = PackedFF(*(torch.randn(2 * 45 + 3, 16, device=DEVICE), torch.randn(48, 16, device=DEVICE)), "silu", rank=3)
    keep, slots = random_selections(2, 4, 45), torch.tensor([3, -1, 1], device=DEVICE)
    x = torch.randn(3, 16, device=DEVICE)
    plans = gpu.plan_rows(keep, slots)
    for layer in range(2):
        given = gpu.griffin_ff(x, block, keep[layer], slots, row_plan=plans[layer], path="gather")
        assert torch.equal(given, gpu.griffin_ff(x, block, keep[layer], slots, path="gather"))


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="the interpreter alone shows each load")
@pytest.mark.parametrize("padding", ["none", "middle", "all"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_rows_that_a_token_needs_are_read_once(tokens: int, gated: bool, padding: str) -> None:
    """And no others: of gate, W_1 and W_2 the union of the selections; of L and R all; of CATS's gate all."""
    case = Case(40, 45, 3, tokens, 0.25, torch.float32, "silu", gated, padding=padding, seed=8100)
    p = problem(case, DEVICE)
    some, low_rank = bool((p.slots >= 0).any()), 3
    griffin = p.keep_rows.any(dim=0).long().tolist()
    assert not p.perhaps.any(), "which neurons CATS keeps is sure"
    cats = p.surely.any(dim=0).long().tolist()
    every, always = [int(some)] * 45, [int(some)] * low_rank
    calls = {
        "griffin": (
            griffin if gated else [],
            griffin,
            griffin,
            lambda: gpu.griffin_ff(p.x, p.ff, p.keep, p.slots, path="gather"),
        ),
        "cats": (
            *(every if gated else [], cats if gated else every, cats),
            lambda: gpu.cats_ff(p.x, p.ff, p.tau, p.slots, path="gather"),
        ),
    }
    for gate, up, down, call in calls.values():
        with interpreter.reads(p.ff.gate_up_plus, p.ff.down_plus) as (up_reads, down_reads):
            call()
        assert up_reads.tolist() == [[n] * 40 for n in gate + up + always]
        assert down_reads.tolist() == [[n] * 40 for n in down + always]


# -- which path, and how many launches ---------------------------------------------------------------------------------


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels launched."""
    seen: list[str] = []

    class Spy:
        def __init__(self, name: str, kernel: Any):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(self.name)
            return self.kernel[grid]

    with monkeypatch.context() as patch:
        for module, name in (
            *((gather_kernels, name) for name in ("plan_rows", "griffin_up", "cats_up", "down")),
            (masked, "_activate_and_mask"),
        ):
            patch.setattr(module, name, Spy(name, getattr(module, name)))
        yield seen


def tiny(tokens: int, **fields: Any) -> Problem:
    return problem(Case(16, 45, 3, tokens, 0.5, torch.float32, "silu", seed=8000, **fields), DEVICE)


def test_path_follows_the_crossover(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each path launches what it should: no kernel for the union if the caller has made it."""
    for method, most in (("griffin", 3), ("cats", 2)):
        monkeypatch.setitem(crossover.DEFAULT, method, most)
    crossover.most_gathered.cache_clear()
    for tokens in (1, 2, 3, 4):
        p = tiny(tokens)
        with launches(monkeypatch) as seen:
            gpu.griffin_ff(p.x, p.ff, p.keep, p.slots)
        assert seen == (["plan_rows", "griffin_up", "down"] if tokens <= 3 else ["_activate_and_mask"])
        with launches(monkeypatch) as seen:
            gpu.griffin_ff(p.x, p.ff, p.keep, p.slots, row_plan=gather.plan_rows(p.keep, p.slots))
        assert seen == (["plan_rows", "griffin_up", "down"] if tokens <= 3 else ["plan_rows", "_activate_and_mask"])
        with launches(monkeypatch) as seen:
            layers = gpu.plan_layers(torch.stack([p.keep, ~p.keep]), p.slots)
        assert seen == (["plan_rows"] if tokens <= 3 else [])
        assert (layers is None) == (tokens > 3), "of layers whose rows are not gathered there is nothing to plan"
        with launches(monkeypatch) as seen:
            gpu.cats_ff(p.x, p.ff, p.tau, p.slots)
        assert seen == (["cats_up", "down"] if tokens <= 2 else ["_activate_and_mask"])
    crossover.most_gathered.cache_clear()


def test_a_layer_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides, torch only allocates: nothing is cleared, copied or added up outside of the kernels."""
    p, seen = tiny(1), []
    out, kept, plan = (
        torch.empty_like(p.x),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
        gpu.plan_rows(p.keep, p.slots),
    )

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function).split(".")[1])
            return function(*args, **kwargs or {})

    class Launch:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: seen.append(self.name)

    for name in ("plan_rows", "griffin_up", "cats_up", "down"):
        monkeypatch.setattr(gather_kernels, name, Launch(name))
    for kernels, call in (
        (["griffin_up", "down"], lambda: gpu.griffin_ff(p.x, p.ff, p.keep, p.slots, row_plan=plan, out=out)),
        (["cats_up", "down"], lambda: gpu.cats_ff(p.x, p.ff, p.tau, p.slots, out=out, kept=kept)),
    ):
        seen.clear()
        with Operations():
            call()
        memory = {"empty", "new_empty", "empty_like", "view", "detach"}  # allocations and views: no launch
        assert [name for name in seen if name not in memory] == kernels


def test_measured_crossovers_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    monkeypatch.setitem(crossover.MEASURED, (name, "cats"), 7)
    crossover.most_gathered.cache_clear()
    assert [crossover.choose("cats", t, DEVICE) for t in (1, 7, 8)] == ["gather", "gather", "masked"]
    crossover.most_gathered.cache_clear()


@pytest.mark.parametrize("path", PATHS)
def test_an_infinite_weight_of_a_dropped_neuron(path: str) -> None:
    """Left out means absent, also where the masked path multiplies with it."""
    p = tiny(4, table="shared")
    wanted = gpu.griffin_ff(p.x, p.ff, p.keep, p.slots, path=path)
    spoilt = p.ff.gate_up_plus.clone()
    spoilt[p.ff.num_neurons : -p.ff.rank][~p.keep[p.slots[0]]] = torch.inf  # of W_1
    ff = PackedFF(spoilt, p.ff.down_plus, p.ff.activation, p.ff.rank)
    assert torch.equal(gpu.griffin_ff(p.x, ff, p.keep, p.slots, path=path), wanted)


def test_an_empty_batch_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = tiny(0)
    with launches(monkeypatch) as seen:
        y, kept = gpu.cats_ff(p.x, p.ff, p.tau, p.slots)
        assert y.shape == gpu.griffin_ff(p.x, p.ff, p.keep, p.slots).shape == gpu.dense_ff(p.x, p.ff).shape == (0, 16)
        assert kept.shape == (0,)
    assert not seen


def test_partial_sums_do_not_depend_on_what_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as garbage: what is read was written before."""
    p = tiny(4, padding="middle")
    clean = [
        gpu.griffin_ff(p.x, p.ff, p.keep, p.slots, path="gather"),
        *gpu.cats_ff(p.x, p.ff, p.tau, p.slots, path="gather"),
    ]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        filled = [
            gpu.griffin_ff(p.x, p.ff, p.keep, p.slots, path="gather"),
            *gpu.cats_ff(p.x, p.ff, p.tau, p.slots, path="gather"),
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, filled, strict=True):
        assert torch.equal(a, b)


def test_strided_statistics_table() -> None:
    """A statistic's rows may be those of a wider table; so may a histogram's."""
    z = torch.randn(6, 33, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    offsets, slots = torch.tensor([0, 2, 6], device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    wide = torch.full((2, 40), 5.0, device=DEVICE)
    dense = torch.full((2, 33), 5.0, device=DEVICE)
    gpu.griffin_observe(z, offsets, slots, wide[:, :33])
    gpu.griffin_observe(z, offsets, slots, dense)
    assert torch.equal(wide[:, :33], dense)
    assert bool((wide[:, 33:] == 5).all())
    assert not torch.equal(dense, torch.full_like(dense, 5.0))
    counts = torch.zeros(2, reference.NUM_MAGNITUDES + 8, dtype=torch.int64, device=DEVICE)
    gpu.cats_observe(z, "relu", offsets, slots, counts[:, : reference.NUM_MAGNITUDES])
    assert counts.sum(dim=1).tolist() == [4 * 33, 2 * 33]
