"""The Megatron-core layer spec of LongNet: a GPT layer with our attention and norms in it.

With `--transformer-impl transformer_engine` or `auto` the modules are Transformer Engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM, FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megalong.model.chunked.norms import Norm, divided_norm, tiled_norm
from megalong.model.chunked.rows import TensorRanks
from megalong.model.tiled_layer import TiledTransformerLayer
from megalong.utils.errors import UserError
from megalong.utils.machine import use_gpu

MOST_ELEMENTS = 2**31 - 1  # of a tensor that PyTorch's norms get: they index in 32 bits on a GPU


class _AnySize:
    """A norm of PyTorch's for tensors of any size, which it looks at in pieces of rows.

    tile_size: rows at a time, in both directions, keeping nothing but the input; None: all.
    """

    tile_size: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tile_size is not None:
            how = {"kind": type(self).__name__, "eps": self.eps, "tile_size": self.tile_size}
            return tiled_norm(x, self.weight, getattr(self, "bias", None), **how)
        if x.numel() <= MOST_ELEMENTS:
            return super().forward(x)
        rows = max(MOST_ELEMENTS * len(x) // x.numel(), 1)
        return torch.cat([super(_AnySize, self).forward(piece) for piece in x.split(rows)])


class LayerNorm(_AnySize, torch.nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension."""


class RMSNorm(_AnySize, torch.nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension."""


NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}


def get_longnet_block_spec(
    config: TransformerConfig,
    core_attention: Callable[..., Any],
    transformer_impl: str = "local",
    chunk: int | None = None,
    tiled: dict[str, Any] | None = None,
    sub_layer_norm: TensorRanks | None = None,
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, or of a chunk of it, and the final norm.

    core_attention: makes the attention of a layer (`megalong.model.core_attention`).
    transformer_impl: "local", "transformer_engine", or "auto" for the better of those available.
    tiled: what `TiledTransformerLayer` is made with besides; None: the layer is Megatron-core's.
    sub_layer_norm: the ranks that share the matrices, where those that write to the residual stream
        have a norm before them; None: they have none.
    Raises UserError where Transformer Engine is asked for and cannot be used.
    """
    # Megatron-core would choose the final norm by what is installed alone: Transformer Engine's, on
    # a machine without a GPU too, or apex's, which has no RMSNorm.
    if use_transformer_engine(transformer_impl):
        from megatron.core.extensions.transformer_engine import TENorm as norm

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
        norm = _local_norm(config.normalization)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
    spec.submodules.self_attention.submodules.core_attention = core_attention
    if sub_layer_norm is not None:
        _add_sub_layer_norms(spec, sub_layer_norm)
    if tiled is not None:
        spec.module, spec.params = TiledTransformerLayer, tiled
    return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config, chunk), norm)


def _local_norm(normalization: str) -> type:
    """apex's fused LayerNorm where it is installed and there is a GPU, else PyTorch's norms."""
    fused = normalization == "LayerNorm" and HAVE_FUSED_LAYER_NORM and use_gpu()
    return FusedLayerNorm if fused else _TorchNorm


class _TorchNorm:
    """Makes PyTorch's norm of `config.normalization`; a class, because Megatron-core wants one.

    Megatron-core's own refuses Megatron's sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any):
        return NORMS[config.normalization](hidden_size, eps=eps)


def _add_sub_layer_norms(layer: ModuleSpec, ranks: TensorRanks) -> None:
    """Put a norm before each of the two matrices that write to the residual stream (MAGNETO, arXiv
    2210.06423), whatever the layer's modules are."""
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
    with torch.device("meta"):
        norm = NORMS[config.normalization](size // ranks.size, eps=config.layernorm_epsilon)
    if ranks.size == 1:
        return norm
    return DividedNorm(norm, Norm(config.normalization, norm.eps), ranks)


class DividedNorm(torch.nn.Module):
    """A norm over the channels of all tensor-parallel ranks, with the parameters of this one's."""

    def __init__(self, own: torch.nn.Module, norm: Norm, ranks: TensorRanks):
        """own: a norm of this rank's channels, whose parameters it takes."""
        super().__init__()
        self.weight, self.how, self.ranks = own.weight, norm, ranks
        self.register_parameter("bias", getattr(own, "bias", None))

    def forward(self, x_sbc: torch.Tensor) -> torch.Tensor:
        return divided_norm(x_sbc, self.weight, self.bias, self.how, self.ranks)


def use_transformer_engine(transformer_impl: str) -> bool:
    """Return whether the layers are made of Transformer Engine modules."""
    if transformer_impl == "local":
        return False
    usable = use_gpu()
    if usable:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError:
            usable = False
    if transformer_impl == "transformer_engine" and not usable:
        raise UserError(
            "--transformer-impl transformer_engine needs a GPU and the package transformer_engine:"
            " install it, or set --transformer-impl local"
        )
    return usable
