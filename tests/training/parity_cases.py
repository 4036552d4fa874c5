"""What is trained in the layouts that are compared with one process: a case is (layout, ZeRO stage,
model), each model a set of flags. `parity_worker` trains them.
"""

from __future__ import annotations

from pathlib import Path

# Adam with its usual epsilon forgets the scale of the gradients, so that a wrong scale would go
# unseen in the weights, and blows a rounding difference in a vanishing gradient (a key's bias) up
# to a whole step. With an epsilon of the gradients' own size a weight says what its gradient was.
OPTIMIZER = {"adam_eps": 1e-3, "lr": 1e-2}

# No adaptive step: weights move by the gradients, summed up.
SGD = {"optimizer": "sgd", "sgd_momentum": 0.8, "lr": 0.3}

# As large a step for matrices as Adam's here: an orthogonalized matrix forgets scales, too.
MUON = {"optimizer": "muon"}

# What is trained. The lengths fit 128 tokens on up to four sequence ranks: local branches, one over
# two ranks, one over all, and a rate that divides neither shard nor segment.
BRANCHES = {"segment_lengths": "16 32 64 128", "dilation_rates": "1 2 3 5"}
ALL_KINDS = {
    **BRANCHES,
    "attention": "local dilated dense sparse",
    "window_size": 50,
    "sparse_block_size": 20,
    "sparse_columns": 3,
    "num_layers": 4,
}
MODELS = {
    "tied": {
        **BRANCHES,
        "head_offsets": "layer",
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 32,
    },
    "untied gelu layernorm bias": {
        **BRANCHES,
        "no_swiglu": True,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "sub_layer_norm": True,
        "position_embedding_type": "xpos",
        "xpos_scale_base": 50,
        "untie_embeddings_and_output_weights": True,
        "z_loss_coeff": 0.02,
        "sample_temperature": 1.0,
    },
    "dense": {"attention": "dense"},
    "all kinds": ALL_KINDS,
    # Bidirectional attention of all kinds, and as many predictions as the masks happen to have; of
    # documents that are kept apart.
    "mlm": {**ALL_KINDS, "objective": "mlm", "mask_rate": 0.2, "document_attention": "isolated"},
    "isolated": {
        **BRANCHES,
        "attention": "dilated local",
        "window_size": 50,
        "rotary_seq_len_interpolation_factor": 4.0,
        "document_attention": "isolated",
        "eod_mask_loss": True,
    },
    # Data with a loss mask (`write_masked_documents`), by which a sequence has two predictions, or
    # none; `trained_by_hand` is what it has to come to.
    "masked": {
        **BRANCHES,
        **SGD,
        "sample_mode": "document",
        "weight_decay": 0,
        "clip_grad": 0,
    },
    "bf16": {"precision": "bf16", "qk_layernorm": True},
    "fp16": {"precision": "fp16", "initial_loss_scale": 1024, "qk_layernorm": True},
    "recompute selective": {"recompute_granularity": "selective", "qk_layernorm": True},
    "recompute full": {"recompute_granularity": "full"},
    "whole norms": {"no_sequence_parallel": True, "qk_layernorm": True, "sub_layer_norm": True},
    "sgd": {**BRANCHES, **SGD},
    "muon": {**BRANCHES, **MUON, "num_layers": 4, "qk_layernorm": True, "add_qkv_bias": True},
    "muon, other settings": {
        **BRANCHES,
        **MUON,
        "no_muon_split_qkv": True,
        "no_muon_nesterov": True,
        "muon_scale_mode": "unit_rms_norm",
    },
    "offloaded optimizer": {"deepspeed_config": Path(__file__).parent / "offload.json"},
}

BOTH = list(MODELS)[:2]

# These two, and their copies, are evaluated on a task too, whose answers lie on two shards, in
# samples that are shorter than the sequence; and continue prompts, from one shard into another.
TASK = {
    "sample_prompts": f"a {'bcd' * 21}",
    "sample_tokens": 2,
    "eval_tasks": "copy",
    "eval_task_style": "ids",
    "eval_task_lengths": 104,
    "eval_task_samples": 3,
}
LOW_PRECISION = ("bf16", "fp16")

