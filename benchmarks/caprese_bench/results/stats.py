"""Means with their errors, paired differences, and Pass@K. A score is one number from 0 to 1 for each problem."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from statistics import quantiles

import numpy as np

CONFIDENCE, RESAMPLES, SEED = 0.95, 9999, 0


def mean(scores: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(scores) / len(scores)


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean: sqrt(sum (x - mean)^2) / n; for scores of 0 and 1 the binomial sqrt(p (1 - p) / n)."""
    centre = mean(scores)
    return sqrt(sum((score - centre) ** 2 for score in scores)) / len(scores)


def iqr(values: Sequence[float]) -> float:
    """Interquartile range, in the unit of `values`; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def sample_deviation(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1, as in the paper's table 2; None for a single value."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def paired_interval(scores: Sequence[float], full: Sequence[float]) -> tuple[float, float, float]:
    """The mean difference scores - full on the same problems, and the ends of its 95% interval.

    The interval is a percentile bootstrap over problems, with the same resamples in every run. If all differences are
    equal it is that one point.
    """
    from scipy.stats import bootstrap

    differences = np.subtract(scores, full)
    centre = float(differences.mean())
    if np.ptp(differences) == 0:
        return centre, centre, centre
    found = bootstrap(
        (differences,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return centre, float(found.low), float(found.high)


def mcnemar(scores: Sequence[float], full: Sequence[float]) -> tuple[int, int, float]:
    """McNemar's test: (problems only `scores` got right, problems only `full` got right, exact two-sided p).

    Under the null hypothesis both are equally likely, so the smaller number is Binomial(sum of both, 1/2).
    """
    from scipy.stats import binomtest

    won = sum(1 for a, b in zip(scores, full, strict=True) if a > b)
    lost = sum(1 for a, b in zip(scores, full, strict=True) if a < b)
    return won, lost, float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Pass@K, the chance that k of n samples, drawn without replacement, include one of the c correct ones,
    1 - C(n - c, k) / C(n, k)."""
    return 1 - comb(samples - correct, k) / comb(samples, k)
