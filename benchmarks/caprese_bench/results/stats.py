"""Means with their errors, paired differences, and Pass@K. Scores are one number a problem, from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

import numpy as np

CONFIDENCE, RESAMPLES, SEED = 0.95, 9999, 0


def mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean over problems, sqrt(sum (x - mean)^2) / n: for scores of 0 and 1 the binomial sqrt(p (1 - p) / n)."""
    centre = mean(scores)
    return sqrt(sum((score - centre) ** 2 for score in scores)) / len(scores)


def sample_deviation(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1, as of the paper's table 2; None of a single value."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def paired_interval(scores: Sequence[float], full: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference scores - full on the same problems, and its 95% interval: a percentile bootstrap over problems.

    The resamples are the same in every run. Where all differences are equal the interval is that one point.
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
    """Problems only these answers got right, those only Full's did, and the exact two-sided p of such a split.

    McNemar's test: under the null hypothesis either is as likely, so that the smaller is Binomial(both, 1/2).
    """
    from scipy.stats import binomtest

    won = sum(1 for a, b in zip(scores, full, strict=True) if a > b)
    lost = sum(1 for a, b in zip(scores, full, strict=True) if a < b)
    return won, lost, float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k)."""
    return 1 - comb(samples - correct, k) / comb(samples, k)
