"""Means, spreads and fits: what the numbers of several seeds come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Two-sided 95% quantiles of Student's t by degrees of freedom (any table of it has them).
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
NEARLY = 1e-9  # share by which rounding may carry compute beyond what was measured


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
    """loss = scale * compute ** -exponent, by least squares between their logarithms, with a scale
    for each seed: no loss that is left with endless compute. scale: the seeds' geometric mean,
    each seed as often as it has points. exponent_error: its standard error, from what the points
    miss the lines by; scatter: the standard deviation of that, in logarithms. None where no point
    is left over. centre: the geometric mean of the compute, between `lowest` and `highest`.
    of_seeds: each seed's scale, as a multiple of `scale`."""

    scale: float
    exponent: float
    exponent_error: float | None
    scatter: float | None
    points: int
    centre: float
    lowest: float
    highest: float
    of_seeds: dict[int, float]

    @classmethod
    def of(
        cls, compute: Sequence[float], losses: Sequence[float], seeds: Sequence[int]
    ) -> PowerLaw | None:
        """None where no seed has two different amounts of compute."""
        if len(set(zip(compute, seeds, strict=True))) == len(set(seeds)):
            return None
        x, y, of_seed = np.log(compute), np.log(losses), np.asarray(seeds)
        x_centred, y_centred = _apart_from_seeds(x, of_seed), _apart_from_seeds(y, of_seed)
        square = float((x_centred**2).sum())
        slope = float((x_centred * y_centred).sum()) / square
        error = scatter = None
        if left := len(x) - len(set(seeds)) - 1:
            missed = y_centred - slope * x_centred
            scatter = math.sqrt(float((missed**2).sum()) / left)
            error = scatter / math.sqrt(square)
        scale = math.exp(float(y.mean()) - slope * float(x.mean()))
        away = y - math.log(scale) - slope * x
        of_seeds = {
            seed: math.exp(float(away[of_seed == seed].mean())) for seed in sorted(set(seeds))
        }
        ends = float(min(compute)), float(max(compute))
        centre = math.exp(float(x.mean()))
        return cls(scale, -slope, error, scatter, len(x), centre, *ends, of_seeds)

    def at(self, compute: float) -> float:
        """The loss that it says."""
        return self.scale * compute**-self.exponent

    def compute_for(self, loss: float) -> tuple[float, float | None] | None:
        """The compute at which it says this loss, and the standard error of that as a share of it,
        for these seeds (None where no point was left over). None outside of the compute that it was
        fitted to."""
        compute = (self.scale / loss) ** (1 / self.exponent)
        if not self.lowest * (1 - NEARLY) <= compute <= self.highest * (1 + NEARLY):
            return None
        if self.scatter is None or not self.exponent_error:
            return compute, None
        # scatter² (1/n + (x - centre)² / sum of squares), with the sum from the exponent's error.
        away = math.log(compute / self.centre) * self.exponent_error
        missed = math.hypot(self.scatter / math.sqrt(self.points), away)
        return compute, missed / self.exponent

    def compute_beside(self, first: PowerLaw, loss: float) -> Spread | None:
        """The logarithm of the compute for a loss as a multiple of what `first` says, over the
        seeds that both have. The loss is each seed's own: `loss` by so much more or less as the
        seed's scale is in `first`, so that luck that a seed has with both is not in the spread.
        None where `loss` is outside of what was measured of one of them."""
        here, there = self.compute_for(loss), first.compute_for(loss)
        both = [seed for seed in self.of_seeds if seed in first.of_seeds]
        if here is None or there is None or not both:
            return None
        return Spread.of(
            [
                math.log(here[0] / there[0])
                + math.log(self.of_seeds[seed] / first.of_seeds[seed]) / self.exponent
                for seed in both
            ]
        )


def _apart_from_seeds(values: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Less the mean of their seed."""
    means = {seed: values[seeds == seed].mean() for seed in set(seeds.tolist())}
    return values - np.array([means[seed] for seed in seeds.tolist()])
