"""The `core_attention` inside Megatron-core's SelfAttention: no copies, and no attention mask.

Shape letters: s sequence, b batch, h heads, d head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from megalong.attention.documents import Documents
from megalong.attention.exchange import SequenceGroup
from megalong.attention.passes import Passes, attend
from megalong.config import AttentionConfig, ModelConfig
from megalong.model.chunked.rotary import scaled
from megalong.model.rotary import XposScales


class CoreAttention(MegatronModule):
    """Self-attention of the kind that its layer has, over all ranks of the sequence.

    model, attention: resolved. sequence: the ranks that share a sequence, if any. tensor_rank: this
    rank's place among those that divide the heads. xpos: the scales of this rank's positions.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        model: ModelConfig,
        attention: AttentionConfig,
        sequence: SequenceGroup | None = None,
        tensor_rank: int = 0,
        xpos: XposScales | None = None,
        causal: bool = True,
    ):
        super().__init__(config=config)
        here = config.num_attention_heads // config.tensor_model_parallel_size
        self._heads = here
        self._kv_heads = config.num_query_groups // config.tensor_model_parallel_size
        self.xpos = xpos
        layer = layer_number - 1  # Megatron-core counts them from one
        self.pattern = attention.pattern(layer).for_heads(
            config.num_attention_heads,
            config.num_query_groups,
            start=here * tensor_rank,
            stop=here * (tensor_rank + 1),
        )
        self._passes = partial(
            attention.kind(layer).passes_class(),
            sequence=sequence,
            scale=softmax_scale,
            backend=attention.attention_backend,
            causal=causal,
        )

    def forward(
        self,
        q_sbhd: torch.Tensor,
        k_sbhd: torch.Tensor,
        v_sbhd: torch.Tensor,
        attention_mask: None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Documents | None = None,
        packed_seq_params: None = None,
    ) -> torch.Tensor:
        """Return the attention (s, b, heads * d).

        attention_bias: the documents of this rank's positions, where they are kept apart. Of what
        Megatron-core hands to all its layers, in every kind of recomputation, it is the one that
        may be any object.
        """
        assert attention_mask is None and packed_seq_params is None
        if self.xpos is not None:
            scales_sp = self.xpos(len(q_sbhd), q_sbhd.device)
            q_sbhd, k_sbhd = scaled(q_sbhd, scales_sp), scaled(k_sbhd, scales_sp, inverse=True)
        q_bshd, k_bshd, v_bshd = (x.transpose(0, 1) for x in (q_sbhd, k_sbhd, v_sbhd))
        out_bshd = attend(
            q_bshd, k_bshd, v_bshd, self._passes(self.pattern, documents=attention_bias)
        )
        return out_bshd.transpose(0, 1).flatten(2)

    def passes(self, groups: int) -> list[Passes]:
        """Return forward and backward without autograd for each group of this rank's heads. groups:
        divides the kv heads."""
        assert self._kv_heads % groups == 0
        heads = self._heads // groups
        parts = (
            self.pattern.for_heads(self._heads, self._kv_heads, start, start + heads)
            for start in range(0, self._heads, heads)
        )
        return [self._passes(part) for part in parts]
