"""The layers of LongNet. Travels in the exported folder.

Shape letters: b batch, s sequence, h heads, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_longnet import attention, bidirectional_attention, probabilities
from .configuration_longnet import LongNetConfig
from .parts_longnet import parts_of
from .positions_longnet import rotate


class LongNetRMSNorm(nn.Module):
    """RMSNorm, computed in float32 whatever the model's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(exact, x.shape[-1:], eps=self.eps).to(x.dtype)


def make_norm(config: LongNetConfig, size: int) -> nn.Module:
    """The norm that the configuration names, of so many channels."""
    norm = {"RMSNorm": LongNetRMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
    return norm(size, eps=config.norm_epsilon)


def sub_layer_norm(config: LongNetConfig, size: int) -> nn.Module:
    """What stands before a matrix that writes to the residual stream."""
    return make_norm(config, size) if config.sub_layer_norm else nn.Identity()


class LongNetAttention(nn.Module):
    """Self-attention of the kind of one layer."""

    def __init__(self, config: LongNetConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.linear_bias or config.qkv_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.parts, self.causal = parts_of(config, layer), config.causal
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=config.linear_bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.attn_sub_norm = sub_layer_norm(config, heads * self.head_dim)

    def forward(self, x, rotary, counts, documents, cache):
        q, k = self._queries_and_keys(x, rotary)
        v = self._heads(self.v_proj, x)
        if not self.causal:
            out = bidirectional_attention(q, k, v, self.parts, counts, documents)
        elif cache is None:
            first = None if documents is None else documents.first_bs
            out, _ = attention(q, k, v, self.parts, first_bs=first)
        else:
            out = cache.attend(q, k, v, counts, documents)
        return self.o_proj(self.attn_sub_norm(out.flatten(2)))

    def probabilities(self, x, rotary, counts, documents):
        """What each position attends to, (b, h, s, s), as `forward` without a cache does."""
        q, k = self._queries_and_keys(x, rotary)
        return probabilities(q, k, self.parts, self.causal, counts, documents)

    def _queries_and_keys(self, x, rotary):
        q, k = self._heads(self.q_proj, x), self._heads(self.k_proj, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            cos, sin, scales = rotary
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if scales is not None:  # in float32
                q, k = (q * scales).to(q.dtype), (k / scales).to(k.dtype)
        return q, k

    def _heads(self, projection, x):
        return projection(x).unflatten(-1, (-1, self.head_dim))


class LongNetMLP(nn.Module):
    """SwiGLU, or GELU."""

    def __init__(self, config: LongNetConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.linear_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.swiglu else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.ffn_sub_norm = sub_layer_norm(config, inner)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x):
        if self.gate_proj is None:
            x = F.gelu(self.up_proj(x))
        else:
            x = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.ffn_sub_norm(x))


class LongNetDecoderLayer(GradientCheckpointingLayer):
    """Norm, attention, norm, MLP, with residuals."""

    def __init__(self, config: LongNetConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = LongNetAttention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = LongNetMLP(config)

    def forward(self, x, rotary, counts, documents=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, counts, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
