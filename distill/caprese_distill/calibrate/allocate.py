"""A density for each layer: the bytes of the uniform density, where dropping neurons hurts least.

A layer of k kept neurons has the estimated harm H_i(k), in nats a token (`sensitivity`). Layers have equal neurons, so
a neuron costs the same bytes everywhere, and the choice is

    minimize sum_i H_i(k_i)   subject to   sum_i k_i = n floor(d F)

over n layers of F neurons at density d. On the lower convex hull of each H_i, its segments in the order of steepness
(harm spared for a neuron) are the exact solution; the last one may be taken in part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from caprese_kernels.config import Method
from caprese_kernels.reference import griffin_count

UNIT = 64  # neurons: where the model's sizes allow, every k stays a multiple of it, which matrix products want
FINEST = 32  # parts that a unit cuts F into, at least, so that small models have a choice
BELOW, ABOVE = (Fraction(1, 2), Fraction(3, 4), Fraction(1)), (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))


@dataclass(frozen=True)
class Segment:
    """A straight part of a layer's hull: `neurons` more, each of which spares `slope` of harm."""

    slope: float
    layer: int
    start: int
    neurons: int


def unit_of(density: float, neurons: int) -> int:
    """The neurons that layers exchange: a power of 2 up to UNIT and F / FINEST that divides F and floor(d F)."""
    unit = math.gcd(UNIT, neurons, griffin_count(density, neurons))
    while unit > 1 and unit * FINEST > neurons:
        unit //= 2
    return unit


def grid(density: float, neurons: int) -> list[int]:
    """The k whose harm is measured, ascending: d / 2, 3 d / 4, d, and three more between d and 1; of F neurons.

    Multiples of `unit_of`; at d = 0.5 they are .25, .375, .5, .625, .75 and .875 of F.
    """
    k, unit = griffin_count(density, neurons), unit_of(density, neurons)
    exact = [k * part for part in BELOW] + [k + (neurons - k) * part for part in ABOVE]
    return sorted({max(unit, round(count / unit) * unit) for count in exact} - {neurons})


def lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those of the points (k, harm), ascending in k, between which straight lines are the largest convex function
    below all points."""
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def allocate(harms: Mapping[int, Mapping[int, float]], budget: int, unit: int) -> dict[int, int]:
    """The neurons of each layer, `budget` in sum, from the harm of each layer by k; k = F has harm 0.

    All k and the budget are multiples of `unit`. Each layer starts at its smallest k; of equal slopes the lower layer
    comes first.
    """
    hulls = {i: lower_hull(sorted(points.items())) for i, points in harms.items()}
    chosen = {i: hull[0][0] for i, hull in hulls.items()}
    left = budget - sum(chosen.values())
    segments = [Segment(_slope(a, b), i, a[0], b[0] - a[0]) for i, hull in hulls.items() for a, b in pairwise(hull)]
    for segment in sorted(segments, key=lambda s: (s.slope, s.layer, s.start)):
        taken = min(segment.neurons, left) // unit * unit
        chosen[segment.layer] += taken
        left -= taken
    assert left == 0, "the smallest k leave room, and all neurons are more than the budget"
    return chosen


def allocated(method: Method, harms: Mapping[int, Mapping[int, float]], neurons: int) -> Method:
    """`method` with densities for its layers that keep as many neurons in sum as its density in all of them."""
    budget = len(method.layers) * griffin_count(method.density, neurons)
    chosen = allocate(harms, budget, unit_of(method.density, neurons))
    return replace(method, densities=tuple(density_of(chosen[i], neurons) for i in method.layers))


def density_of(count: int, neurons: int) -> float:
    """d with floor(d F) = k: the division may round below k."""
    density = count / neurons
    return density if griffin_count(density, neurons) == count else math.nextafter(density, 1.0)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
