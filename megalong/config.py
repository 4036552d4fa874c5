"""The whole configuration: dataclasses, from which the flags, the YAML file and the checks derive.

One field is one flag (`num_layers` is `--num-layers`), with Megatron's name where Megatron has one.
`megalong.arguments` reads the command line and `--config FILE.yaml`; `Config.resolve` fills in what
was left open and refuses what cannot work, before anything is built or launched. A `Config` never
changes after that; the resolved one is written into the run folder and can be read again.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

from megalong.attention import DilatedPattern
from megalong.attention.dilated_attention import BACKEND_VARIABLE, BACKENDS
from megalong.flags import (
    ConfigError,
    flag,
    flag_name,
    require_more_than_zero,
    require_positive,
)
from megalong.layout import ParallelConfig

__all__ = ["Config", "ConfigError", "flag_name", "world_size"]


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer: what the weights are."""

    num_layers: int = flag(12, "number of Transformer layers")
    hidden_size: int = flag(768, "width of the residual stream")
    ffn_hidden_size: int | None = flag(
        None, "width of the MLP (default: 4 x hidden size; 8/3 x, a multiple of 64, with SwiGLU)"
    )
    num_attention_heads: int = flag(12, "number of query heads")
    num_query_groups: int | None = flag(
        None, "number of key/value heads, GQA (default: as many as query heads)"
    )
    kv_channels: int | None = flag(None, "head dimension (default: hidden size / heads)")
    seq_length: int = flag(8192, "tokens in one training sequence")
    normalization: str = flag("RMSNorm", "norm module", choices=("RMSNorm", "LayerNorm"))
    norm_epsilon: float = flag(1e-5, "epsilon of the norm")
    swiglu: bool = flag(True, "SwiGLU MLP; --no-swiglu gives GELU")
    add_bias_linear: bool = flag(False, "biases in the linear layers")
    position_embedding_type: str = flag("rope", "position encoding", choices=("rope", "none"))
    rotary_base: float = flag(10000.0, "base of the rotary frequencies")
    untie_embeddings_and_output_weights: bool = flag(
        False, "separate weights for the embedding and the output layer"
    )
    init_method_std: float = flag(
        0.02,
        "standard deviation of the initial weights (divided by sqrt(2 x layers) for the"
        " projections that write to the residual stream)",
    )
    make_vocab_size_divisible_by: int = flag(128, "pad the vocabulary to a multiple of this")
    transformer_impl: str = flag(
        "local",
        "layer modules; auto takes Transformer Engine where it is installed and there is a GPU",
        choices=("local", "transformer_engine", "auto"),
    )


