"""Statistics of the accuracy benchmarks, against values worked out by hand or by trying all cases."""

from itertools import combinations
from statistics import stdev

import pytest

from caprese_bench.results.stats import mcnemar, paired_interval, pass_at_k, sample_deviation, standard_error
from caprese_serve.demo.results import Score


def test_pass_at_k() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)  # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
    assert pass_at_k(100, 1, 100) == 1.0
    assert pass_at_k(100, 0, 100) == 0.0
    for correct in range(7):
        for k in range(1, 7):
            drawn = list(combinations([True] * correct + [False] * (6 - correct), k))
            assert pass_at_k(6, correct, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))


def test_mcnemar() -> None:
    scores, full = [1.0] + 8 * [0.0] + 5 * [1.0], [0.0] + 8 * [1.0] + 5 * [1.0]
    assert mcnemar(scores, full) == (1, 8, pytest.approx(2 * (1 + 9) / 2**9))  # 2 P(Binomial(9, 1/2) <= 1)
    assert mcnemar(full, scores) == (8, 1, pytest.approx(2 * (1 + 9) / 2**9))
    assert mcnemar(full, full) == (0, 0, 1.0)
    assert mcnemar([1.0] * 3, [0.0] * 3) == (3, 0, pytest.approx(0.25))


def test_paired_interval() -> None:
    # The mean of four drawn from 1, 0, 0, 0 is Binomial(4, 1/4) / 4: 0 has 32%, and up to 2/4 hold 95%, to 3/4 99.6%.
    assert paired_interval([1.0, 0.0, 0.0, 0.0], [0.0] * 4) == (0.25, 0.0, 0.75)
    assert paired_interval([0.0] * 4, [1.0, 0.0, 0.0, 0.0]) == (-0.25, -0.75, 0.0)
    assert paired_interval([0.5, 1.0], [0.25, 0.75]) == (0.25, 0.25, 0.25), "equal differences leave no doubt"
    # Many problems: mean plus and minus 1.96 standard errors, here of 0.6 of 400 differing by 1.
    centre, low, high = paired_interval([1.0] * 240 + [0.0] * 160, [0.0] * 400)
    assert (centre, low, high) == (0.6, pytest.approx(0.552, abs=0.005), pytest.approx(0.648, abs=0.005))
    assert paired_interval([1.0] * 9 + [0.0], [0.5] * 10) == paired_interval([1.0] * 9 + [0.0], [0.5] * 10)


def test_errors_and_deviations() -> None:
    marks = [True] * 9 + [False]
    assert standard_error([float(mark) for mark in marks]) == pytest.approx(Score.of(marks).stderr)
    assert standard_error([0.25, 0.75]) == pytest.approx((2 * 0.25**2) ** 0.5 / 2)
    assert sample_deviation([1.0, 3.0]) == pytest.approx(2**0.5)
    assert sample_deviation([0.3, 0.35, 0.25, 0.3]) == pytest.approx(stdev([0.3, 0.35, 0.25, 0.3]))
    assert sample_deviation([1.0]) is None
