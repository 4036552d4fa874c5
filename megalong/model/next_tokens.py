"""The token that follows a position of a sequence: the likeliest, or one that is drawn.

To draw from softmax(logits / temperature) is to take the largest of logits / temperature + noise,
with Gumbel's noise (Maddison et al., arXiv 1411.0030). The noise hangs on a seed and a token alone,
so that ranks with slices of the vocabulary draw what one process draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalong.model.chunked.likeliest import likeliest
from megalong.model.chunked.rows import wide_product
from megalong.model.chunked.tensor_ranks import TensorRanks


@dataclass(frozen=True)
class NextTokens:
    """What is asked of a model beside its token losses (`PipelineStage.forward`).

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
        """Ids, int64 (b,), -1 where another rank has the position. logits: this tensor-parallel
        rank's slice of the vocabulary. used_rows: of the vocabulary, those from there on only fill
        it up."""
        found = [(row, column) for column, row in enumerate(self.rows) if row is not None]
        rows = [logits_sbv[row, column] for row, column in found]
        return self._drawn(rows, logits_sbv, ranks, used_rows)

    def of_hidden(
        self,
        hidden_lbh: torch.Tensor,
        weight_vh: torch.Tensor,
        ranks: TensorRanks,
        used_rows: int,
    ) -> torch.Tensor:
        """The same of the logits hidden @ weight.T, of which only these rows are made. hidden: the
        rows that are this tensor-parallel rank's own."""
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
