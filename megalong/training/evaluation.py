"""Held-out loss: perplexity, bits per byte, and the loss against the position in the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megalong.data.batches import Batch
from megalong.evals.scores import PositionLosses, perplexity, position_edges
from megalong.parallel.mesh import Mesh
from megalong.training.engine import TrainingEngine


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses, in nats per token unless said otherwise.

    tokens: predictions that counted.
    bits_per_byte: total bits of all predictions / bytes of text that the predicted tokens stand
        for, so that tokenizers can be compared; end-of-document tokens cost bits and stand for
        no byte. None where no predicted token stands for any.
    loss_by_position: mean loss in each bucket of `position_edges`, so that one can see whether the
        model uses its context; None where a bucket held no prediction. Positions count from the
        beginning of the sequence, or of the document where these are kept apart.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None
    loss_by_position: list[float | None]

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def evaluate(
    engine: TrainingEngine,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    mesh: Mesh,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate on this rank's micro batches and reduce over all ranks: each gets the result.

    batches: every rank gives the same number of micro batches (see
        `megalong.data.batches.evaluation_batches`).
    token_bytes: UTF-8 bytes that each token id stands for, (vocab size,).
    on_batch: called after each micro batch, to show progress.
    """
    bytes_of_token = torch.as_tensor(token_bytes, dtype=torch.float64, device=mesh.device)
    losses_by_position = PositionLosses(position_edges(engine.seq_length), mesh.device)
    total_bytes = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    remaining = iter(batches)
    # As many at a time as fill the pipeline.
    while some := list(islice(remaining, mesh.pipeline_parallel_size)):
        # Stages before the last have no losses, and come here to pass activations on.
        for batch, (losses, mask) in zip(some, engine.token_losses(some), strict=False):
            places = batch["positions"] - batch.get("document_start", 0)
            losses_by_position.add(places, losses, mask)
            labels = batch["labels"].to(mesh.device, non_blocking=True)
            # Not labels[mask]: how many there are, the host would have to wait for.
            total_bytes += (bytes_of_token[labels.clamp(min=0)] * mask).sum()
        for _ in some:
            on_batch()
    for tensor in (losses_by_position.sums, losses_by_position.counts, total_bytes):
        mesh.sum_of_losses(tensor)
    bits, size = losses_by_position.total / math.log(2), total_bytes.item()
    return Evaluation(
        loss=losses_by_position.mean,
        tokens=losses_by_position.tokens,
        bits_per_byte=bits / size if size else None,
        loss_by_position=losses_by_position.by_position,
    )
