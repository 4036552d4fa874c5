"""Canonical parameter names: the same for a parameter in every layout and with every module set.

They are the names of Megatron-core's local GPTModel with global layer numbers, for instance
`decoder.layers.17.self_attention.linear_qkv.weight`. Checkpoints, initial weights and conversion
go by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from megalong.model.stage import PipelineStage

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")

# Transformer Engine keeps a norm's weights inside the linear layer that follows it.
_FUSED_NORMS = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_"), "input_layernorm."),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_"), "pre_mlp_layernorm."),
)

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def canonical_name(local_name: str, first_layer: int = 0, tied: bool = False) -> str:
    """The global name of a parameter that `named_parameters()` of a GPTModel calls `local_name`.

    first_layer: number of layers before this pipeline stage. tied: the output layer's weight is the
    embedding's, of which the last of several stages has a copy.
    """
    name = _LAYER.sub(lambda match: str(int(match[0]) + first_layer), local_name)
    for pattern, norm in _FUSED_NORMS:
        name = pattern.sub(norm, name)
    return EMBEDDING if tied and name == OUTPUT else name


def named_parameters(stage: PipelineStage) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a pipeline stage by canonical name."""
    for model in stage.chunks:
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0  # Megatron-core's 1 is our 0
        tied = model.share_embeddings_and_output_weights
        for name, parameter in model.named_parameters():
            yield canonical_name(name, first_layer, tied), parameter
