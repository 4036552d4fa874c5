"""The loss of a step: what is minimised, what is reported, and which losses are spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainingLoss:
    """What is made of the token losses of a micro batch: the loss to differentiate, and sums to
    report, which the ranks add up.

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
    """The same where `megalong.model.next_tokens.NextTokens` were asked for: a loss, and the ids,
    int64 (b,), -1 where another rank has the position."""
    losses, tokens = results
    return losses.float().sum(), tokens[:, 0].long()


def held_out_losses(losses: torch.Tensor, mask: torch.Tensor, source: None):
    """The same of held-out batches: a loss, and the token losses, whether the labels are the
    likeliest tokens where that is beside the losses, and the mask."""
    losses, likeliest = (losses, None) if losses.dim() == 2 else (losses[0], losses[1] > 0)
    losses = losses.float() * mask
    return losses.sum(), (losses, likeliest, mask)


class StepResult:
    """What one optimizer step reports. Its numbers may be read while the next step runs: who reads
    one waits until the device has come that far.

    skipped: the weights were left alone. Where there is no `usual_loss`, DeepSpeed did so since the
        gradients were not finite: an overflow of fp16, after which the loss scale is lowered, or
        with any other precision a run gone wrong.
    usual_loss: what the loss was too far above for an update (`megalong.training.training_loss`);
        None: it was not.
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
        """Of each source, by name, the sum of the losses of its predictions in the global batch, in
        nats, and how many these were; empty where there is one source."""
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
