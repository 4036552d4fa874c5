"""PyTorch's norms, for tensors of any size.

PyTorch's GPU kernels of LayerNorm and RMSNorm index in 32 bits: 2^31 elements, 2.8 million tokens
of 768 channels, are too many. A norm looks at each row by itself, so such a tensor is normed in
pieces, with the same results. Smaller ones go through as they are. A norm that is told of a tile
size keeps nothing but its input, and makes nothing in float32 that grows with the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalong.model.chunked.norms import tiled_norm

MOST_ELEMENTS = 2**31 - 1  # of a tensor that a kernel gets


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension."""

    tile_size: int | None = None  # rows at a time, in both directions; None: all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tile_size is None:
            return _in_pieces(super().forward, x)
        how = {"kind": "LayerNorm", "eps": self.eps, "tile_size": self.tile_size}
        return tiled_norm(x, self.weight, self.bias, **how)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension."""

    tile_size: int | None = None  # rows at a time, in both directions; None: all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tile_size is None:
            return _in_pieces(super().forward, x)
        how = {"kind": "RMSNorm", "eps": self.eps, "tile_size": self.tile_size}
        return tiled_norm(x, self.weight, None, **how)


def _in_pieces(norm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Cut along the first dimension; without a copy where one piece is enough."""
    if x.numel() <= MOST_ELEMENTS:
        return norm(x)
    rows = max(MOST_ELEMENTS * len(x) // x.numel(), 1)
    return torch.cat([norm(piece) for piece in x.split(rows)])
