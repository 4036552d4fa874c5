"""The Megatron-core layer spec of LongNet: a GPT layer whose core attention is dilated.

Everything else of the layer is Megatron-core's own: Transformer Engine modules where they are
installed and there is a GPU, apex's fused LayerNorm where that is installed, else PyTorch's.
"""

from __future__ import annotations

from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megalong.attention import DilatedPattern
from megalong.config import ConfigError
from megalong.device import use_gpu
from megalong.model.core_attention import DenseCoreAttention, DilatedCoreAttention


def get_longnet_layer_spec(
    pattern: DilatedPattern | None,
    normalization: str = "RMSNorm",
    transformer_impl: str = "auto",
) -> ModuleSpec:
    """The spec of one layer, for `megatron.core.models.gpt.GPTModel`.

    pattern: the dilated attention pattern; None gives dense attention (the vanilla Transformer).
    normalization: "RMSNorm" or "LayerNorm".
    transformer_impl: "local", "transformer_engine", or "auto" for the better of those available.
    Raises ConfigError where Transformer Engine is asked for and cannot be used.
    """
    if use_transformer_engine(transformer_impl):
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization=normalization)
        if not use_gpu():
            # apex's norm may be installed on a machine whose GPU is away.
            spec.submodules.input_layernorm = WrappedTorchNorm
            spec.submodules.pre_mlp_layernorm = WrappedTorchNorm
    core_attention = (
        DenseCoreAttention if pattern is None else partial(DilatedCoreAttention, pattern=pattern)
    )
    spec.submodules.self_attention.submodules.core_attention = core_attention
    return spec


def use_transformer_engine(transformer_impl: str) -> bool:
    """Whether the layers are made of Transformer Engine modules."""
    if transformer_impl == "local":
        return False
    usable = use_gpu() and _transformer_engine_installed()
    if transformer_impl == "transformer_engine" and not usable:
        raise ConfigError(
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
