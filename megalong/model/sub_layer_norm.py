"""Sub-layer norms (MAGNETO, arXiv 2210.06423): each of a layer's two matrices that write to the
residual stream has a norm of its own before it.

Tensor-parallel ranks hold the inputs of such a matrix in slices; the moments are of them all.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megalong.model.chunked.divided_norms import divided_norm
from megalong.model.chunked.tensor_ranks import TensorRanks
from megalong.model.chunked.weights import Norm
from megalong.model.norms import LayerNorm, RMSNorm


def add_sub_layer_norms(layer: ModuleSpec, ranks: TensorRanks) -> None:
    """Put the norms into the spec of a layer of Megatron-core's, whatever its modules are."""
    mlp = layer.submodules.mlp
    # From Megatron-core 0.19 on it is a partial and no ModuleSpec.
    mlp = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    attention = layer.submodules.self_attention.submodules
    attention.linear_proj = _after_a_norm(attention.linear_proj, ranks)
    mlp.linear_fc2 = _after_a_norm(mlp.linear_fc2, ranks)


def _after_a_norm(linear: type, ranks: TensorRanks) -> type:
    """The row-parallel layer with a norm before it, as a class, which Megatron-core wants."""

    class NormedRowParallelLinear(linear):
        def __init__(
            self, input_size: int, output_size: int, *, config: TransformerConfig, **others: Any
        ):
            super().__init__(input_size, output_size, config=config, **others)
            self.norm = _norm(config, input_size, ranks)

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(self.norm(x))

    return NormedRowParallelLinear


def _norm(config: TransformerConfig, size: int, ranks: TensorRanks) -> torch.nn.Module:
    """Over `size` channels, shapes only: `build_model` gives its parameters their memory."""
    kind = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}[config.normalization]
    with torch.device("meta"):
        norm = kind(size // ranks.size, eps=config.layernorm_epsilon)
    return (
        norm if ranks.size == 1 else DividedNorm(norm, Norm(config.normalization, norm.eps), ranks)
    )


class DividedNorm(torch.nn.Module):
    """A norm over the channels of all tensor-parallel ranks, with the parameters of this one's."""

    def __init__(self, own: torch.nn.Module, norm: Norm, ranks: TensorRanks):
        """own: a norm of this rank's channels, whose parameters it takes."""
        super().__init__()
        self.weight, self.how, self.ranks = own.weight, norm, ranks
        self.register_parameter("bias", getattr(own, "bias", None))

    def forward(self, x_sbc: torch.Tensor) -> torch.Tensor:
        return divided_norm(x_sbc, self.weight, self.bias, self.how, self.ranks)
