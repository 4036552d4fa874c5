"""The output layer that makes losses of hidden states, and never logits; and what z-loss wants of
logits where there are some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megalong.config import Config
from megalong.model.chunked.cross_entropy import (
    likeliest,
    linear_cross_entropy,
    linear_is_likeliest,
    places,
)
from megalong.model.chunked.rows import TensorRanks, wide_product
from megalong.model.layer_spec import LayerNorm, RMSNorm
from megalong.model.tiled_layer import tensor_ranks
from megalong.parallel.mesh import Mesh

# At a time, where --loss-chunk-size is not given: up to 1 GiB in float32. Fewer rows would have the
# weight's gradient, which every chunk adds to, cost more than the product that it comes from.
LOGITS, ROWS = 2**28, 4096


def avoid_logits(model: GPTModel, config: Config, mesh: Mesh, used_rows: int) -> None:
    """Have the model of the last stage make losses in chunks of rows, and its final norm, if that
    is ours, work in tiles of rows."""
    ranks = tensor_ranks(config, mesh)
    batch = config.training.micro_batch_size
    chunk_size = max(tokens_of_a_chunk(config, model.vocab_size) // batch, 1)
    model.output_layer = LossLayer(model.output_layer.weight, chunk_size, ranks, used_rows)
    if isinstance(model.decoder.final_layernorm, LayerNorm | RMSNorm):
        model.decoder.final_layernorm.tile_size = max(config.memory.tile_size // batch, 1)


def tokens_of_a_chunk(config: Config, vocabulary: int) -> int:
    """Return how many tokens' logits exist at a time. vocabulary: rows of the embedding."""
    ranks = config.parallel.tensor_model_parallel_size
    return config.memory.loss_chunk_size or min(ROWS, max(LOGITS * ranks // vocabulary, 1))


@dataclass(frozen=True)
class NextTokens:
    """The tokens that follow positions of sequences, asked of a model beside its token losses.

    To draw from softmax(logits / temperature) is to take the largest of logits / temperature +
    noise, with Gumbel's noise (Maddison et al., arXiv 1411.0030). The noise hangs on a seed and a
    token alone, so that ranks with slices of the vocabulary draw what one process draws.

    rows: for each sequence of the micro batch the position, counted in this rank's slice of the
        sequence, whose next token is wanted; None where another rank has it.
    temperature: 0 takes the likeliest token. seeds: of the draws, one for each sequence.
    """

    rows: tuple[int | None, ...]
    temperature: float
    seeds: tuple[int, ...]

    def of_logits(
        self, logits_sbv: torch.Tensor, ranks: TensorRanks, used_rows: int
    ) -> torch.Tensor:
        """Return ids, int64 (b,), -1 where another rank has the position. logits: this
        tensor-parallel rank's slice of the vocabulary, which is filled up from used_rows on."""
        found = [(row, column) for column, row in enumerate(self.rows) if row is not None]
        rows = [logits_sbv[row, column] for row, column in found]
        return self._drawn(rows, logits_sbv, ranks, used_rows)

    def of_hidden(
        self, hidden_lbh: torch.Tensor, weight_vh: torch.Tensor, ranks: TensorRanks, used_rows: int
    ) -> torch.Tensor:
        """Return the same of the logits hidden @ weight.T, of which only these rows are made.
        hidden: this tensor-parallel rank's own rows."""
        rows, own = [], len(hidden_lbh)
        for column, row in enumerate(self.rows):
            if row is not None:
                share, place = divmod(row, own)
                x_sh = ranks.enter(hidden_lbh[place : place + 1, column])
                rows.append(wide_product(x_sh[share][None], weight_vh.T)[0])
        return self._drawn(rows, hidden_lbh, ranks, used_rows)

    def _drawn(
        self, rows_v: list[torch.Tensor], like: torch.Tensor, ranks: TensorRanks, used_rows: int
    ) -> torch.Tensor:
        tokens_b = torch.full((len(self.rows),), -1, dtype=torch.int64, device=like.device)
        if not rows_v:
            return tokens_b
        logits_nv = torch.stack(rows_v).float()
        here = [column for column, row in enumerate(self.rows) if row is not None]
        if self.temperature > 0:
            seeds = [self.seeds[column] for column in here]
            noise_nv = torch.stack([_noise(seed, used_rows) for seed in seeds])
            first = ranks.rank * logits_nv.shape[1]
            noise_nv = noise_nv[:, first : first + logits_nv.shape[1]].to(like.device)
            logits_nv /= self.temperature
            logits_nv[:, : noise_nv.shape[1]] += noise_nv
        tokens_b[here] = likeliest(logits_nv, ranks, used_rows)
        return tokens_b


def _noise(seed: int, size: int) -> torch.Tensor:
    """Of Gumbel's distribution, float32 (size,), on the CPU: the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    exponential = torch.rand(size, generator=generator, dtype=torch.float64).clamp_(min=1e-300)
    return -(-exponential.log()).log().float()


class LossLayer(torch.nn.Module):
    """Megatron-core's output layer, but that it gives hidden states for logits, and makes losses of
    them where it is called with labels.

    chunk_size: rows of the sequence whose logits exist at a time. used_rows: of the vocabulary, the
    rest only fills it up.
    """

    def __init__(
        self, weight: torch.nn.Parameter | None, chunk_size: int, ranks: TensorRanks, used_rows: int
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
        """Return the token losses (s, b), or (2, s, b) with what is wanted beside them."""
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
    """Return the logit of each token's label, (s, b), float32; differentiable.

    logits: this rank's slice of the vocabulary, that the group shares.
    """
    size = logits_sbv.shape[-1]
    place, here = places(labels_sb.flatten(), size, group.rank() * size)
    rows = torch.arange(len(place), device=place.device)[:, None]
    # Indexed, since gather would keep the logits for its gradient.
    found = logits_sbv.flatten(0, 1)[rows, place].float() * here
    return reduce_from_tensor_model_parallel_region(found, group).view_as(labels_sb)
