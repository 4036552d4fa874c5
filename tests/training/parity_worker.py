"""Two training steps for each case, on however many ranks this was started with.

    parity_worker.py CORPUS FILE [usual|seldom|kinds]

Rank 0 writes {case: (losses, grad norms, weights by canonical name, evaluation)} to the file, where
a case is (layout, ZeRO stage, model).
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.config import world_size
from megalong.config.arguments import parse_arguments
from megalong.data.batches import evaluation_batches, training_batches
from megalong.model.build import build_model
from megalong.model.names import named_parameters
from megalong.model.tensor_slices import join_slices
from megalong.parallel import process_group, temporary_mesh
from megalong.training.engine import TrainingEngine, weights_divider
from megalong.training.evaluation import evaluate
from megalong.training.learning_rate import learning_rate
from megalong.training.run_data import open_run_data
from megalong.training.samples import continued
from megalong.training.task_evaluation import evaluate_task
from tests.launching import small_run_flags

STEPS = 2

# Adam with its usual epsilon forgets the scale of the gradients, so that a wrong scale would go
# unseen in the weights, and blows a rounding difference in a vanishing gradient (a key's bias) up
# to a whole step. With an epsilon of the gradients' own size a weight says what its gradient was.
OPTIMIZER = {"adam_eps": 1e-3, "lr": 1e-2}

# No adaptive step: weights move by the gradients, summed up.
SGD = {"optimizer": "sgd", "sgd_momentum": 0.8, "lr": 0.3}

# As large a step for matrices as Adam's here: an orthogonalized matrix forgets scales, too.
MUON = {"optimizer": "muon"}
MUON_STEPS = 5

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

# Each in every layout of KINDS_LAYOUTS, in a launch of their own: `make test-long`.
KINDS = ("dilated dense", "local dilated dilated", "sparse", "dense", "sparse local")
MODELS_OF_KINDS = {f"kinds: {kinds}": {**ALL_KINDS, "attention": kinds} for kinds in KINDS} | {
    "kinds: mlm": {**ALL_KINDS, "objective": "mlm", "mask_rate": 0.2},
    "kinds: isolated": {**ALL_KINDS, "document_attention": "isolated", "eod_mask_loss": True},
}

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


def cases_of_kinds() -> list[tuple[str, int, str]]:
    """(layout, ZeRO stage, model) of the lists of kinds of attention."""
    layouts = (("one", 1), *KINDS_LAYOUTS, ("dp2", 1), ("dp2", 3))
    return [(*where, model) for model in MODELS_OF_KINDS for where in layouts]


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
        flags = (MODELS | MODELS_OF_KINDS)[model]
    if COPIES.get(model, (model,))[0] in BOTH:
        flags = {**flags, **TASK}
    return {**OPTIMIZER, **sizes, **flags, **axes, "zero_stage": stage}


def write_short_documents(prefix: Path) -> Path:
    """200 of 1 to 60 tokens, the last one always the same; so that a sequence has several."""
    draw = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in draw.integers(0, 60, 200):
        builder.add_document([*draw.integers(0, 256, length), 256], [length + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_masked_documents(prefix: Path) -> Path:
    """The same documents, with a mask by which some tokens count: those of `counts`."""
    tokens = np.fromfile(f"{write_short_documents(prefix)}.bin", np.uint16)
    counts(tokens).astype(np.uint8).tofile(f"{prefix}.loss")
    return prefix


def counts(tokens):
    """Two of a sequence on average, and of some sequences none."""
    return tokens % 64 == 3


def main(data_path: str, output: str, which: str = "usual") -> None:
    # DeepSpeed offers fp16 only to processors that compute in it; PyTorch does, on any.
    accelerator = get_accelerator()
    supported = [*accelerator.supported_dtypes(), torch.float16]
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: supported
    results = {}
    with process_group() as device:
        short = write_short_documents(Path(f"{output}-documents-{dist.get_rank()}"))
        masked = write_masked_documents(Path(f"{output}-masked-{dist.get_rank()}"))
        for case in cases_of_kinds() if which == "kinds" else cases(which):
            layout, stage, model = case
            if LAYOUTS[layout] != world_size():
                continue
            print(f"{time.monotonic():.0f}: {case}", flush=True)  # shown if a case fails or hangs
            flags = flags_of(layout, stage, model)
            data = short if "document_attention" in flags else Path(data_path)
            data = masked if model == "masked" else data
            flags = small_run_flags(data, **flags)
            config = parse_arguments(flags).resolve(world_size())
            with temporary_mesh(config, device) as mesh:
                results[case] = train(config, mesh)
                if case == ("one", 1, "masked"):
                    results["one", 1, "masked by hand"] = trained_by_hand(config, mesh)
        if mesh.is_main:
            torch.save(results, output)


def train(config, mesh):
    data = open_run_data(config)
    divide = weights_divider(config, mesh)
    model = build_model(config, data.tokenizer.vocab_size, mesh, divide=divide)
    engine = TrainingEngine(model, config, mesh)
    batches = training_batches(
        data.train,
        consumed_samples=0,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
        sequence_range=mesh.sequence_range(config.model.seq_length),
        masking=data.masking,
        documents=data.documents,
    )
    last = MUON_STEPS if config.training.optimizer == "muon" else STEPS
    steps = [
        engine.train_step(batches, learning_rate(i, config.training)) for i in range(1, last + 1)
    ]
    held_out = evaluation_batches(
        data.held_out["validation"],
        num_samples=3,  # more than a pipeline holds, and none for a last data-parallel rank
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
        sequence_range=mesh.sequence_range(config.model.seq_length),
        masking=data.masking,
        documents=data.documents,
    )
    evaluation = dataclasses.asdict(evaluate(engine, held_out, data.token_bytes, mesh))
    if data.tasks:
        [trials] = data.tasks
        evaluation["task"] = evaluate_task(engine, trials, mesh).record()
        evaluation["echoed"] = tokens_echoed(engine, data, mesh)
        evaluation["continued"] = continued(engine, data.prompts, config, mesh, 256, iteration=2)
    mine = {
        name: safe_get_full_fp32_param(parameter).cpu()
        for name, parameter in named_parameters(engine.model)
    }
    engine.deepspeed.destroy()  # its hooks keep model and process groups alive
    of_ranks = [None] * mesh.world_size
    dist.all_gather_object(of_ranks, (mesh.tensor_parallel_rank, mine))
    weights = {}
    for name in {name for _, theirs in of_ranks for name in theirs}:
        parts = {}
        for tensor_rank, theirs in of_ranks:
            if name in theirs:  # replicas must agree to the last bit
                known = parts.setdefault(tensor_rank, theirs[name])
                assert torch.equal(known, theirs[name]), name
        in_order = [parts[rank] for rank in sorted(parts)]
        weights[name] = join_slices(name, in_order, config.model)
    losses, norms = [step.loss for step in steps], [step.grad_norm for step in steps]
    losses += [step.z_loss for step in steps if step.z_loss is not None]
    return losses, norms, weights, evaluation


def trained_by_hand(config, mesh):
    """Losses, grad norms and weights of the same steps on masked data: the mean over what counts of
    the token losses of all sequences of a step at once, its gradient, and SGD with momentum."""
    data, training = open_run_data(config), config.training
    model = build_model(config, data.tokenizer.vocab_size, mesh)
    weights = dict(named_parameters(model))
    velocities = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    losses, norms = [], []
    for step in range(STEPS):
        first = step * training.global_batch_size
        samples = [data.train.sample(first + i) for i in range(training.global_batch_size)]
        tokens = torch.from_numpy(np.stack(samples))
        labels = tokens[:, 1:]
        counted = counts(labels)
        assert step or not counted.any(1).all()  # so that a micro batch has nothing to predict
        token_losses = model(
            input_ids=tokens[:, :-1],
            position_ids=torch.arange(labels.shape[1]),
            attention_mask=None,
            labels=labels,
        )
        loss = token_losses[counted].mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        losses.append(loss.item())
        norms.append(
            torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()
        )
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                velocities[name] = training.sgd_momentum * velocities[name] + gradient
                weight -= learning_rate(step + 1, training) * velocities[name]
    return losses, norms, {name: weight.detach().clone() for name, weight in weights.items()}


def tokens_echoed(engine, data, mesh):
    """Which tokens of a held-out sequence are the likeliest ones to follow themselves, 128 times 1
    or 0: with a tied embedding many are, and a model of two steps tells nothing of a task."""
    start, stop = mesh.sequence_range(engine.seq_length)
    tokens = torch.from_numpy(data.held_out["validation"].sample(0, start, stop))[None]
    batch = {"tokens": tokens, "labels": tokens, "positions": torch.arange(start, stop)}
    echoed = torch.zeros(engine.seq_length, dtype=torch.int64, device=mesh.device)
    for _, likeliest, _ in engine.token_scores([batch]):
        echoed[start:stop] = likeliest[0]
    return (mesh.sum_of_losses(echoed) // mesh.data_parallel_size).tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
