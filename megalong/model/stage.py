"""A pipeline stage of the model: one GPTModel, or several under the interleaved schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel

from megalong.attention.documents import documents_of
from megalong.model.output import NextTokens
from megalong.model.parameters import canonical_name


class PipelineStage(torch.nn.Module):
    """The chunks of the model that this rank has a part of, in the order of their layers."""

    def __init__(self, chunks: Sequence[GPTModel]):
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(
        self,
        *args,
        chunk: int = 0,
        document_start: torch.Tensor | None = None,
        document_stop: torch.Tensor | None = None,
        beside: str | NextTokens | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return the output of one chunk; the other arguments are those of GPTModel.

        document_start, document_stop: where documents are kept apart, those of this rank's
            positions (`megalong.data.batches`).
        beside: what the last chunk gives beside the token losses, (2, b, s) in all: "logsumexp" of
            the logits; or "likeliest", 1 where the label is the likeliest token and 0 elsewhere,
            without gradient, nor rows that only fill up the vocabulary among the tokens; or of each
            sequence the `NextTokens` that are asked for, at every position the same.
        """
        self.chunks[chunk].beside = beside
        documents = documents_of(document_start, document_stop)
        if documents is not None:  # see CoreAttention.forward
            kwargs["extra_block_kwargs"] = {"attention_bias": documents}
        return self.chunks[chunk](*args, **kwargs)

    @property
    def config(self):
        """Megatron-core's configuration, which the chunks share."""
        return self.chunks[0].config

    @property
    def copied_embedding(self) -> torch.nn.Parameter | None:
        """The embedding, where it is also the output layer and another stage has a copy."""
        first, last = self.chunks[0], self.chunks[-1]
        if not first.share_embeddings_and_output_weights or first.pre_process == last.post_process:
            return None
        return (first if first.pre_process else last).shared_embedding_or_output_weight()

    @property
    def is_last(self) -> bool:
        return self.chunks[-1].post_process


def named_parameters(stage: PipelineStage) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of a pipeline stage by canonical name."""
    for name, module, attribute in parameter_places(stage):
        yield name, getattr(module, attribute)


def parameter_places(stage: PipelineStage) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Yield canonical name, module, and name in that module of a stage's parameters."""
    for model in stage.chunks:
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0  # Megatron-core's 1 is our 0
        tied = model.share_embeddings_and_output_weights
        for local_name, _ in model.named_parameters():
            module, _, attribute = local_name.rpartition(".")
            name = canonical_name(local_name, first_layer, tied)
            yield name, model.get_submodule(module), attribute
