"""The numbers of one optimizer step, on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class StepResult:
    """What one optimizer step reports. Its numbers may be read while the next step runs: who reads
    one waits until the device has come that far.

    skipped: the weights were left alone. Where there is no `usual_loss`, DeepSpeed did so since the
        gradients were not finite: an overflow of fp16, after which the loss scale is lowered, or
        with any other precision a run gone wrong.
    usual_loss: what the loss was too far above for an update (`megalong.training.loss_spikes`);
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
