"""From the configuration to a Megatron-core GPTModel with its initial weights."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megalong.attention.operators import choose_backend
from megalong.config import Config
from megalong.model.chunked.cross_entropy import is_likeliest
from megalong.model.chunked.offload import HostOffload
from megalong.model.chunked.rows import TensorRanks
from megalong.model.core_attention import CoreAttention
from megalong.model.layer_spec import get_longnet_block_spec, use_transformer_engine
from megalong.model.output import LossLayer, NextTokens, avoid_logits, label_logits
from megalong.model.parameters import (
    Initial,
    deviations,
    gradient_is_summed,
    row_of,
    sizes,
    used_rows,
)
from megalong.model.rotary import LongRotaryEmbedding, XposScales, score_scale
from megalong.model.stage import PipelineStage, parameter_places
from megalong.model.tensor_slices import cut_dimension, tensor_slice, views_of_parts
from megalong.model.tiled_layer import has_pieces, recomputes_by_itself, tensor_ranks
from megalong.parallel.cpu import cuda_means_cpu
from megalong.parallel.mesh import Mesh
from megalong.utils.errors import UserError
from megalong.utils.machine import use_gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_backend(config: Config) -> None:
    """Raise UserError where `--attention-backend` cannot run on this machine's device."""
    name, dtype = config.attention.attention_backend, DTYPES[config.training.precision]
    device = "cuda" if use_gpu() else "cpu"
    q = torch.empty(1, 1, 1, config.model.kv_channels, dtype=dtype, device=device)
    try:
        choose_backend(name, q)
    except ValueError as error:
        raise UserError(f"--attention-backend {name}: {error}; set it to auto") from error


def build_model(
    config: Config,
    vocab_size: int,
    mesh: Mesh,
    initialize: bool = True,
    divide: Callable[[torch.nn.Parameter], None] | None = None,
) -> PipelineStage:
    """Return this rank's part of the model, on the mesh's device, in the precision of the training,
    with the initial weights of `config.training.seed`. Needs `megalong.parallel.launch`.

    The parameters come into being one at a time, where they will stay: no more than one of them, in
    float32 and whole over its tensor-parallel ranks, is ever in the device's memory besides, and of
    that a piece in the host's. `--memory-path auto`, where nobody has decided what it is, is no
    more than the pieces that are given.

    vocab_size: the tokenizer's; the embedding may have more rows (`ModelConfig.vocabulary_rows`).
    initialize: False leaves the weights as memory is, for a checkpoint to fill them in.
    divide: called with each parameter as soon as it has its values, in the same order on every
        rank: for ZeRO 3, which keeps a part of it.
    """
    if config.memory.memory_path == "auto":
        memory = config.memory.with_pieces(False, config.model, config.parallel)
        config = dataclasses.replace(config, memory=memory)
    stage = PipelineStage(_chunks(config, vocab_size, mesh))
    for name, module, attribute in list(parameter_places(stage)):
        parameter = _materialize(module, attribute, DTYPES[config.training.precision], mesh.device)
        # DeepSpeed counts a parameter once in the gradient norm, unless it is told of its parts.
        divided = cut_dimension(name) is not None and mesh.tensor_parallel_size > 1
        parameter.tensor_model_parallel = divided
        parameter.sum_over_tensor_ranks = gradient_is_summed(name, config.parallel.divides_norms)
        if initialize:
            initialize_parameter(name, parameter, config, mesh)
        if divide is not None:
            divide(parameter)
    assert not any(buffer.is_meta for buffer in stage.buffers()), "a buffer without values"
    return stage


