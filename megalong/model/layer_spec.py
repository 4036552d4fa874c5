"""The Megatron-core layer spec of LongNet: a GPT layer with our attention in it.

Everything else of the layer is Megatron-core's own, but for the norms: apex's fused LayerNorm where
that is installed and there is a GPU, else PyTorch's. With `--transformer-impl transformer_engine`
or `auto` the modules are Transformer Engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

from megalong.model.chunked.tensor_ranks import TensorRanks
from megalong.model.norms import LayerNorm, RMSNorm
from megalong.model.sub_layer_norm import add_sub_layer_norms
from megalong.model.tiled_layer import TiledTransformerLayer
from megalong.utils.errors import UserError
from megalong.utils.machine import use_gpu


def get_longnet_layer_spec(
    core_attention: Callable[..., Any],
    normalization: str = "RMSNorm",
    transformer_impl: str = "local",
    qk_layernorm: bool = False,
    tiled: dict[str, Any] | None = None,
    sub_layer_norm: TensorRanks | None = None,
) -> ModuleSpec:
    """The spec of one layer, for `megatron.core.models.gpt.GPTModel`.

    core_attention: makes the attention of a layer (`megalong.model.core_attention`).
    tiled: what `TiledTransformerLayer` is made with besides; None: the layer is Megatron-core's.
    normalization: "RMSNorm" or "LayerNorm".
    transformer_impl: "local", "transformer_engine", or "auto" for the better of those available.
    qk_layernorm: whether each head's queries and keys are normed.
    sub_layer_norm: the ranks that share the matrices, where those that write to the residual stream
        have a norm before them; None: they have none.
    Raises UserError where Transformer Engine is asked for and cannot be used.
    """
    if use_transformer_engine(transformer_impl):
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(normalization=normalization)
        norm = _local_norm(normalization)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        if qk_layernorm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
    spec.submodules.self_attention.submodules.core_attention = core_attention
    if sub_layer_norm is not None:
        add_sub_layer_norms(spec, sub_layer_norm)
    if tiled is not None:
        spec.module, spec.params = TiledTransformerLayer, tiled
    return spec


def get_longnet_block_spec(
    config: TransformerConfig,
    core_attention: Callable[..., Any],
    transformer_impl: str = "local",
    chunk: int | None = None,
    tiled: dict[str, Any] | None = None,
    sub_layer_norm: TensorRanks | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of a chunk of it, and the final norm.

    Megatron-core would choose the final norm by what is installed alone: Transformer Engine's, on
    a machine without a GPU too, or apex's, which has no RMSNorm.
    """
    spec = get_longnet_layer_spec(
        core_attention,
        config.normalization,
        transformer_impl,
        config.qk_layernorm,
        tiled,
        sub_layer_norm,
    )
    if use_transformer_engine(transformer_impl):
        from megatron.core.extensions.transformer_engine import TENorm as norm
    else:
        norm = _local_norm(config.normalization)
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
        norm = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}[config.normalization]
        return norm(hidden_size, eps=eps)


def use_transformer_engine(transformer_impl: str) -> bool:
    """Whether the layers are made of Transformer Engine modules."""
    if transformer_impl == "local":
        return False
    usable = use_gpu() and _transformer_engine_installed()
    if transformer_impl == "transformer_engine" and not usable:
        raise UserError(
            "--transformer-impl transformer_engine needs a GPU and the package transformer_engine:"
            " install it, or set --transformer-impl local"
        )
    return usable


def _transformer_engine_installed() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True
