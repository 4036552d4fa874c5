"""What the stages of a run are, and what each costs: said without building anything."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

from megalong.config import Config, DataConfig, ModelConfig, unused, world_size
from megalong.config.flags import shown
from megalong.config.memory import PIECES
from megalong.config.model import ROPE_FIELDS, scaling_oddities
from megalong.config.stages import DATA_TO_COME, Recipe, Stage
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.model.flops import executed_flops
from megalong.training.learning_rate import learning_rate
from megalong.utils.errors import aligned, counted
from megalong.utils.progress import human_flops

_HEAD = ("stage", "sequence", "batch", "iterations", "tokens", "FLOPs executed", "share")
# What is said besides of what is read, and how it is computed, where it is not the default.
_READING = (
    "sample_mode", "length_upsampling", "document_attention", "eod_mask_loss", "valid_data_path",
)  # fmt: skip
_COMPUTING = ("memory_path", *PIECES)


def print_stages(recipe: Recipe) -> None:
    """Print the table, on one rank; the data need not be there, or said. Raises UserError where a
    stage cannot work, or there is no tokenizer, whose vocabulary counts."""
    launched = "RANK" in os.environ
    ranks = recipe.dry_run or (world_size() if launched else recipe.fewest_ranks)
    stages = recipe.with_data_to_come().resolve(ranks)
    if os.environ.get("RANK", "0") == "0":
        print(stage_table(stages, _vocabulary(stages[0].config), ranks))


def stage_table(stages: tuple[Stage, ...], vocab_size: int, ranks: int) -> str:
    """Return a line for each stage, what each is, and what is to be said of all."""
    flops = [stage.iterations * _step_flops(stage.config, vocab_size) for stage in stages]
    rows = [_HEAD]
    for stage, cost in zip(stages, flops, strict=True):
        rows.append(
            (
                stage.name or "(the run)",
                f"{stage.config.model.seq_length:,}",
                f"{stage.config.training.global_batch_size:,}",
                f"{stage.iterations:,}",
                f"{stage.tokens:,}",
                human_flops(cost),
                f"{cost / sum(flops):.1%}",
            )
        )
    tokens = sum(stage.tokens for stage in stages)
    lines = [
        aligned(rows, words=(0,)),
        "",
        *_aspects(stages, ranks),
        "",
        f"{counted(stages[-1].end, 'iteration')}, {tokens:,} tokens, {human_flops(sum(flops))}, on"
        f" {counted(ranks, 'rank')}",
    ]
    if len(stages) > 1:
        throughout = tokens * flops[-1] / stages[-1].tokens
        lines.append(
            f"as many tokens in sequences of the last stage throughout: {human_flops(throughout)},"
            f" {throughout / sum(flops):.2f} times as much"
        )
    if any(stage.config.memory.memory_path == "auto" for stage in stages):
        lines.append(
            "where --memory-path auto computes more a second time, which the memory of the device"
            " decides, that is not in these numbers"
        )
    for stage in stages:
        oddities = stage.config.attention.oddities(stage.config.model.seq_length)
        oddities += scaling_oddities(stage.config.model)
        of = f"stage {stage.name}: " if stage.name else ""
        lines += [*stage.notes, *(of + line for line in [*oddities, *unused(stage.given)])]
    return "\n".join(lines)


def _aspects(stages: Sequence[Stage], ranks: int) -> list[str]:
    """What the stages are, side by side in each respect, and once where all are the same."""
    rows = []
    for aspect, words in (
        ("attention", [stage.config.attention.description for stage in stages]),
        ("positions", [_positions(stage.config.model) for stage in stages]),
        ("learning rate", [_rates(stage) for stage in stages]),
        ("data", [_data(stage.config.data) for stage in stages]),
        ("layout", [_layout(stage.config, ranks) for stage in stages]),
    ):
        names = [stage.name or "" for stage in stages]
        if len({*words}) == 1:
            names = ["all" if len(stages) > 1 else ""]
        for number, name in enumerate(names):
            rows.append((aspect if number == 0 else "", name, words[number]))
    return aligned(rows, words=(0, 1, 2)).splitlines()


def _step_flops(config: Config, vocab_size: int) -> int:
    """That all ranks together execute in a step."""
    memory = config.memory
    if memory.memory_path == "auto":
        memory = memory.with_pieces(False, config.model, config.parallel)
    settled = dataclasses.replace(config, memory=memory)
    return sum(executed_flops(settled, vocab_size).values())


def _rates(stage: Stage) -> str:
    """ "0.0006 to 6e-05, cosine, warm-up 100"."""
    training = stage.config.training
    style, decay_end = training.lr_decay_style, training.lr_decay_iters
    words = [f"{training.lr:.2g}, constant"]
    if style != "constant":
        words = [f"{training.lr:.2g} to {learning_rate(stage.end, training):.2g}, {style}"]
        if style == "WSD":
            words.append(
                f"{training.lr_wsd_decay_style} in the last {training.lr_wsd_decay_iters:,}"
            )
        if style == "polynomial" and training.lr_decay_power != 1:
            words.append(f"power {training.lr_decay_power:g}")
        if decay_end != stage.iterations:
            words.append(f"decay to its iteration {decay_end:,}")
    if training.lr_warmup_iters:
        words.append(f"warm-up {training.lr_warmup_iters:,}")
    return ", ".join(words)


def _positions(model: ModelConfig) -> str:
    """ "rope, rotary_base 40000.0, rotary_ntk_factor 2.0"."""
    words = [model.position_embedding_type]
    if model.has_rotary_positions:
        words.append(f"rotary_base {shown(model.rotary_base)}")
    others = [name for name in ROPE_FIELDS if name != "rotary_base"]
    if model.rope_scaling_factor is not None:
        others.remove("rope_original_length")  # its default counts, too
        words.append(f"rope_original_length {model.rope_original_length}")
    return ", ".join([*words, *_set(model, [*others, "xpos_scale_base"])])


def _data(data: DataConfig) -> str:
    """ "code 0.7, books 0.3, document_attention isolated"."""
    words = []
    for source in data.training_sources():
        amount = f"{float(source.amount):g}"
        if source.unit == "weight":
            words.append(f"{source.name} {amount}")
        elif source.unit == "epochs" and source.amount == 1:
            words.append("(not given)" if source.name == DATA_TO_COME else source.name)
        else:
            words.append(f"{source.name} {amount} {source.unit}")
    return ", ".join([*words, *_set(data, _READING)])


def _layout(config: Config, ranks: int) -> str:
    """ "sequence 2 x tensor 1 x pipeline 1 x data 1, ZeRO 1, micro batch 2"."""
    parallel = config.parallel
    words = [
        f"sequence {parallel.sequence_parallel_size} x tensor {parallel.tensor_model_parallel_size}"
        f" x pipeline {parallel.pipeline_model_parallel_size}"
        f" x data {parallel.data_parallel_size(ranks)}",
        f"ZeRO {parallel.zero_stage}",
        f"micro batch {config.training.micro_batch_size:,}",
    ]
    words += _set(parallel, ["num_layers_per_virtual_pipeline_stage", "recompute_granularity"])
    return ", ".join([*words, *_set(config.memory, _COMPUTING)])


def _set(section: Any, names: Iterable[str]) -> list[str]:
    """Those of these fields that have not their default, with their values."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    values = {name: getattr(section, name) for name in names}
    return [f"{name} {shown(value)}" for name, value in values.items() if value != defaults[name]]


def _vocabulary(config: Config) -> int:
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    return (tokenizer if config.training.causal else tokenizer.with_mask()).vocab_size