class _Model(GPTModel):
    """Megatron-core's model, whose output layer may make losses itself, without the collective that
    makes the copies of a tied embedding equal: they have the same initial weights.

    beside: as of `PipelineStage.forward`. used_rows: of the vocabulary, the rest only fills it up.
    """

    beside: str | NextTokens | None = None
    used_rows: int

    def setup_embeddings_and_output_layer(self) -> None:
        pass

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the token losses (b, s) of labels (b, s) and what the output layer gave, a
        LossLayer hidden states; (2, b, s) with what is wanted beside them."""
        if isinstance(self.output_layer, LossLayer):
            tied = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if tied else None
            losses = self.output_layer(logits, labels.T, weight=weight, beside=self.beside)
            return losses.transpose(-1, -2).contiguous()
        # What is beside them before the losses, which overwrite float32 logits.
        if self.beside == "likeliest":
            right_sb = is_likeliest(logits, labels.T, self._tensor_ranks, self.used_rows)
            losses_bs = super().compute_language_model_loss(labels, logits)
            return torch.stack((losses_bs, right_sb.T.to(losses_bs.dtype)))
        if isinstance(self.beside, NextTokens):
            tokens_b = self.beside.of_logits(logits, self._tensor_ranks, self.used_rows)
            losses_bs = super().compute_language_model_loss(labels, logits)
            tokens_bs = tokens_b[:, None].to(losses_bs.dtype).expand_as(losses_bs)
            return torch.stack((losses_bs, tokens_bs))
        if self.beside == "logsumexp":  # of which a loss lacks the label's logit
            labelled_sb = label_logits(logits, labels.T, self._tensor_ranks.group)
            losses_bs = super().compute_language_model_loss(labels, logits)
            return torch.stack((losses_bs, losses_bs + labelled_sb.T))
        return super().compute_language_model_loss(labels, logits)

    @property
    def _tensor_ranks(self) -> TensorRanks:
        """Those that share the vocabulary of the logits."""
        group = self.pg_collection.tp
        return TensorRanks(group.size(), group.rank(), group)


def _materialize(
    module: torch.nn.Module, attribute: str, dtype: torch.dtype, device: torch.device
) -> torch.nn.Parameter:
    """Put a parameter with memory in the place of one that is a shape only."""
    shape_only = getattr(module, attribute)
    if not shape_only.is_meta:  # Transformer Engine's are made on the device
        return shape_only
    parameter = torch.nn.Parameter(torch.empty_like(shape_only, dtype=dtype, device=device))
    vars(parameter).update(vars(shape_only))  # Megatron-core's marks
    setattr(module, attribute, parameter)
    return parameter


def _chunks(config: Config, vocab_size: int, mesh: Mesh) -> list[GPTModel]:
    """The chunks that this stage holds, their parameters shapes only. They share the angles and the
    scales of positions, each of which is one table."""
    megatron_config, model_config, memory = transformer_config(config), config.model, config.memory
    first_position = mesh.sequence_range(model_config.seq_length)[0]
    rotary = xpos = tiled = None
    if model_config.has_rotary_positions:
        rotary = LongRotaryEmbedding(
            model_config, first_position, one_per_pair=bool(memory.tiled_attention)
        )
    if model_config.position_embedding_type == "xpos":
        xpos = XposScales(model_config, first_position)
    if has_pieces(config):
        offload = HostOffload(mesh.device) if memory.offload_activations else None
        tiled = {"settings": config, "mesh": mesh, "offload": offload}
    core_attention = partial(
        CoreAttention,
        model=model_config,
        attention=config.attention,
        sequence=mesh.sequence,
        tensor_rank=mesh.tensor_parallel_rank,
        xpos=xpos,
        causal=config.training.causal,
    )
    sub_layer_norm = tensor_ranks(config, mesh) if model_config.sub_layer_norm else None
    fused = use_transformer_engine(model_config.transformer_impl)
    found, chunks = [], config.parallel.chunks_per_stage(model_config)
    for chunk in range(chunks):
        numbered = chunk if chunks > 1 else None  # None is Megatron-core's word for one chunk
        with cuda_means_cpu(), contextlib.nullcontext() if fused else torch.device("meta"):
            model = _Model(
                config=megatron_config,
                transformer_layer_spec=get_longnet_block_spec(
                    megatron_config,
                    core_attention,
                    model_config.transformer_impl,
                    numbered,
                    tiled,
                    sub_layer_norm,
                ),
                vocab_size=model_config.vocabulary_rows(vocab_size),
                max_sequence_length=model_config.seq_length,
                pre_process=mesh.is_first_stage and chunk == 0,
                post_process=mesh.is_last_stage and chunk == chunks - 1,
                position_embedding_type="rope" if rotary is not None else "none",
                rotary_base=model_config.rotary_base,
                share_embeddings_and_output_weights=(
                    not model_config.untie_embeddings_and_output_weights
                ),
                vp_stage=numbered,
            )
            model.used_rows = used_rows(model_config, vocab_size)
            if memory.linear_cross_entropy and model.post_process:
                avoid_logits(model, config, mesh, model.used_rows)
        if rotary is not None:
            model.rotary_pos_emb = rotary
        found.append(model)
    return found


def transformer_config(config: Config) -> TransformerConfig:
    """Return Megatron-core's configuration object for ours."""
    model, parallel = config.model, config.parallel
    recomputation = {"recompute_granularity": parallel.recompute_granularity}
    if recomputes_by_itself(config):
        recomputation = {"recompute_granularity": None}
    elif parallel.recompute_granularity == "full":
        recomputation["recompute_method"] = parallel.recompute_method
        recomputation["recompute_num_layers"] = parallel.recompute_num_layers
    return TransformerConfig(
        # Not the context-parallel size: of the sequence axis Megatron-core knows the group alone.
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size(model),
        # Batched sends and receives mix up activations and gradients between two stages that are
        # each other's next and previous one, as two interleaved stages are.
        overlap_p2p_comm=parallel.virtual_pipeline_size(model) is not None,
        batch_p2p_comm=parallel.virtual_pipeline_size(model) is None,
        batch_p2p_sync=False,  # would stop the host after each of them, for an old race in PyTorch
        sequence_parallel=parallel.divides_norms,
        **recomputation,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        softmax_scale=score_scale(model),
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=config.training.precision == "bf16",
        fp16=config.training.precision == "fp16",
        params_dtype=DTYPES[config.training.precision],
        pipeline_dtype=DTYPES[config.training.precision],
        # Without it, Megatron-core names the device itself: what Transformer Engine needs.
        use_cpu_initialization=not use_transformer_engine(model.transformer_impl),
        perform_initialization=False,  # initialize_parameter does it, the same in every layout
        gradient_accumulation_fusion=False,  # writes to main_grad, which DeepSpeed does not have
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        # Megatron-core's fused GELU is the approximation by tanh; the exact one is ours everywhere.
        bias_activation_fusion=use_gpu() and model.add_bias_linear and model.swiglu,
        persist_layer_norm=False,
    )


