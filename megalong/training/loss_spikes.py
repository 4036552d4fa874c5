"""Batches whose loss is far above the usual: their updates are left out."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable


class LossSpikes:
    """The losses of the last steps, and which new one is a spike: one above `factor` times their
    median.

    The losses of spikes are among them, so that a loss that stays high is the usual one after half
    a window. Until half a window is full, none is a spike. One that is not finite never is: that is
    a run gone wrong. One of 0, of a step with nothing to predict, says nothing of the usual one.
    """

    def __init__(self, factor: float, window: int, losses: Iterable[float] = ()):
        """window: of how many losses the median is. losses: those before, the oldest first."""
        self.factor, self.window = factor, window
        self.losses = deque(losses, window)

    def usual_loss(self, loss: float) -> float | None:
        """Take the loss of a step in, in nats. Returns the median that it is too far above, or None
        where it is no spike."""
        median = statistics.median(self.losses) if 2 * len(self.losses) >= self.window else math.inf
        if loss:
            self.losses.append(loss)
        return median if math.isfinite(loss) and loss > self.factor * median else None
