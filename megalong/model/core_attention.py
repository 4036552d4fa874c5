"""What stands in the place of Megatron-core's `core_attention` inside its SelfAttention.

Both modules read Megatron's (sequence, batch, heads, head_dim) tensors as views, without copies,
and never make or read an attention mask. Shape letters: s sequence, b batch, h heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.baselines import dense_attention


class _CoreAttention(MegatronModule):
    """The part both share: Megatron-core's interface, causal self-attention only."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        q_sbhd: torch.Tensor,
        k_sbhd: torch.Tensor,
        v_sbhd: torch.Tensor,
        attention_mask: None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: None = None,
    ) -> torch.Tensor:
        """Attention over (s, b, heads, d) queries and (s, b, kv heads, d) keys and values.

        Returns (s, b, heads * d).
        """
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        q_bshd, k_bshd, v_bshd = (x.transpose(0, 1) for x in (q_sbhd, k_sbhd, v_sbhd))
        return self.attend(q_bshd, k_bshd, v_bshd).transpose(0, 1).flatten(2)

    def attend(self, q_bshd, k_bshd, v_bshd) -> torch.Tensor:
        raise NotImplementedError


class DilatedCoreAttention(_CoreAttention):
    """Dilated attention (LongNet section 3.2)."""

    def __init__(self, *args: Any, pattern: DilatedPattern, **kwargs: Any):
        super().__init__(*args, **kwargs)
        layer_number = kwargs["layer_number"]  # Megatron-core counts layers from one
        self.pattern = pattern.at_layer(layer_number - 1)

    def attend(self, q_bshd, k_bshd, v_bshd) -> torch.Tensor:
        return dilated_attention(q_bshd, k_bshd, v_bshd, self.pattern, scale=self.softmax_scale)


class DenseCoreAttention(_CoreAttention):
    """Plain causal attention: the vanilla Transformer to compare with."""

    def attend(self, q_bshd, k_bshd, v_bshd) -> torch.Tensor:
        return dense_attention(q_bshd, k_bshd, v_bshd, scale=self.softmax_scale)