@dataclass(frozen=True)
class AttentionConfig:
    """The attention pattern (LongNet, arXiv 2307.02486, section 3.2)."""

    attention: str = flag("dilated", "kind of attention", choices=("dilated", "dense"))
    segment_lengths: tuple[int, ...] | None = flag(
        None,
        "segment length of each branch (default: a ladder 2048 x 4^k up to the sequence length,"
        " with dilation rates 4^k)",
        item=int,
    )
    dilation_rates: tuple[int, ...] | None = flag(None, "dilation rate of each branch", item=int)
    head_offsets: str | tuple[tuple[int, ...], ...] = flag(
        "mod",
        "which positions a head takes in a branch: mod (kv head mod r, the paper's rule), block"
        " (torchscale's), layer (mod, shifted by the kv heads each layer), or a table of branches"
        " x heads as JSON",
        is_json=True,
    )

    def pattern(self) -> DilatedPattern:
        """The dilated pattern that these fields describe (after `resolve`)."""
        assert self.segment_lengths is not None and self.dilation_rates is not None
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, optimizer, schedule, precision."""

    micro_batch_size: int = flag(1, "sequences in one forward pass on one rank")
    global_batch_size: int | None = flag(
        None, "sequences in one optimizer step (default: micro batch x data-parallel ranks)"
    )
    train_iters: int = flag(1000, "optimizer steps")
    lr: float = flag(6e-4, "peak learning rate")
    min_lr: float = flag(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = flag(
        "polynomial", "shape of the decay", choices=("polynomial", "cosine", "constant")
    )
    lr_decay_power: float = flag(1.0, "power of the polynomial decay; 1 is linear")
    lr_decay_iters: int | None = flag(None, "iteration at which the decay ends (default: the last)")
    lr_warmup_iters: int = flag(0, "iterations of linear warm-up")
    weight_decay: float = flag(0.01, "AdamW weight decay, on matrices only")
    clip_grad: float = flag(1.0, "clip the global gradient norm to this; 0 turns it off")
    adam_beta1: float = flag(0.9, "Adam's beta1")
    adam_beta2: float = flag(0.98, "Adam's beta2")
    adam_eps: float = flag(1e-8, "Adam's epsilon")
    precision: str = flag("bf16", "number format of the model", choices=("fp32", "bf16", "fp16"))
    loss_scale: float | None = flag(None, "static loss scale for fp16 (default: dynamic)")
    initial_loss_scale: float = flag(2.0**16, "first dynamic loss scale for fp16, a power of two")
    seed: int = flag(1234, "seed of the initial weights and of the data order")
    deepspeed_config: str | None = flag(
        None, "JSON file with further DeepSpeed settings, merged with those of the flags"
    )


@dataclass(frozen=True)
class DataConfig:
    """Tokens in, and how they are divided."""

    data_path: str | None = flag(None, "prefix of the .bin/.idx pair of tools/preprocess_data.py")
    split: str = flag("969,30,1", "shares of the documents for training, validation, test")
    tokenizer_type: str = flag(
        "SentencePieceTokenizer",
        "tokenizer",
        choices=("SentencePieceTokenizer", "ByteTokenizer", "HuggingFaceTokenizer"),
    )
    tokenizer_model: str | None = flag(None, "file (or folder) of the tokenizer")


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its things, and how often it looks up."""

    save: str | None = flag(None, "run folder: checkpoints, metrics.jsonl, config.yaml")
    load: str | None = flag(None, "run folder to resume from")
    load_fallback: bool = flag(
        False, "where the newest checkpoint is damaged, go on from the newest sound one before it"
    )
    verify_checkpoint: bool = flag(
        True,
        "compare a checkpoint with its hashes before loading it (--no-verify-checkpoint: don't)",
    )
    save_interval: int = flag(1000, "iterations between checkpoints; the last is always saved")
    async_save: bool = flag(
        False, "copy a checkpoint to host memory, and write it while the training goes on"
    )
    keep_last: int | None = flag(None, "checkpoints to keep, the older are removed (default: all)")
    keep_every: int | None = flag(
        None, "with --keep-last: keep also those whose iteration is a multiple of this"
    )
    log_interval: int = flag(1, "iterations between log lines; the mean of their losses is logged")
    eval_interval: int = flag(1000, "iterations between evaluations; there is one at the end")
    eval_iters: int = flag(10, "global batches in one evaluation; 0 is the whole split")
    full_validation: bool = flag(False, "the evaluation at the end covers the whole split")
    tensorboard_dir: str | None = flag(
        None, "TensorBoard folder (default: tensorboard/ in the run folder)"
    )
    exit_duration_in_mins: int | None = flag(
        None, "minutes after which the run saves a checkpoint and ends, as it does on SIGTERM"
    )
    distributed_timeout_minutes: int = flag(
        10, "minutes that a rank waits for the others in a collective before it gives the run up"
    )


@dataclass(frozen=True)
class Config:
    """Everything a run is, by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def resolve(self, world_size: int) -> Config:
        """The same configuration with every default that depends on another field filled in.

        Raises ConfigError where the result cannot work on `world_size` ranks.
        """
        data_parallel_size = self.parallel.data_parallel_size(world_size)
        resolved = dataclasses.replace(
            self,
            model=_resolve_model(self.model),
            attention=_resolve_attention(self.attention, self.model.seq_length),
            parallel=_resolve_parallel(self.parallel),
            training=_resolve_training(self.training, data_parallel_size),
            run=_resolve_run(self.run),
        )
        _check_model(resolved.model)
        _check_attention(resolved)
        _check_training(resolved.training, data_parallel_size)
        resolved.parallel.check(
            resolved.model,
            resolved.training.global_batch_size,
            resolved.num_microbatches(data_parallel_size),
        )
        _check_run(resolved)
        return resolved

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro batches of one optimizer step on one rank (after `resolve`)."""
        assert self.training.global_batch_size is not None
        return self.training.global_batch_size // (
            self.training.micro_batch_size * data_parallel_size
        )


