"""What stands in the place of Megatron-core's `core_attention` inside its SelfAttention.

Both modules read Megatron's (sequence, batch, heads, head_dim) tensors as views, without copies,
and never make or read an attention mask. Shape letters: s sequence, b batch, h heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.transformer.module import MegatronModule

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.dense import dense_attention
from megalong.attention.exchange import SequenceGroup
from megalong.attention.sequence_parallel import sequence_parallel_attention


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
        sequence: SequenceGroup | None = None,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.sequence = sequence if sequence is not None and sequence.size > 1 else None

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
    """Dilated attention (LongNet section 3.2), over all ranks of the sequence.

    pattern: that of the whole model; a tensor-parallel rank takes the offsets of its own heads.
    """

    def __init__(self, *args: Any, pattern: DilatedPattern, **kwargs: Any):
        super().__init__(*args, **kwargs)
        layer_number = kwargs["layer_number"]  # Megatron-core counts layers from one
        heads, kv_heads = self.config.num_attention_heads, self.config.num_query_groups
        here = heads // self.config.tensor_model_parallel_size
        first = here * get_tensor_model_parallel_rank()
        layer_pattern = pattern.at_layer(layer_number - 1)
        self.pattern = layer_pattern.for_heads(heads, kv_heads, first, first + here)

    def attend(self, q_bshd, k_bshd, v_bshd) -> torch.Tensor:
        if self.sequence is None:
            return dilated_attention(q_bshd, k_bshd, v_bshd, self.pattern, scale=self.softmax_scale)
        return sequence_parallel_attention(
            q_bshd, k_bshd, v_bshd, self.pattern, self.sequence, scale=self.softmax_scale
        )


class DenseCoreAttention(_CoreAttention):
    """Plain causal attention: the vanilla Transformer to compare with."""

    def attend(self, q_bshd, k_bshd, v_bshd) -> torch.Tensor:
        if self.sequence is None:
            return dense_attention(q_bshd, k_bshd, v_bshd, scale=self.softmax_scale)
        # One branch that spans the sequence and leaves nothing out.
        whole = DilatedPattern((q_bshd.shape[1] * self.sequence.size,), (1,))
        return sequence_parallel_attention(
            q_bshd, k_bshd, v_bshd, whole, self.sequence, scale=self.softmax_scale
        )