# The same models, computed otherwise; `flags_of` adds the sizes of chunks and tiles.
WITHOUT_LOGITS = {"linear_cross_entropy": True}
MEMORY_PATH = {"memory_path": "on"}
RECOMPUTED = {**MEMORY_PATH, "recompute_granularity": "full"}
HALVES = {  # one half of a layer at a time
    "tiled MLP": {"tiled_mlp": True, "recompute_granularity": "full"},
    "tiled attention": {"tiled_attention": True, "attention_head_groups": 1},
}
# A copy -> the model that it has to equal, and how it is computed.
COPIES = {
    **{f"{model}, without logits": (model, WITHOUT_LOGITS) for model in list(MODELS)[:2]},
    **{f"{model}, memory path": (model, MEMORY_PATH) for model in MODELS},
    **{f"{model}, memory path, recomputed": (model, RECOMPUTED) for model in MODELS},
    **{f"tied, {half}": ("tied", flags) for half, flags in HALVES.items()},
    "isolated, recomputed": ("isolated", {"recompute_granularity": "full"}),
    "isolated, attention recomputed": ("isolated", {"recompute_granularity": "selective"}),
    "isolated, tiled MLP": ("isolated", HALVES["tiled MLP"]),
}
# DeepSpeed leaves weights as small as these whole, and whole ones for a while, unless it is told.
DIVIDED_WEIGHTS = {"deepspeed_config": Path(__file__).parent / "divided_weights.json"}
TILED_LAYOUTS = (
    ("one", 1), ("one vp", 1), ("sp2", 1), ("tp2", 1), ("pp2", 1), ("pp2 vp1", 1), ("dp2", 3),
    ("sp2", 3), ("tp2", 3), ("sp4", 1), ("sp2 tp2", 1), ("sp2 dp2", 3), ("sp2 pp2 vp1", 1),
    ("sp2 tp2 pp2", 1), ("sp2 tp2 dp2", 3),
)  # fmt: skip
COPY_CASES = [
    *((layout, 1, f"{model}, without logits") for layout in ("tp2", "pp2") for model in BOTH),
    *(
        (*where, f"{model}, memory path{how}")
        for where in TILED_LAYOUTS
        for model, how in zip(BOTH, ("", ", recomputed"), strict=True)
    ),
    ("sp2 tp2 pp2", 1, "tied, memory path, recomputed"),
    *((layout, 1, f"tied, {half}") for layout in ("one", "tp2") for half in HALVES),
    *((layout, 1, "dense, memory path") for layout in ("one", "sp2", "tp2")),
    *(
        (layout, 1, f"{m}, memory path")
        for m in ("all kinds", "mlm")
        for layout in ("one", "sp2", "tp2")
    ),
    ("sp2", 1, "isolated, memory path, recomputed"),
    *(
        ("one", 1, f"isolated, {how}")
        for how in ("memory path", "recomputed", "attention recomputed", "tiled MLP")
    ),
    *(("tp2", 1, f"whole norms, memory path{how}") for how in ("", ", recomputed")),
    *((where, 1, f"{dtype}, memory path") for where in ("one", "tp2") for dtype in LOW_PRECISION),
]

# Model -> layouts with whose axis it has nothing to do.
WITHOUT = {
    "dense": ("dp2",),
    "recompute selective": ("dp2",),
    "recompute full": ("dp2",),
    "whole norms": ("dp2", "sp2", "pp2"),
    "isolated": ("tp2", "pp2"),
    "masked": ("tp2",),
    "muon, other settings": ("dp2", "sp2", "pp2"),
}
# Each with ZeRO 2 and 3, each of these on every axis.
DIVIDED_OPTIMIZERS = [
    ("dp2", 2, "sgd"), ("sp2", 3, "sgd"), ("tp2", 3, "sgd"),
    ("dp2", 3, "offloaded optimizer"), ("sp2", 2, "offloaded optimizer"),
    ("tp2", 2, "offloaded optimizer"),
]  # fmt: skip

# Matrices that are cut by the axes together, over four partitions, and a stage that has neither
# embedding nor output layer.
MUON_CASES = [
    *((layout, 2, "muon") for layout in ("dp2", "sp2", "tp2")),
    ("pp4", 1, "muon"), ("sp2 tp2 pp2", 1, "muon"), ("sp2 tp2 dp2", 2, "muon"),
]  # fmt: skip

# Beside those on two ranks.
KINDS_LAYOUTS = (
    ("one vp", 1), ("sp4", 1), ("sp8", 1), ("sp2 tp2", 1), ("sp2 pp2", 1), ("sp2 pp2 vp1", 1),
    ("sp2 dp2", 3),
)  # fmt: skip
KINDS_CASES = [(*where, model) for model in ("all kinds", "mlm") for where in KINDS_LAYOUTS]
KINDS_CASES += [(layout, 1, "isolated") for layout in ("one vp", "sp4", "sp2 tp2", "sp2 pp2 vp1")]