def world_size() -> int:
    """Number of processes of this launch, as torchrun and the deepspeed launcher announce it.

    Raises ConfigError where SLURM started several processes that do not know of each other.
    """
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in os.environ and int(tasks) > 1:
        raise ConfigError(
            f"srun started {tasks} processes without RANK, WORLD_SIZE and MASTER_ADDR: start one"
            " torchrun a node (srun --ntasks-per-node=1 torchrun ...), or set the three"
        )
    return 1


# Filling in the defaults that depend on other fields.


def _resolve_model(model: ModelConfig) -> ModelConfig:
    require_positive(model, "num_layers", "hidden_size", "num_attention_heads", "seq_length")
    ffn_hidden_size = model.ffn_hidden_size
    if ffn_hidden_size is None:
        # A gated MLP has three matrices instead of two: 8/3 of the width keeps the parameters.
        third = math.ceil(8 * model.hidden_size / 3 / 64) * 64
        ffn_hidden_size = third if model.swiglu else 4 * model.hidden_size
    kv_channels = model.kv_channels
    if kv_channels is None:
        if model.hidden_size % model.num_attention_heads:
            raise ConfigError(
                f"--hidden-size {model.hidden_size} does not divide by --num-attention-heads"
                f" {model.num_attention_heads}: change one of them, or set --kv-channels"
            )
        kv_channels = model.hidden_size // model.num_attention_heads
    return dataclasses.replace(
        model,
        ffn_hidden_size=ffn_hidden_size,
        kv_channels=kv_channels,
        num_query_groups=_default(model.num_query_groups, model.num_attention_heads),
    )


def _resolve_attention(attention: AttentionConfig, seq_length: int) -> AttentionConfig:
    lengths, rates = attention.segment_lengths, attention.dilation_rates
    if (lengths is None) != (rates is None):
        given, missing = ("--segment-lengths", "--dilation-rates")[:: 1 if rates is None else -1]
        raise ConfigError(f"{given} is given without {missing}: give both, or neither")
    if lengths is None:
        ladder = DilatedPattern.geometric(seq_length)
        lengths, rates = ladder.segment_lengths, ladder.dilation_rates
    return dataclasses.replace(
        attention, segment_lengths=tuple(lengths), dilation_rates=tuple(rates)
    )


def _resolve_training(training: TrainingConfig, data_parallel_size: int) -> TrainingConfig:
    require_positive(training, "micro_batch_size", "train_iters")
    return dataclasses.replace(
        training,
        global_batch_size=_default(
            training.global_batch_size, training.micro_batch_size * data_parallel_size
        ),
        lr_decay_iters=_default(training.lr_decay_iters, training.train_iters),
    )


def _resolve_parallel(parallel: ParallelConfig) -> ParallelConfig:
    # DeepSpeed cannot run a backward pass that it does not own without a ZeRO optimizer; stage 1 on
    # one rank is the same arithmetic.
    return dataclasses.replace(parallel, zero_stage=max(1, parallel.zero_stage))


def _resolve_run(run: RunConfig) -> RunConfig:
    tensorboard_dir = run.tensorboard_dir
    if tensorboard_dir is None and run.save is not None:
        tensorboard_dir = os.path.join(run.save, "tensorboard")
    return dataclasses.replace(run, tensorboard_dir=tensorboard_dir)


# The rules. Each names the flags and what to set instead.


def _check_model(model: ModelConfig) -> None:
    assert model.num_query_groups is not None and model.kv_channels is not None
    require_positive(
        model, "ffn_hidden_size", "kv_channels", "num_query_groups", "make_vocab_size_divisible_by"
    )
    require_more_than_zero(model, "norm_epsilon", "rotary_base", "init_method_std")
    if model.num_attention_heads % model.num_query_groups:
        raise ConfigError(
            f"--num-attention-heads {model.num_attention_heads} does not divide by"
            f" --num-query-groups {model.num_query_groups}: every key/value head serves the same"
            " number of query heads"
        )
    if model.position_embedding_type == "rope" and model.kv_channels % 2:
        raise ConfigError(
            f"rotary positions turn pairs of channels, and the head dimension is"
            f" {model.kv_channels}: set an even --kv-channels, or --position-embedding-type none"
        )


