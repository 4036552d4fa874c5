"""From the token losses of a micro batch to what is minimised, and to what is reported."""

from __future__ import annotations

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
    """The same where `megalong.model.output.NextTokens` were asked for: a loss, and the ids,
    int64 (b,), -1 where another rank has the position."""
    losses, tokens = results
    return losses.float().sum(), tokens[:, 0].long()


def held_out_losses(losses: torch.Tensor, mask: torch.Tensor, source: None):
    """The same of held-out batches: a loss, and the token losses, whether the labels are the
    likeliest tokens where that is beside the losses, and the mask."""
    losses, likeliest = (losses, None) if losses.dim() == 2 else (losses[0], losses[1] > 0)
    losses = losses.float() * mask
    return losses.sum(), (losses, likeliest, mask)
