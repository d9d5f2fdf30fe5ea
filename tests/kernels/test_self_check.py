"""The start-up check passes for every backend that runs here, and fails for kernels and weights that are wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from caprese_kernels import reference
from caprese_kernels.backend import Backend, choose
from caprese_kernels.config import Method
from caprese_kernels.errors import CapreseError
from caprese_kernels.packed import PackedFF
from caprese_kernels.self_check import BATCHES, check_block, refuse

METHODS = {
    "griffin": Method("griffin", 0.5, (0,), 8),
    "plain": Method("griffin", 0.3, (0,), 0),
    "core and tail": Method("griffin", 0.5, (0,), 8, prior=0.5, core=0.6),
    "core alone": Method("griffin", 0.5, (0,), 8, prior=1.0, core=1.0),
    "cats": Method("cats", 0.5, (0,), 8),
}


def block(method: Method, dtype: torch.dtype = torch.float32, gated: bool = True, bias: bool = False) -> PackedFF:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    biases = {"up_bias": random(160), "down_bias": random(64)} if bias else {}
    if bias and gated:
        biases["gate_bias"] = random(160)
    low_rank = (random(64, method.rank), random(method.rank, 64)) if method.rank else (None, None)
    return PackedFF.pack(
        random(160, 64) if gated else None, random(160, 64), random(64, 160), "silu", *low_rank, **biases
    )


def divided(ff: PackedFF, method: Method) -> tuple[Any, Any]:
    """As `SparseFF` divides it."""
    kept = int(method.density * ff.num_neurons)
    size = kept if method.core == 1.0 else int(method.core * kept)
    if not size:
        return None, ff
    return ff.core(size), ff.without_low_rank() if size < kept else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_right_kernels_pass(kernel: Any, name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]
    for gated, bias in ((True, False), (True, True), (False, True)):
        ff = block(method, dtype, gated, bias)
        torch.set_default_dtype(dtype)  # as vLLM does while it loads a model
        try:
            found = check_block(choose(kernel, torch.device("cpu")), method, ff, *divided(ff, method))
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.passed, found
        refuse(found, kernel, 0)


def wrong_rows(ff: PackedFF) -> PackedFF:
    return replace(ff, down_plus=ff.down_plus.roll(1, 0))


def no_low_rank(ff: PackedFF) -> PackedFF:
    return replace(
        ff, down_plus=torch.cat([ff.down_plus[: ff.num_neurons], torch.zeros_like(ff.down_plus[ff.num_neurons :])])
    )


def not_finite(ff: PackedFF) -> PackedFF:
    down = ff.down_plus.clone()
    down[3, 3] = torch.nan
    return replace(ff, down_plus=down)


def changed(**functions: Any) -> Backend:
    """The reference with other functions in place of some."""
    kernels: Backend = SimpleNamespace(**{**vars(reference), **functions})  # type: ignore[assignment]
    return kernels


@pytest.mark.parametrize("harm", [wrong_rows, no_low_rank, not_finite])
@pytest.mark.parametrize("name", ["griffin", "cats", "core and tail", "core alone"])
def test_wrong_kernels_are_refused(name: str, harm: Any) -> None:
    """Kernels that compute something else, with the weights of this block."""
    method = METHODS[name]
    ff = block(method)

    def spoiled(function: Any) -> Any:
        def call(x: Any, part: Any, *rest: Any, **options: Any) -> Any:
            whole = harm(ff)
            if isinstance(part, PackedFF):
                part = whole if part.rank == whole.rank else whole.without_low_rank()
            else:
                part = whole.core(part.num_neurons)
            return function(x, part, *rest, **options)

        return call

    names = ("griffin_ff", "core_ff", "cats_ff", "dense_ff")
    kernels = changed(**{each: spoiled(getattr(reference, each)) for each in names})
    found = check_block(kernels, method, ff, *divided(ff, method))
    assert not found.passed
    with pytest.raises(CapreseError, match=r"layer 7: expected the FF block's output within .*caprese doctor"):
        refuse(found, "cpu", 7)


def test_one_wrong_neuron_of_many_is_noticed() -> None:
    """The kept neurons are those of the slot: exchanging two slots' selections is an error of its own size."""
    method = METHODS["griffin"]
    ff = block(method)

    def exchanged(x: Any, part: Any, keep: Any, slots: Any, row_plan: Any = None) -> Any:
        return reference.griffin_ff(x, part, keep, len(keep) - 1 - slots)

    kernels = changed(griffin_ff=exchanged)
    assert not check_block(kernels, method, ff, *divided(ff, method)).passed


@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("function", ["griffin_ff", "cats_ff", "dense_ff"])
def test_one_wrong_batch_size_is_noticed(function: str, tokens: int) -> None:
    """Kernels take other code for other numbers of tokens: a fault in one of them does not pass."""
    method = METHODS["cats" if function == "cats_ff" else "griffin"]
    ff = block(method)
    right = getattr(reference, function)

    def wrong(x: Any, *rest: Any, **options: Any) -> Any:
        return right(1.1 * x if len(x) == tokens else x, *rest, **options)

    found = check_block(changed(**{function: wrong}), method, ff, *divided(ff, method))
    assert not found.passed, found


def no_first_token(z: Any, offsets: Any, *rest: Any) -> None:
    reference.griffin_observe(z, offsets + torch.tensor([1, 0]), *rest)


def uncounted(gate: Any, activation: str, offsets: Any, *rest: Any) -> None:
    reference.cats_observe(gate, activation, offsets + torch.tensor([1, 0]), *rest)


WRONG_SELECTIONS: dict[str, Any] = {
    "griffin_observe": no_first_token,
    "griffin_select": lambda statistic, k: reference.griffin_select(-statistic, k),
    "cats_observe": uncounted,
    "cats_threshold": lambda histogram, density: 1.1 * reference.cats_threshold(histogram, density),
}


@pytest.mark.parametrize("function", WRONG_SELECTIONS)
def test_wrong_statistics_are_refused(function: str) -> None:
    method = METHODS[function.partition("_")[0]]
    ff = block(method)
    found = check_block(changed(**{function: WRONG_SELECTIONS[function]}), method, ff, *divided(ff, method))
    assert max(found.sparse, found.dense) <= found.tolerance
    assert not found.passed
    with pytest.raises(CapreseError, match="for the statistic"):
        refuse(found, "cpu", 0)
