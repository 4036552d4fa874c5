"""What dilated attention is compared with: dense (vanilla Transformer) attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """Dense attention in the layout of dilated_attention, by PyTorch's fused kernels.

    q: (batch, sequence, heads, head_dim), any floating dtype; k, v: (batch,
    sequence, kv_heads, head_dim), heads a multiple of kv_heads. scale: None is head_dim ** -0.5.
    Returns (batch, sequence, heads, head_dim). Time is quadratic in the sequence length, memory
    linear: no mask is ever built. Raises ValueError if the heads do not divide.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    out_bhsd = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out_bhsd.transpose(1, 2)


def attend(q, k, v, pattern, *, scale: float | None = None, backend: str = "auto") -> torch.Tensor:
    """dense_attention as a kind of attention is called; a pattern and backends are not its own."""
    return dense_attention(q, k, v, scale=scale)
