"""The closed form of eq. 7: reduced-rank ridge regression from moments (pure functions, float64).

With X [n, D] the FF inputs, E [n, D] the errors, S = X'X + ridge * mean(diag(X'X)) I and B = S^-1 X'E,

    min over rank r of ||E - X L R||^2 + ridge * mean(diag(X'X)) ||L R||^2

is reached by L R = B V V', V [D, r] the top r eigenvectors of (X'E)' S^-1 (X'E) = B' S B: the
objective is ||S^(1/2) (L R - B)||^2 plus a constant, and V holds the right singular vectors of S^(1/2) B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .moments import Moments

RIDGES = tuple(10.0**i for i in range(-6, 3))


@dataclass(frozen=True)
class Solution:
    """One layer's L [D, r], R [r, D] in the adapter's dtype, and what they do to held-out samples.

    error_before  ||E||^2 / ||FF||^2          error_after  ||E - X L R||^2 / ||FF||^2
    remaining     ||E - X L R||^2 / ||E||^2   remaining_fit  the same on the samples fitted
    """

    left: Tensor
    right: Tensor
    ridge: float | None  # None: not of the closed form
    error_before: float
    error_after: float
    remaining: float
    remaining_fit: float


def reduced_rank(moments: Moments, rank: int, ridge: float) -> tuple[Tensor, Tensor] | None:
    """The optimal L [D, r], R [r, D] (R's rows orthonormal); None where S is not positive definite.

    S = C C' (Cholesky), H = C^-1 X'E, so that H'H = (X'E)' S^-1 (X'E) and B V = C'^-1 H V.
    """
    s = moments.xx.clone()
    s.diagonal().add_(ridge * moments.xx.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(s)
    if int(info) > 0:
        return None
    half = torch.linalg.solve_triangular(factor, moments.xe, upper=False)
    v = torch.linalg.eigh(half.t() @ half).eigenvectors[:, -rank:].flip(1)  # largest first
    return torch.linalg.solve_triangular(factor.t(), half @ v, upper=True), v.t()


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ||L_k|| = ||R_k|| for each of the r pairs, so that neither leaves float16's range."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 0.0)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return left * scale, right * inverse[:, None]


def shrinkage(held_out: Moments, left: Tensor, right: Tensor) -> float:
    """The factor c in [0, 1] with the least ||E - c X L R||^2: tr(R' L' X'E) / ||X L R||^2, within that range."""
    cross, square = map(float, held_out.products(left, right))
    return min(max(ratio(cross, square), 0.0), 1.0)


@dataclass(frozen=True)
class _Candidate:
    """L and R for one ridge, rounded to the adapter's dtype, and their held-out error ||E - X L R||^2."""

    ridge: float
    left: Tensor
    right: Tensor
    error: float


def _candidate(
    fit: Moments, held_out: Moments, rank: int, dtype: torch.dtype, ridge: float, shrink: bool = False
) -> _Candidate:
    depth = len(fit.xx)
    nothing = (fit.xx.new_zeros(depth, rank), fit.xx.new_zeros(rank, depth))
    left, right = balance(*(reduced_rank(fit, rank, ridge) or nothing))
    if shrink:
        root = shrinkage(held_out, left, right) ** 0.5
        left, right = root * left, root * right
    left, right = left.to(dtype).double(), right.to(dtype).double()
    return _Candidate(ridge, left, right, held_out.error(left, right))


def solve(fit: Moments, held_out: Moments, rank: int, dtype: torch.dtype) -> Solution:
    """L and R of one layer: the ridge is the one of RIDGES with the least held-out error.

    Where all of them leave more than no L and R would, as for few rows, L R is shrunk by a factor (`shrinkage`): the
    ridge is then the one with the least error after that. So the held-out error is never above ||E||^2.
    Errors are those of L and R as stored, rounded to `dtype`. No positive definite S (X = 0) gives L = R = 0.
    """
    best = min((_candidate(fit, held_out, rank, dtype, ridge) for ridge in RIDGES), key=lambda each: each.error)
    whole = float(held_out.ee)
    if best.error > whole:
        shrunk = (_candidate(fit, held_out, rank, dtype, ridge, shrink=True) for ridge in RIDGES)
        best = min(shrunk, key=lambda each: each.error)
    if best.error > whole:  # by rounding to `dtype`
        best = replace(best, error=whole, left=torch.zeros_like(best.left), right=torch.zeros_like(best.right))
    error, ridge, left, right = best.error, best.ridge, best.left, best.right
    return Solution(
        left.to(dtype),
        right.to(dtype),
        ridge,
        error_before=ratio(float(held_out.ee), float(held_out.yy)),
        error_after=ratio(error, float(held_out.yy)),
        remaining=ratio(error, float(held_out.ee)),
        remaining_fit=ratio(fit.error(left, right), float(fit.ee)),
    )


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole > 0 else 0.0
