"""The parameters of a pipeline stage by canonical name (see `megalong.model.parameters`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megalong.model.parameters import EMBEDDING, OUTPUT, TABLE, split_name
from megalong.model.stage import PipelineStage

_FUSED = {row.fused_name: row.name for row in TABLE if row.fused_name is not None}


def canonical_name(local_name: str, first_layer: int = 0, tied: bool = False) -> str:
    """The global name of a parameter that `named_parameters()` of a GPTModel calls `local_name`.

    first_layer: number of layers before this pipeline stage. tied: the output layer's weight is the
    embedding's, of which the last of several stages has a copy.
    """
    pattern, layer = split_name(local_name)
    name = _FUSED.get(pattern, pattern)
    if layer is not None:
        name = name.format(first_layer + layer)
    return EMBEDDING if tied and name == OUTPUT else name


def named_parameters(stage: PipelineStage) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a pipeline stage by canonical name."""
    for name, module, attribute in parameter_places(stage):
        yield name, getattr(module, attribute)


def parameter_places(stage: PipelineStage) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """The parameters of a pipeline stage: canonical name, module, and its name in that module."""
    for model in stage.chunks:
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0  # Megatron-core's 1 is our 0
        tied = model.share_embeddings_and_output_weights
        for local_name, _ in model.named_parameters():
            module, _, attribute = local_name.rpartition(".")
            name = canonical_name(local_name, first_layer, tied)
            yield name, model.get_submodule(module), attribute
