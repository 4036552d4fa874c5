"""From the configuration to a Megatron-core GPTModel with its initial weights."""

from __future__ import annotations

import hashlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megalong.attention.backends import choose_backend
from megalong.config import Config, ParallelConfig
from megalong.device import use_gpu
from megalong.errors import UserError
from megalong.model.core_attention import CoreAttention
from megalong.model.layer_spec import get_longnet_block_spec, use_transformer_engine
from megalong.model.names import named_parameters
from megalong.model.parameters import Initial, gradient_is_summed, row_of
from megalong.model.rotary import LongRotaryEmbedding
from megalong.model.stage import PipelineStage
from megalong.model.tensor_slices import cut_dimension, tensor_slice
from megalong.parallel.cpu import cuda_means_cpu
from megalong.parallel.mesh import Mesh

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
    config: Config, vocab_size: int, mesh: Mesh, initialize: bool = True
) -> PipelineStage:
    """This rank's part of the model, in float32 on the CPU, with the initial weights of
    `config.training.seed`.

    vocab_size: the tokenizer's; the embedding may have more rows (`ModelConfig.vocabulary_rows`).
    initialize: False leaves the weights as memory is, for a checkpoint to fill them in.
    Needs Megatron-core's groups (`megalong.parallel.launch`).
    """
    megatron_config = transformer_config(config)
    chunks = config.parallel.chunks_per_stage(config.model)
    stage = PipelineStage(
        [
            _chunk(config, megatron_config, vocab_size, mesh, chunk, chunks)
            for chunk in range(chunks)
        ]
    )
    for name, parameter in named_parameters(stage):
        # DeepSpeed counts a parameter once in the gradient norm, unless it is told of its parts.
        divided = cut_dimension(name) is not None and mesh.tensor_parallel_size > 1
        parameter.tensor_model_parallel = divided
        parameter.sum_over_tensor_ranks = gradient_is_summed(name, config.parallel.divides_norms)
    if initialize:
        initialize_weights(stage, config, mesh)
    return stage


def _chunk(
    config: Config,
    megatron_config: TransformerConfig,
    vocab_size: int,
    mesh: Mesh,
    chunk: int,
    chunks: int,
) -> GPTModel:
    """Chunk number `chunk` of the `chunks` that this stage holds."""
    model_config = config.model
    core_attention = partial(
        CoreAttention,
        attention=config.attention,
        seq_length=model_config.seq_length,
        sequence=mesh.sequence,
        tensor_rank=mesh.tensor_parallel_rank,
    )
    numbered = chunk if chunks > 1 else None  # None is Megatron-core's word for one chunk
    with cuda_means_cpu():
        model = GPTModel(
            config=megatron_config,
            transformer_layer_spec=get_longnet_block_spec(
                megatron_config, core_attention, model_config.transformer_impl, numbered
            ),
            vocab_size=model_config.vocabulary_rows(vocab_size),
            max_sequence_length=model_config.seq_length,
            pre_process=mesh.is_first_stage and chunk == 0,
            post_process=mesh.is_last_stage and chunk == chunks - 1,
            position_embedding_type=model_config.position_embedding_type,
            rotary_base=model_config.rotary_base,
            share_embeddings_and_output_weights=(
                not model_config.untie_embeddings_and_output_weights
            ),
            vp_stage=numbered,
        )
    if model_config.position_embedding_type == "rope":
        model.rotary_pos_emb = LongRotaryEmbedding(
            model_config, first_position=mesh.sequence_range(model_config.seq_length)[0]
        )
    return model


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-core's configuration object for ours."""
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        # Not the context-parallel size: of the sequence axis Megatron-core knows the group alone.
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size(model),
        # Batched sends and receives mix up activations and gradients between two stages that are
        # each other's next and previous one, as two interleaved stages are.
        overlap_p2p_comm=parallel.virtual_pipeline_size(model) is not None,
        batch_p2p_comm=parallel.virtual_pipeline_size(model) is None,
        sequence_parallel=parallel.divides_norms,
        recompute_granularity=parallel.recompute_granularity,
        **_full_recompute(parallel),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
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
        params_dtype=torch.float32,
        pipeline_dtype=DTYPES[config.training.precision],
        use_cpu_initialization=not use_transformer_engine(model.transformer_impl),
        perform_initialization=False,  # initialize_weights does it, the same in every layout
        gradient_accumulation_fusion=False,  # writes to main_grad, which DeepSpeed does not have
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        # Megatron-core's fused GELU is the approximation by tanh; the exact one is ours everywhere.
        bias_activation_fusion=use_gpu() and model.add_bias_linear and model.swiglu,
        persist_layer_norm=False,
    )


def _full_recompute(parallel: ParallelConfig) -> dict[str, object]:
    if parallel.recompute_granularity != "full":
        return {}
    return {
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
    }


@torch.no_grad()
def initialize_weights(stage: PipelineStage, config: Config, mesh: Mesh) -> None:
    """Fill in the initial weights: each parameter from its own seed, made of the run's seed and the
    parameter's global name, and from it the rank's part, so that they are the same in every layout.

    Which values a parameter has is in its row of the table (`megalong.model.parameters`).
    """
    std = config.model.init_method_std
    deviations = {
        Initial.NORMAL: std,
        Initial.RESIDUAL: std / math.sqrt(2 * config.model.num_layers),
    }
    for name, parameter in named_parameters(stage):
        row = row_of(name)
        if row.initial is Initial.ZEROS:
            parameter.zero_()
        elif row.initial is Initial.ONES:
            parameter.fill_(1.0)
        else:
            seed = hashlib.sha256(f"{config.training.seed} {name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
            shape, ranks = list(parameter.shape), mesh.tensor_parallel_size
            if row.cut is not None:
                shape[row.cut] *= ranks
            values = torch.randn(shape, generator=generator, dtype=torch.float32)
            values = tensor_slice(name, values, mesh.tensor_parallel_rank, ranks, config.model)
            parameter.copy_(values * deviations[row.initial])
