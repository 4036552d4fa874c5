"""A Transformer layer of Megatron-core's modules, whose tiled halves `megalong.model.chunked`
computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig, TransformerLayer

from megalong.attention.documents import Documents
from megalong.config import Config
from megalong.model.chunked.attention import TiledAttention
from megalong.model.chunked.layer import TiledLayer
from megalong.model.chunked.mlp import GELU, SWIGLU, TiledMLP
from megalong.model.chunked.norms import Norm
from megalong.model.chunked.offload import HostMemoryError, HostOffload
from megalong.model.chunked.rows import AttentionWeights, MLPWeights, TensorRanks
from megalong.parallel.mesh import Mesh
from megalong.utils.errors import UserError


def recomputes_by_itself(config: Config) -> bool:
    """Return whether the layers recompute their activations, rather than Megatron-core for them."""
    return has_pieces(config) and config.parallel.recomputes_each_layer


def has_pieces(config: Config) -> bool:
    """Return whether a layer is another than Megatron-core's."""
    memory = config.memory
    return bool(memory.tiled_mlp or memory.tiled_attention or memory.offload_activations)


def tensor_ranks(config: Config, mesh: Mesh) -> TensorRanks:
    """Return the ranks that share this one's matrices."""
    return TensorRanks(
        mesh.tensor_parallel_size,
        mesh.tensor_parallel_rank,
        mesh.tensor_group,
        divides_rows=config.parallel.divides_norms,
    )


class TiledTransformerLayer(TransformerLayer):
    """Megatron-core's layer with the pieces of the memory path that `settings.memory` names.

    settings: nothing left open in its memory section. offload: of the stage, where there is one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        settings: Config,
        mesh: Mesh,
        offload: HostOffload | None = None,
        **kwargs: Any,
    ):
        super().__init__(config, *args, **kwargs)
        model, memory = settings.model, settings.memory
        ranks = tensor_ranks(settings, mesh)
        norm = Norm(model.normalization, model.norm_epsilon)
        self._recompute = recomputes_by_itself(settings)
        self._attention = self._mlp = None
        if memory.tile_size is not None:  # rows of each sequence of a micro batch
            batch = settings.training.micro_batch_size
            rows = max(memory.tile_size // batch // ranks.shares, 1)
        if memory.tiled_mlp:
            self._mlp = TiledMLP(norm, SWIGLU if model.swiglu else GELU, rows, ranks)
        if memory.tiled_attention:
            self._attention = TiledAttention(
                model.kv_channels,
                model.num_attention_heads // model.num_query_groups,
                self.self_attention.core_attention.passes(memory.attention_head_groups),
                norm,
                rows,
                qk_norm=norm if model.qk_layernorm else None,
                scales=self.self_attention.core_attention.xpos,
                ranks=ranks,
            )
        self._offload = offload

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        attention_bias: Documents | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the layer's output. attention_bias: documents, as of `CoreAttention.forward`."""
        with self._saving():
            if self._attention is not None:
                x_sbh = self._tiled(hidden_states, rotary_pos_emb, attention_bias)
                if self._mlp is None:
                    x_sbh = self._half(self._mlp_half, x_sbh)
                return x_sbh, None
            attention = partial(self._attention_half, documents=attention_bias)
            x_sbh = self._half(attention, hidden_states, rotary_pos_emb)
            if self._mlp is not None:
                layer = TiledLayer(None, self._mlp, self._recompute)
                return layer(x_sbh, None, None, mlp_weights(self)), None
            return self._half(self._mlp_half, x_sbh), None

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Send what the backward pass needs to the host, if it is to go there."""
        if self._offload is None:
            yield
            return
        try:
            with self._offload.saving():
                yield
        except HostMemoryError as error:
            raise UserError(
                f"--offload-activations: {error}: set --recompute-granularity full, which keeps"
                " less, or --no-offload-activations"
            ) from error

    def _tiled(
        self, x_sbh: torch.Tensor, angles: torch.Tensor | None, documents: Documents | None
    ) -> torch.Tensor:
        """The attention half and, if that is tiled too, the MLP."""
        if angles is not None:
            angles = angles.flatten(1)
        attention = self._attention
        if documents is not None:
            passes = [replace(of_group, documents=documents) for of_group in attention.passes]
            attention = replace(attention, passes=passes)
        layer = TiledLayer(attention, self._mlp, self._recompute)
        weights = mlp_weights(self) if self._mlp is not None else None
        return layer(x_sbh, angles, attention_weights(self), weights)

    def _half(self, half: Any, *inputs: torch.Tensor | None) -> torch.Tensor:
        if not self._recompute:
            return half(*inputs)
        return tensor_parallel.checkpoint(half, False, *inputs)

    def _attention_half(
        self, x_sbh: torch.Tensor, angles: torch.Tensor | None, documents: Documents | None
    ) -> torch.Tensor:
        normed = self.input_layernorm(x_sbh)
        out = self.self_attention(
            normed, attention_mask=None, rotary_pos_emb=angles, attention_bias=documents
        )
        return self._add(self.self_attn_bda, out, x_sbh)

    def _mlp_half(self, x_sbh: torch.Tensor) -> torch.Tensor:
        return self._add(self.mlp_bda, self.mlp(self.pre_mlp_layernorm(x_sbh)), x_sbh)

    def _add(self, bda: Any, out: tuple, x_sbh: torch.Tensor) -> torch.Tensor:
        return bda(self.training, self.config.bias_dropout_fusion)(out, x_sbh, self.hidden_dropout)


def attention_weights(layer: TransformerLayer) -> AttentionWeights:
    """Return the parameters of a layer's attention half, wherever they are."""
    attention = layer.self_attention
    return AttentionWeights(
        *_norm(layer.input_layernorm, attention.linear_qkv),
        attention.linear_qkv.weight,
        _bias(attention.linear_qkv),
        *_norm(attention.q_layernorm),
        *_norm(attention.k_layernorm),
        attention.linear_proj.weight,
        _bias(attention.linear_proj),
        *_norm(getattr(attention.linear_proj, "norm", None)),
    )


def mlp_weights(layer: TransformerLayer) -> MLPWeights:
    """Return the parameters of a layer's MLP half, wherever they are."""
    mlp = layer.mlp
    return MLPWeights(
        *_norm(layer.pre_mlp_layernorm, mlp.linear_fc1),
        mlp.linear_fc1.weight,
        _bias(mlp.linear_fc1),
        mlp.linear_fc2.weight,
        _bias(mlp.linear_fc2),
        *_norm(getattr(mlp.linear_fc2, "norm", None)),
    )


def _norm(
    norm: torch.nn.Module | None, linear: torch.nn.Module | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias of a norm. linear: has them where the norm is a part of it, as Transformer
    Engine's is."""
    if hasattr(norm, "weight"):
        return norm.weight, _bias(norm)
    if hasattr(linear, "layer_norm_weight"):
        return linear.layer_norm_weight, getattr(linear, "layer_norm_bias", None)
    return None, None


def _bias(module: torch.nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if bias is not None and bias.numel() else None  # Transformer Engine's may be empty