@torch.no_grad()
def initialize_parameter(
    name: str, parameter: torch.nn.Parameter, config: Config, mesh: Mesh
) -> None:
    """Fill in the initial values of the parameter's row in the table, made from a seed of the run's
    seed and its canonical name: the same in every layout, and as they are drawn on the host, on
    every device."""
    row, model, ranks = row_of(name), config.model, mesh.tensor_parallel_size
    if row.initial is Initial.ZEROS:
        parameter.zero_()
    elif row.initial is Initial.ONES:
        parameter.fill_(1.0)
    else:
        seed = hashlib.sha256(f"{config.training.seed} {name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
        shape = list(parameter.shape)
        if row.cut is not None:
            shape[row.cut] *= ranks
        values = normal_numbers(shape, generator, parameter.device)
        heights = [part.size(sizes(model, 0))[0] for part in row.parts_of(model)]
        parts, factors = [values], deviations(row, model)
        if len(set(factors)) > 1:
            parts = views_of_parts(values, heights, row.packing, model)
        for part, deviation in zip(parts, factors, strict=False):
            part.mul_(deviation)
        parameter.copy_(tensor_slice(name, values, mesh.tensor_parallel_rank, ranks, model))


def normal_numbers(
    shape: Sequence[int], generator: torch.Generator, device: torch.device, piece: int = 2**24
) -> torch.Tensor:
    """Return `torch.randn(shape, generator=generator)`, float32, on any device.

    generator: of the CPU. The host holds `piece` numbers (a multiple of 16) and a few at a time.
    """
    values = torch.empty(shape, dtype=torch.float32, device=device)
    flat = values.view(-1)
    # PyTorch draws in groups of 16 and makes the last 16 of a tensor anew, so that pieces have to
    # begin at a multiple of 16, and none may have fewer numbers than that.
    starts = range(0, max(len(flat) - 15, 1), piece)
    for start, stop in pairwise([*starts, len(flat)]):
        flat[start:stop].copy_(torch.randn(stop - start, generator=generator))
    return values