def _check_attention(config: Config) -> None:
    lengths, rates = config.attention.segment_lengths, config.attention.dilation_rates
    assert lengths is not None and rates is not None
    if len(lengths) != len(rates):
        raise ConfigError(
            f"--segment-lengths has {len(lengths)} values and --dilation-rates {len(rates)}:"
            " a branch is one of each"
        )
    backend = os.environ.get(BACKEND_VARIABLE) or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"{BACKEND_VARIABLE}={backend}: choose auto, {', '.join(BACKENDS)}")
    try:
        pattern = config.attention.pattern()
        pattern.offsets(config.model.num_attention_heads, config.model.num_query_groups)
    except ValueError as error:
        raise ConfigError(
            f"--segment-lengths, --dilation-rates or --head-offsets: {error}"
        ) from error


def _check_training(training: TrainingConfig, data_parallel_size: int) -> None:
    assert training.global_batch_size is not None and training.lr_decay_iters is not None
    step = training.micro_batch_size * data_parallel_size
    if training.global_batch_size <= 0 or training.global_batch_size % step:
        larger = (training.global_batch_size // step + 1) * step
        raise ConfigError(
            f"--global-batch-size {training.global_batch_size} does not divide by"
            f" --micro-batch-size {training.micro_batch_size} x {data_parallel_size} data-parallel"
            f" ranks: set --global-batch-size {larger}, or change the other two"
        )
    require_more_than_zero(training, "lr", "lr_decay_power")
    if not 0 <= training.seed < 2**32:
        raise ConfigError(f"--seed {training.seed} must lie in [0, 2^32)")
    if not 0 <= training.lr_warmup_iters <= training.lr_decay_iters:
        raise ConfigError(
            f"--lr-warmup-iters {training.lr_warmup_iters} must lie between 0 and --lr-decay-iters"
            f" {training.lr_decay_iters}"
        )
    if not 0 <= training.min_lr <= training.lr:
        raise ConfigError(f"--min-lr {training.min_lr} must lie between 0 and --lr {training.lr}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, name) < 1:
            raise ConfigError(f"{flag_name(name)} must lie in [0, 1)")
    for name in ("clip_grad", "weight_decay", "adam_eps"):
        if not 0 <= getattr(training, name) < math.inf:
            raise ConfigError(f"{flag_name(name)} must be a number and not negative")
    if training.loss_scale is not None and training.loss_scale <= 0:
        raise ConfigError(f"--loss-scale {training.loss_scale} must be positive")
    if training.initial_loss_scale < 1 or math.log2(training.initial_loss_scale) % 1:
        raise ConfigError(
            f"--initial-loss-scale {training.initial_loss_scale:g} must be a power of two"
        )


def _check_run(config: Config) -> None:
    run = config.run
    require_positive(
        run, "save_interval", "log_interval", "eval_interval", "distributed_timeout_minutes"
    )
    for name in ("exit_duration_in_mins", "keep_last", "keep_every"):
        if getattr(run, name) is not None:
            require_positive(run, name)
    for name in ("async_save", "keep_last", "keep_every"):
        if getattr(run, name) and run.save is None:
            raise ConfigError(
                f"{flag_name(name)} is about checkpoints: set --save, or leave it out"
            )
    if run.keep_every is not None and run.keep_last is None:
        raise ConfigError(
            f"--keep-every {run.keep_every} says which old checkpoints stay, and without"
            " --keep-last all do: set --keep-last too"
        )
    if run.keep_every is not None and run.keep_every % run.save_interval:
        raise ConfigError(
            f"--keep-every {run.keep_every} is not a multiple of --save-interval"
            f" {run.save_interval}: set --keep-every"
            f" {-(-run.keep_every // run.save_interval) * run.save_interval}"
        )
    if run.eval_iters < 0:
        raise ConfigError(
            f"--eval-iters {run.eval_iters} must not be negative; 0 is the whole split"
        )
    if config.data.data_path is None:
        raise ConfigError("--data-path is missing: the prefix that tools/preprocess_data.py wrote")
    if config.data.tokenizer_model is None and config.data.tokenizer_type != "ByteTokenizer":
        raise ConfigError(
            f"--tokenizer-model is missing: {config.data.tokenizer_type} needs the file that"
            " tools/train_tokenizer.py wrote (ByteTokenizer needs none)"
        )


def _default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
