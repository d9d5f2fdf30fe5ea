"""One layer's selector: score, prior and core put together."""

import pytest
import torch
from torch import Tensor

from caprese_kernels import reference
from caprese_kernels.config import Method
from caprese_kernels.selection import LayerSelector

F = 40


def shares(seed: int) -> Tensor:
    prior = torch.rand(F, generator=torch.Generator().manual_seed(seed))
    return prior / prior.sum()


def activations(seed: int = 0, tokens: int = 9) -> Tensor:
    return torch.randn(tokens, F, generator=torch.Generator().manual_seed(seed))


def selector(**settings: float | str) -> LayerSelector:
    method = Method("griffin", 0.5, (0,), 0, **settings)  # type: ignore[arg-type]
    scale = torch.linspace(0.1, 3, F) if method.weighted else None
    return LayerSelector(method, F, scale, shares(1) if method.needs_prior else None)


def test_as_the_paper_has_it() -> None:
    z = activations()
    wanted = reference.griffin_select(reference.griffin_statistic(z), 20)
    assert torch.equal(selector().from_prompt(None, z), wanted)
    assert selector().core_size == 0
    assert not selector().core.any()


@pytest.mark.parametrize("settings", [{"core": 1.0}, {"prior": 1.0}, {"prior": 1.0, "core": 0.3}])
def test_a_selection_without_the_prompt(settings: dict[str, float]) -> None:
    """All core, or by the prior alone: the k neurons of largest prior, whatever the prompt."""
    wanted = reference.griffin_select(shares(1), 20)
    for seed in range(3):
        assert torch.equal(selector(**settings).from_prompt(None, activations(seed)), wanted)
    assert torch.equal(selector(**settings).core, wanted)


def test_core_tail_and_weights() -> None:
    made, z = selector(score="weighted", prior=0.25, core=0.8), activations()
    assert made.scale is not None
    s2 = ((z * made.scale) / (z * made.scale).norm(dim=1, keepdim=True)).square().sum(dim=0)
    core = reference.griffin_select(shares(1), 16)
    blend = 0.75 * s2 / s2.sum() + 0.25 * shares(1)
    wanted = core | reference.griffin_select(torch.where(core, -1.0, blend).clamp(min=0), 4)
    found = made.from_prompt(None, z)
    assert torch.equal(found, wanted)
    assert torch.equal(made.core, core)
    assert int(found.sum()) == 20


@pytest.mark.parametrize("settings", [{}, {"core": 0.5}, {"core": 1.0}, {"prior": 0.5, "core": 0.25}])
def test_the_core_last(settings: dict[str, float]) -> None:
    """Neurons in another order: the same are selected, also among equals."""
    made = selector(score="weighted", **settings)
    order = made.order()
    assert sorted(order.tolist()) == list(range(F))
    moved = made.permuted(order)
    assert moved.core.tolist() == [False] * (F - made.core_size) + [True] * made.core_size
    z = activations().round()  # zeros and equals
    assert torch.equal(moved.from_prompt(None, z[:, order]), made.from_prompt(None, z)[order])


def test_cats_scaled() -> None:
    method = Method("cats", 0.25, (0,), 0, "weighted")
    scale, g = torch.linspace(0.1, 3, F), activations()
    made = LayerSelector(method, F, scale)
    tau = made.from_prompt(g, g)
    assert tau == torch.quantile((g.abs() * scale).flatten(), 0.75)
    keep = made.keeps(tau.expand(9), g)
    assert torch.equal(keep, g.abs() * scale >= tau)
    assert 0.2 < keep.float().mean() < 0.3
