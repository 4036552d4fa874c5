"""Means, spreads and fits: what the numbers of several seeds come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Of `count` values the mean and the sample standard deviation (divided by count - 1); None of
    a single one."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """values: one or more."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, len(values))


class PowerLaw(NamedTuple):
    """loss = scale * compute ** -exponent, by least squares between their logarithms: no loss that
    is left with endless compute. exponent_error: its standard error, from what the points miss the
    line by; scatter: the standard deviation of that, in logarithms. None of two points."""

    scale: float
    exponent: float
    exponent_error: float | None
    scatter: float | None
    points: int

    @classmethod
    def of(cls, compute: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
        """None where there are not two different amounts of compute."""
        x, y = np.log(compute), np.log(losses)
        if len(set(compute)) < 2:
            return None
        centred = x - x.mean()
        square = float((centred**2).sum())
        slope = float((centred * y).sum()) / square
        missed = y - y.mean() - slope * centred
        error = scatter = None
        if len(x) > 2:
            scatter = math.sqrt(float((missed**2).sum()) / (len(x) - 2))
            error = scatter / math.sqrt(square)
        scale = math.exp(float(y.mean()) - slope * float(x.mean()))
        return cls(scale, -slope, error, scatter, len(x))

    def at(self, compute: float) -> float:
        """The loss that it says."""
        return self.scale * compute**-self.exponent

    def compute_for(self, loss: float) -> float:
        """The compute at which it says this loss."""
        return (self.scale / loss) ** (1 / self.exponent)