# Layouts and models that others among the cases have, in other pairs: `make test-long`.
SELDOM = {
    *((layout, 2, "tied") for layout in ("sp4", "sp2 tp2", "sp2 dp2", "sp4 tp2", "sp2 tp2 dp2")),
    *(
        (layout, 1, BOTH[1])
        for layout in ("sp2 pp2", "sp2 dp2", "pp2 dp2", "sp4 tp2", "sp2 tp2 dp2")
    ),
    *((layout, 1, "fp16") for layout in ("dp2", "sp2")),
    *((layout, 1, model) for layout in ("sp2", "tp2") for model in ("sgd", "offloaded optimizer")),
    *(("sp2 pp2", 1, model) for model in ("all kinds", "mlm")),
    *((layout, 1, "mlm") for layout in ("sp4", "sp8")),
    *((*where, f"{BOTH[0]}, memory path") for where in TILED_LAYOUTS[1::2]),
    *((*where, f"{BOTH[1]}, memory path, recomputed") for where in TILED_LAYOUTS[2::2]),
    # Axes, ZeRO stages and models that meet on fewer ranks, and on as many in another pair.
    ("sp4 tp2", 3, "tied"), ("sp2 tp2 dp2", 1, "tied"), ("sp2 tp2 pp2", 1, BOTH[1]),
    ("sp2 tp2 dp2", 3, "tied, memory path"), ("sp2 tp2 pp2", 1, "tied, memory path, recomputed"),
    ("sp4", 3, "tied"), ("sp2 tp2", 3, "tied"), ("sp2 dp2", 1, "tied"),
    ("sp2 pp2 vp1", 1, BOTH[1]), ("pp2 vp1 dp2", 1, BOTH[1]),
    ("sp2 tp2", 1, "all kinds"), ("sp2 dp2", 3, "all kinds"), ("sp2 pp2 vp1", 1, "mlm"),
    ("sp2 tp2", 1, "isolated"), ("sp2 pp2 vp1", 1, "tied, memory path"),
    ("sp2", 2, "tied"), ("tp2", 2, "tied"), ("dp2", 1, "all kinds"), ("pp2", 1, "all kinds"),
    *(("pp2", 1, model) for model in ("dense", "recompute selective", "fp16", "sgd")),
    ("sp2", 1, "recompute selective"), ("pp2", 1, "offloaded optimizer"),
    ("sp2", 2, "offloaded optimizer"), ("tp2", 1, "whole norms, memory path"),
    ("tp2", 1, "fp16, memory path"), ("tp2", 1, "dense, memory path"),
    ("tp2", 1, "mlm, memory path"), ("tp2", 1, "tied, without logits"),
    ("pp2", 1, f"{BOTH[1]}, without logits"),
    ("dp2", 1, "muon"), ("sp2", 2, "muon"), ("tp2", 1, "muon"), ("sp2 tp2 pp2", 1, "muon"),
}  # fmt: skip

AXES = {
    "sp": "sequence_parallel_size",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "num_layers_per_virtual_pipeline_stage",  # the interleaved schedule
}

# Layout -> ranks. dp is what the rest leaves.
LAYOUTS = {
    "one": 1,
    "one vp": 1,  # what the interleaved layouts are compared with
    "dp2": 2,
    "sp2": 2,
    "tp2": 2,
    "pp2": 2,
    "pp2 vp1": 2,
    "sp4": 4,
    "sp2 tp2": 4,
    "sp2 pp2": 4,
    "tp2 pp2": 4,
    "sp2 pp2 vp1": 4,
    "sp2 dp2": 4,
    "pp2 dp2": 4,
    "pp4": 4,
    "pp2 vp1 dp2": 4,
    "sp4 tp2": 8,
    "sp2 tp2 pp2": 8,
    "sp2 tp2 dp2": 8,
    "sp8": 8,
}


def cases(which: str = "usual") -> list[tuple[str, int, str]]:
    """(layout, ZeRO stage, model): the first two models in every layout, the first of them with
    every ZeRO stage that there is; the others on two ranks, where most of it shows; the copies on
    few. But for those of `SELDOM`, or of "seldom" these alone."""
    found = []
    for layout, ranks in LAYOUTS.items():
        models = list(MODELS) if ranks <= 2 and "vp" not in layout else BOTH
        if layout in ("sp8", "pp4"):  # the kinds' and Muon's only
            continue
        stages = (1,) if "pp" in layout or "vp" in layout else (1, 2, 3)
        found += [(layout, 1, model) for model in models if layout not in WITHOUT.get(model, ())]
        found += [(layout, stage, "tied") for stage in stages[1:]]
        if ranks == 2:
            found += [(layout, stage, "bf16") for stage in stages[1:]]
    found += [*DIVIDED_OPTIMIZERS, *MUON_CASES, *KINDS_CASES, *COPY_CASES]
    return [case for case in found if (case in SELDOM) == (which == "seldom")]


def flags_of(layout: str, stage: int, model: str) -> dict[str, object]:
    axes = {AXES[word[:2]]: int(word[2:]) for word in layout.split() if word[:-1] in AXES}
    sizes = {
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "num_layers": 4 if "vp" in layout else 2,
    }
    if model in COPIES:
        copied, how = COPIES[model]
        flags = MODELS[copied] | how | (DIVIDED_WEIGHTS if stage == 3 else {})
        # Three of each in a shard, the last one shorter.
        tokens = 128 // axes.get(AXES["sp"], 1)
        flags |= {"tile_size": tokens * 3 // 8, "loss_chunk_size": tokens * 7 // 16}
    else:
        flags = MODELS[model]
    if COPIES.get(model, (model,))[0] in BOTH:
        flags = {**flags, **TASK}
    return {**OPTIMIZER, **sizes, **flags, **axes, "zero_stage": stage}
