"""The output layer that makes losses of hidden states, and never logits; and what z-loss wants of
logits where there are some."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megalong.config import Config
from megalong.model.chunked.cross_entropy import places
from megalong.model.chunked.likeliest import linear_is_likeliest
from megalong.model.chunked.linear_cross_entropy import linear_cross_entropy
from megalong.model.chunked.tensor_ranks import TensorRanks
from megalong.model.next_tokens import NextTokens
from megalong.model.norms import LayerNorm, RMSNorm
from megalong.model.tiled_layer import tensor_ranks
from megalong.parallel.mesh import Mesh

# At a time, where --loss-chunk-size is not given: up to 1 GiB in float32. Fewer rows would have the
# weight's gradient, which every chunk adds to, cost more than the product that it comes from.
LOGITS, ROWS = 2**28, 4096


def avoid_logits(model: GPTModel, config: Config, mesh: Mesh, used_rows: int) -> None:
    """Have the model of the last stage make losses in chunks of rows, and its final norm, if that
    is ours, work in tiles of rows. used_rows: see LossLayer."""
    ranks = tensor_ranks(config, mesh)
    batch = config.training.micro_batch_size
    chunk_size = max(tokens_of_a_chunk(config, model.vocab_size) // batch, 1)
    model.output_layer = LossLayer(model.output_layer.weight, chunk_size, ranks, used_rows)
    if isinstance(model.decoder.final_layernorm, LayerNorm | RMSNorm):
        model.decoder.final_layernorm.tile_size = max(config.memory.tile_size // batch, 1)


def tokens_of_a_chunk(config: Config, vocabulary: int) -> int:
    """Whose logits exist at a time. vocabulary: rows of the embedding."""
    ranks = config.parallel.tensor_model_parallel_size
    return config.memory.loss_chunk_size or min(ROWS, max(LOGITS * ranks // vocabulary, 1))


class LossLayer(torch.nn.Module):
    """Stands where Megatron-core's output layer stood, whose weight it takes.

    Megatron-core asks its output layer for logits first and for losses of these then
    (`compute_language_model_loss`). This one gives the hidden states for logits, and makes losses
    of them where it is called with labels.

    chunk_size: rows of the sequence whose logits exist at a time. used_rows: of the vocabulary,
        those from there on only fill it up.
    """

    def __init__(
        self,
        weight: torch.nn.Parameter | None,
        chunk_size: int,
        ranks: TensorRanks,
        used_rows: int,
    ):
        """weight: None where it is the embedding's, and comes with every call."""
        super().__init__()
        self.register_parameter("weight", weight)
        self.chunk_size, self.ranks, self.used_rows = chunk_size, ranks, used_rows

    def __call__(
        self, hidden_sbh: torch.Tensor, labels_sb: torch.Tensor | None = None, **others: Any
    ) -> Any:
        """With labels, as any module is called; without, (hidden, None), for (logits, bias).

        Not by way of `forward`, whose hooks would have ZeRO 3 gather the weight for nothing.
        """
        if labels_sb is None:
            return hidden_sbh, None
        return super().__call__(hidden_sbh, labels_sb, **others)

    def forward(
        self,
        hidden_sbh: torch.Tensor,
        labels_sb: torch.Tensor,
        weight: torch.Tensor | None = None,
        beside: str | NextTokens | None = None,
    ) -> torch.Tensor:
        """Token losses, (s, b): see `chunked/linear_cross_entropy.py`; (2, s, b) with what
        `PipelineStage.forward` has beside them."""
        weight = self.weight if weight is None else weight
        chunks = {"chunk_size": self.chunk_size, "ranks": self.ranks}
        with_logsumexp = beside == "logsumexp"
        losses = linear_cross_entropy(
            hidden_sbh, weight, labels_sb, **chunks, with_logsumexp=with_logsumexp
        )
        if isinstance(beside, NextTokens):
            tokens_b = beside.of_hidden(hidden_sbh, weight, self.ranks, self.used_rows)
            return torch.stack((losses, tokens_b.to(losses.dtype).expand_as(losses)))
        if beside != "likeliest":
            return losses
        right_sb = linear_is_likeliest(
            hidden_sbh, weight, labels_sb, **chunks, used_rows=self.used_rows
        )
        return torch.stack((losses, right_sb.to(losses.dtype)))


def label_logits(
    logits_sbv: torch.Tensor, labels_sb: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """The logit of each token's label, (s, b), float32; differentiable.

    logits: this tensor-parallel rank's slice of the vocabulary. group: of the ranks that have it.
    """
    size = logits_sbv.shape[-1]
    place, here = places(labels_sb.flatten(), size, group.rank() * size)
    rows = torch.arange(len(place), device=place.device)[:, None]
    # Indexed, since gather would keep the logits for its gradient.
    found = logits_sbv.flatten(0, 1)[rows, place].float() * here
    return reduce_from_tensor_model_parallel_region(found, group).view_as(labels_sb)
