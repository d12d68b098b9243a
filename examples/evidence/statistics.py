"""Comparisons of paired figures, one pair a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of the two-sided t test
POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Paired t test of differences: their mean, its 95 % interval, p, and the mean difference that the test
    would have found with a probability of 80 %, were the differences' standard deviation what it is here."""

    mean: float
    low: float
    high: float
    p: float
    detectable: float


def paired(ours: Sequence[float], others: Sequence[float]) -> Paired:
    """Compare figures of the same seeds, at least three."""
    differences = np.subtract(ours, others)
    n, mean, deviation = len(differences), float(np.mean(differences)), float(np.std(differences, ddof=1))
    if deviation == 0:
        return Paired(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0)
    test = stats.ttest_1samp(differences, 0)
    interval = test.confidence_interval(1 - LEVEL)
    return Paired(mean, float(interval.low), float(interval.high), float(test.pvalue), effect(n) * deviation)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm, 1979), in the same order."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def effect(n: int) -> float:
    """The mean over standard deviation that a paired t test of `n` >= 3 differences finds with POWER."""
    critical = stats.t.ppf(1 - LEVEL / 2, n - 1)

    def missing(size: float) -> float:
        # The other side, found with the wrong sign, adds less than 1e-4.
        return float(stats.nct.sf(critical, n - 1, size * math.sqrt(n))) - POWER

    return float(optimize.brentq(missing, 0.1, 5))
