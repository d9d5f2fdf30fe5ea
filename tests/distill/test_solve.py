"""The closed form against oracles without moments: least squares on X and E themselves, SVD, gradient descent."""

import pytest
import torch
from torch import Tensor

from caprese_distill.layer_wise.moments import Moments
from caprese_distill.layer_wise.solve import RIDGES, balance, reduced_rank, shrinkage, solve

DEPTH, ROWS = 24, 400


def draw(seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Correlated X [n, D] and E = X A + noise with A of slowly falling singular values, float64."""
    torch.manual_seed(seed)
    x = torch.randn(ROWS, DEPTH, dtype=torch.float64) @ torch.randn(DEPTH, DEPTH, dtype=torch.float64)
    a = torch.randn(DEPTH, DEPTH, dtype=torch.float64) * 0.7 ** torch.arange(DEPTH)
    return x, x @ a + noise * torch.randn(ROWS, DEPTH, dtype=torch.float64)


def exact_moments(x: Tensor, e: Tensor) -> Moments:
    return Moments(x.t() @ x, x.t() @ e, e.square().sum(), (3 * e).square().sum(), torch.tensor(len(x)))


def loss(x: Tensor, e: Tensor, left: Tensor, right: Tensor) -> float:
    return float((e - x @ left @ right).square().sum())


@pytest.mark.parametrize("rank", [1, 5, DEPTH])
def test_equals_the_svd_of_the_least_squares_fit(rank: int) -> None:
    """Classic reduced-rank regression: project the fitted values X B on their top r right singular vectors."""
    x, e = draw()
    b = torch.linalg.lstsq(x, e).solution
    v = torch.linalg.svd(x @ b).Vh[:rank].t()
    found = reduced_rank(exact_moments(x, e), rank, 0.0)
    assert found is not None
    torch.testing.assert_close(found[0] @ found[1], b @ v @ v.t(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
def test_ridge_equals_least_squares_on_augmented_rows(ridge: float) -> None:
    """A ridge is D more rows sqrt(ridge * mean diag) I with no error: the same oracle, on those rows."""
    x, e = draw()
    extra = (ridge * (x.t() @ x).diagonal().mean()).sqrt() * torch.eye(DEPTH, dtype=x.dtype)
    x_more, e_more = torch.cat([x, extra]), torch.cat([e, torch.zeros(DEPTH, DEPTH, dtype=x.dtype)])
    b = torch.linalg.lstsq(x_more, e_more).solution
    v = torch.linalg.svd(x_more @ b).Vh[:4].t()
    found = reduced_rank(exact_moments(x, e), 4, ridge)
    assert found is not None
    torch.testing.assert_close(found[0] @ found[1], b @ v @ v.t(), rtol=1e-8, atol=1e-8)


def test_gradient_descent_never_gets_below() -> None:
    """Gradient descent from several starts nears the closed form's loss and never passes it."""
    x, e = draw()
    found = reduced_rank(exact_moments(x, e), 3, 0.0)
    assert found is not None
    best = loss(x, e, *found)
    reached = []
    for seed in range(3):
        torch.manual_seed(seed)
        left = (0.1 * torch.randn(DEPTH, 3, dtype=torch.float64)).requires_grad_()
        right = (0.1 * torch.randn(3, DEPTH, dtype=torch.float64)).requires_grad_()
        optimizer = torch.optim.LBFGS([left, right], max_iter=300, line_search_fn="strong_wolfe")

        def step(left: Tensor = left, right: Tensor = right, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = (e - x @ left @ right).square().sum()
            value.backward()
            return value

        optimizer.step(step)
        reached.append(loss(x, e, left.detach(), right.detach()))
    assert min(reached) >= best * (1 - 1e-9)
    assert min(reached) <= best * 1.01


def test_every_small_change_is_worse() -> None:
    x, e = draw()
    found = reduced_rank(exact_moments(x, e), 4, 0.0)
    assert found is not None
    best = loss(x, e, *found)
    for seed in range(20):
        torch.manual_seed(seed)
        changed = [t + 1e-3 * torch.randn_like(t) for t in found]
        assert loss(x, e, *changed) > best


def test_error_from_moments_is_the_error_of_the_rows() -> None:
    x, e = draw()
    left, right = torch.randn(DEPTH, 4, dtype=torch.float64), torch.randn(4, DEPTH, dtype=torch.float64)
    assert exact_moments(x, e).error(left, right) == pytest.approx(loss(x, e, left, right), rel=1e-10)


def test_solution_reports_held_out_errors_of_what_is_stored() -> None:
    """Noise-free linear error of rank 5: rank 5 removes it but for bfloat16's rounding of L and R."""
    torch.manual_seed(0)
    a = torch.randn(DEPTH, 5, dtype=torch.float64) @ torch.randn(5, DEPTH, dtype=torch.float64)
    x, x_held = torch.randn(2, ROWS, DEPTH, dtype=torch.float64)
    found = solve(exact_moments(x, x @ a), exact_moments(x_held, x_held @ a), 5, torch.bfloat16)
    assert found.left.dtype == found.right.dtype == torch.bfloat16
    e_held = x_held @ a
    expected = loss(x_held, e_held, found.left.double(), found.right.double()) / float(e_held.square().sum())
    assert found.remaining == pytest.approx(expected, rel=1e-6)
    assert 0 < found.remaining < 1e-4
    assert found.error_before == pytest.approx(1 / 9)
    assert found.error_after == pytest.approx(found.remaining / 9)


def test_ridge_is_chosen_by_held_out_error() -> None:
    """Fewer rows than D and much noise: the chosen ridge beats the smallest one on the rows held out."""
    x, e = draw(noise=20.0)
    few = slice(0, DEPTH - 4)
    fit, held = exact_moments(x[few], e[few]), exact_moments(x[200:], e[200:])
    found = solve(fit, held, 4, torch.float32)
    least = reduced_rank(fit, 4, 1e-6)
    assert least is not None
    assert found.ridge > 1e-6
    assert found.remaining < held.error(*least) / float(held.ee)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_held_out_error_never_grows(seed: int, dtype: torch.dtype) -> None:
    """Few noisy rows, whose fit at any ridge leaves more error than none: it is shrunk, at the worst to nothing."""
    x, e = draw(seed, noise=60.0)
    fit, held = exact_moments(x[:60], e[:60]), exact_moments(x[100:104], e[100:104])
    found = solve(fit, held, 4, dtype)
    plain = []
    for ridge in RIDGES:
        pair = reduced_rank(fit, 4, ridge)
        assert pair is not None
        plain.append(held.error(*pair) / float(held.ee))
    assert found.remaining <= min(1.0, *plain) * (1 + 1e-3)
    expected = loss(x[100:104], e[100:104], found.left.double(), found.right.double()) / float(held.ee)
    assert found.remaining == pytest.approx(expected, rel=1e-6)
    if min(plain) > 1:
        assert found.left.any() == (found.remaining < 1)


def test_shrinkage_is_the_best_factor() -> None:
    """Against a search; no factor below 0 or above 1."""
    x, e = draw(noise=20.0)
    pair = torch.randn(DEPTH, 3, dtype=torch.float64), torch.randn(3, DEPTH, dtype=torch.float64)
    held = exact_moments(x, e)
    for sign in (1.0, -1.0, 0.01):
        found = shrinkage(held, sign * pair[0], pair[1])
        factors = [step / 1000 for step in range(1001)]
        best = min(factors, key=lambda factor: loss(x, e, factor * sign * pair[0], pair[1]))
        assert found == pytest.approx(best, abs=1e-3)


def test_balanced_pairs_have_equal_norms_and_the_same_product() -> None:
    torch.manual_seed(0)
    left, right = 1e4 * torch.randn(DEPTH, 4, dtype=torch.float64), torch.randn(4, DEPTH, dtype=torch.float64)
    left[:, 2] = 0
    a, b = balance(left, right)
    torch.testing.assert_close(a @ b, left @ right)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1))


def test_no_error_gives_zero_adapters() -> None:
    x, e = draw()
    nothing = exact_moments(x, 0 * e)
    found = solve(nothing, nothing, 4, torch.float32)
    assert not found.left.any()
    assert not found.right.any()
    assert found.remaining == found.error_before == 0
