"""The numbers of a step: what is minimised, what is reported, loss spikes, and times."""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalong.data.batches import Batch


@dataclass(frozen=True)
class TrainingLoss:
    """From the token losses of a micro batch to the loss to differentiate, and to sums to report,
    which the ranks add up.

    scale: of the gradient. sources: of the training data. z_loss_coeff: 0, or what weighs the
    squares of the logsumexps, which the losses then have beside them.
    """

    scale: float | torch.Tensor
    sources: int
    z_loss_coeff: float

    @property
    def beside(self) -> str | None:
        """What the losses have to have beside them, of `PipelineStage.forward`."""
        return "logsumexp" if self.z_loss_coeff else None

    def __call__(
        self, losses: torch.Tensor, mask: torch.Tensor, source: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """losses: (b, s), or (2, b, s). Returns the loss, and the sums as `parts` takes them."""
        z_sum = None
        if self.z_loss_coeff:
            losses, logsumexp = losses
            z_sum = (logsumexp.float().square() * mask).sum()
        kept = losses.float() * mask
        loss_sum = kept.sum()
        loss = loss_sum if z_sum is None else loss_sum + self.z_loss_coeff * z_sum
        if self.sources == 1 and z_sum is None:
            return loss * self.scale, loss_sum.detach()
        sums = self.nothing(losses.device)
        if self.sources == 1:
            sums[0] = loss_sum.detach()
        else:
            of_rows = torch.stack(
                [kept.detach().sum(1, dtype=torch.float64), mask.sum(1, dtype=torch.float64)]
            )
            sums[:2].index_add_(1, source, of_rows)
        if z_sum is not None:
            sums[2, 0] = z_sum.detach()
        return loss * self.scale, sums

    def nothing(self, device: torch.device) -> torch.Tensor:
        """The sums of no losses."""
        if self.sources == 1 and not self.z_loss_coeff:
            return torch.zeros((), device=device)
        return torch.zeros(
            3 if self.z_loss_coeff else 2, self.sources, dtype=torch.float64, device=device
        )

    def parts(
        self, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Of sums: that of the losses; of several sources (2, sources) losses and predictions; and,
        with z-loss, that of the squares."""
        if sums.dim() == 0:
            return sums, None, None
        by_source = sums[:2] if self.sources > 1 else None
        return sums[0].sum(), by_source, sums[2, 0] if self.z_loss_coeff else None


def next_tokens(results: torch.Tensor, mask: torch.Tensor, source: None):
    """Take apart what `NextTokens` give: a loss, and the ids, int64 (b,), -1 where another rank has
    the position."""
    losses, tokens = results
    return losses.float().sum(), tokens[:, 0].long()


def held_out_losses(losses: torch.Tensor, mask: torch.Tensor, source: None):
    """Take apart what held-out batches give: a loss, and the token losses, whether the labels are
    the likeliest tokens (if asked), and the mask."""
    losses, likeliest = (losses, None) if losses.dim() == 2 else (losses[0], losses[1] > 0)
    losses = losses.float() * mask
    return losses.sum(), (losses, likeliest, mask)


class StepResult:
    """What one optimizer step reports; who reads a number waits until the device has come so far.

    skipped: the weights were left alone: the loss was too far above `usual_loss`, or, where that is
        None, the gradients were not finite: an overflow of fp16, or a run gone wrong.
    """

    def __init__(
        self,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float,
        skipped: bool,
        z_loss: torch.Tensor | None = None,
        sources: Sequence[str] = (),
        by_source: torch.Tensor | None = None,
        usual_loss: float | None = None,
    ):
        """loss, grad_norm, z_loss: scalars; by_source: sums of losses, and predictions, (2,
        sources); all copied to the host from now on, without waiting. sources: their names."""
        # With the optimizer on the host, the norm is there.
        norm = torch.as_tensor(grad_norm).to(loss.device, non_blocking=True)
        self._has_z_loss = z_loss is not None
        z_loss = torch.zeros_like(loss) if z_loss is None else z_loss
        numbers = torch.stack([loss.double(), norm.double(), z_loss.double()])
        if by_source is not None:
            numbers = torch.cat([numbers, by_source.flatten()])
        self.skipped, self.usual_loss, self._sources = skipped, usual_loss, sources
        self._host, self._arrived = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def loss(self) -> float:
        """The mean loss of a prediction over the global batch, in nats."""
        return self._read()[0]

    @property
    def grad_norm(self) -> float | None:
        """The L2 norm of the global gradient before clipping; None where the step was skipped."""
        return None if self.skipped else self._read()[1]

    @property
    def z_loss(self) -> float | None:
        """What --z-loss-coeff adds to the loss in what is minimised; None where it is off."""
        return self._read()[2] if self._has_z_loss else None

    @property
    def by_source(self) -> dict[str, tuple[float, float]]:
        """By source the sum of the losses of its predictions, in nats, and how many these were;
        empty where there is one source."""
        numbers = self._read()[3:]
        if not numbers:
            return {}
        count = len(self._sources)
        sums = zip(numbers[:count], numbers[count:], strict=True)
        return dict(zip(self._sources, sums, strict=True))

    def _read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class LossSpikes:
    """The losses of the last steps: a new one above `factor` times their median is a spike.

    The losses of spikes are among them, so that one that stays high becomes the usual one. Until
    half a window is full, none is a spike; one that is not finite never is. One of 0, of a step
    with nothing to predict, does not count.
    """

    def __init__(self, factor: float, window: int, losses: Iterable[float] = ()):
        """window: of how many losses the median is. losses: those before, the oldest first."""
        self.factor, self.window = factor, window
        self.losses = deque(losses, window)

    def usual_loss(self, loss: float) -> float | None:
        """Take a loss in. Returns the median that it is too far above; None: it is no spike."""
        median = statistics.median(self.losses) if 2 * len(self.losses) >= self.window else math.inf
        if loss:
            self.losses.append(loss)
        return median if math.isfinite(loss) and loss > self.factor * median else None


class Meter:
    """Measures the training on this rank. The clock runs all the time but in `pause`: a step's
    seconds hold whatever a GPU computes while the host is ahead of it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._save: tuple[float, float] | None = None  # begin, and seconds of standstill
        self.restart()

    def restart(self) -> None:
        """Forget what was measured so far."""
        self._steps, self._waited, self._paused = 0, 0.0, 0.0
        self._start = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; until one is there, the training waits for data."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - start
            yield batch

    def step(self) -> None:
        """One step is done."""
        self._steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is no training: a save, an evaluation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a checkpoint is saved, or copied to be written in the background."""
        begin = time.perf_counter()
        with self.pause():
            yield
        self._save = begin, time.perf_counter() - begin

    def take_save(self, durable_at: float | None) -> dict[str, float]:
        """Return the times of the last save, once, when it is on the disk. durable_at: of the last
        checkpoint, as `time.perf_counter()` has it."""
        if self._save is None or durable_at is None or durable_at < self._save[0]:
            return {}
        (begin, blocking), self._save = self._save, None
        return {"save_seconds": durable_at - begin, "save_blocking_seconds": blocking}

    def take(self) -> tuple[float, float]:
        """Return the mean seconds of a step since the last call, and the share spent waiting for
        data."""
        seconds = time.perf_counter() - self._start - self._paused
        result = seconds / self._steps, self._waited / seconds
        self.restart()
        return result

    def take_memory(self) -> dict[str, Any]:
        """Return the peak of this process's memory: on a GPU since the last call, on a CPU since
        the start, the resident set."""
        if self._device.type == "cuda":
            peaks = {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(self._device),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device),
            }
            torch.cuda.reset_peak_memory_stats(self._device)
            return peaks
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": resident * 1024}  # Linux counts in KiB
