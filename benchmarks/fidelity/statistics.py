"""Means over seeds with their confidence, and which recipes no other beats. Loads no torch."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""0.975 quantiles of Student's t for 1 to 10 degrees of freedom; beyond, 1.96 would be 11% too small at most."""


class Interval(NamedTuple):
    """A mean and half the width of its 95% confidence interval over seeds."""

    mean: float
    half_width: float
    """nan with one seed: nothing is known."""
    num_seeds: int


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, one a seed."""
    mean, number = statistics.fmean(values), len(values)
    if number == 1:
        return Interval(mean, math.nan, 1)
    quantile = T_95[min(number - 1, len(T_95)) - 1]
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(number), number)


def paired(values: dict[int, float], references: dict[int, float]) -> Interval | None:
    """Of the differences at the seeds that both have; None without one."""
    seeds = sorted(values.keys() & references.keys())
    return interval([values[seed] - references[seed] for seed in seeds]) if seeds else None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other equals or beats in both coordinates while being better in one; less is better.

    Of equal points the first counts.
    """
    order = sorted(range(len(points)), key=lambda place: points[place])
    best, front = math.inf, []
    for place in order:
        if points[place][1] < best:
            best = points[place][1]
            front.append(place)
    return front
