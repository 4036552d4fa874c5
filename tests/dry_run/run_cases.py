"""Dry runs on a fake GPU, one after the other in a process that has been given one.

Writes {case: {"memory", "traffic", "waits", "error", ...}} as JSON to the file it is given; error
is None or the exception's type and message. Under "attention": see `attention_memory`.
"""

import json
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()
import torch

TINY = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 1024,
    "segment_lengths": "128 512 1024",
    "dilation_rates": "1 2 4",
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "precision": "bf16",
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}
LAYOUT = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
}


OFFLOAD = str(Path(__file__).parents[1] / "training" / "offload.json")
LARGE_BUCKET = str(Path(__file__).with_name("large_bucket.json"))
ALL_KINDS = {
    "num_layers": 4,
    "attention": "dilated dense local sparse",
    "window_size": 300,
    "sparse_block_size": 256,
}
APART = {"document_attention": "isolated", "eod_mask_loss": True}
ONCE = {"global_batch_size": 1}
MAGNETO = {"sub_layer_norm": True, "position_embedding_type": "xpos"}


@dataclass(frozen=True)
class Case:
    """One rank of a launch. plant: the name of what is put into its hot path (`PLANTS`)."""

    flags: dict[str, object] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1
    plant: str | None = None


CASES = {
    "one": Case(),
    "dense": Case({**ONCE, "attention": "dense"}),
    "dense, fp32": Case({**ONCE, "attention": "dense", "precision": "fp32"}),
    "fp32, full recomputation, untied, norms of queries and keys": Case(
        {
            "precision": "fp32",
            "recompute_granularity": "full",
            "untie_embeddings_and_output_weights": True,
            "qk_layernorm": True,
        }
    ),
    "fp16, selective recomputation, GELU, LayerNorm, biases": Case(
        {
            "precision": "fp16",
            "recompute_granularity": "selective",
            "no_swiglu": True,
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "sub_layer_norm": True,
        }
    ),
    "dp2, ZeRO 2": Case({"zero_stage": 2}, rank=1, ranks=2),
    "dp2, ZeRO 2, DeepSpeed's bucket": Case(
        {"zero_stage": 2, "deepspeed_config": LARGE_BUCKET}, rank=1, ranks=2
    ),
    "dp2, ZeRO 3": Case({"zero_stage": 3}, rank=1, ranks=2),
    **{
        f"dp2, ZeRO {stage}, optimizer on the host": Case(
            {"zero_stage": stage, "deepspeed_config": OFFLOAD, "hidden_size": 256}, rank=1, ranks=2
        )
        for stage in (2, 3)
    },
    "Muon, ZeRO 2": Case(
        {**LAYOUT, "pipeline_model_parallel_size": 1, "zero_stage": 2, "optimizer": "muon"},
        rank=1,
        ranks=4,
    ),
    # Rank = tensor + 2 (sequence + 2 stage).
    "tp2 sp2 pp2, rank 3": Case(LAYOUT, rank=3, ranks=8),
    "tp2 sp2 pp2, rank 4": Case({**LAYOUT, **MAGNETO, "z_loss_coeff": 1e-4}, rank=4, ranks=8),
    "tp2 sp2 pp2, rank 4, losses without logits": Case(
        {
            **LAYOUT,
            "linear_cross_entropy": True,
            "loss_chunk_size": 200,
            "tile_size": 200,
            "z_loss_coeff": 1e-4,
        },
        rank=4,
        ranks=8,
    ),
    **{
        f"tp2 sp2 pp2, rank {rank}, memory path{words}": Case(
            {**LAYOUT, "memory_path": "on", "tile_size": 200, "attention_head_groups": 1, **more},
            rank=rank,
            ranks=8,
        )
        for rank, words, more in (
            (3, "", MAGNETO),
            (4, ", recomputed", {"recompute_granularity": "full"}),
        )
    },
    "memory path": Case({"memory_path": "on", "attention_head_groups": 2}),
    "offload alone": Case({"memory_path": "off", "offload_activations": True}),
    "offload alone, recomputed": Case(
        {"memory_path": "off", "offload_activations": True, "recompute_granularity": "full"}
    ),
    "sp4, memory path, documents apart": Case(
        {**ONCE, "sequence_parallel_size": 4, "memory_path": "on", **APART}, rank=1, ranks=4
    ),
    "dp2, ZeRO 3, memory path": Case({"zero_stage": 3, "memory_path": "on"}, rank=1, ranks=2),
    "sp4": Case({**ONCE, "sequence_parallel_size": 4, "skip_loss_spikes": 2}, rank=1, ranks=4),
    "sp4, masked tokens, documents apart": Case(
        {**ONCE, "sequence_parallel_size": 4, "objective": "mlm", "document_attention": "isolated"},
        rank=1,
        ranks=4,
    ),
    "sp2, all kinds, documents apart": Case(
        {**ONCE, "sequence_parallel_size": 2, **ALL_KINDS, **APART}, rank=1, ranks=2
    ),
    "sp4, memory path": Case(
        {**ONCE, "sequence_parallel_size": 4, "memory_path": "on", "recompute_granularity": "full"},
        rank=1,
        ranks=4,
    ),
    "tp2 sp2 pp2, interleaved": Case(
        {**LAYOUT, "num_layers": 4, "num_layers_per_virtual_pipeline_stage": 1}, rank=5, ranks=8
    ),
}


# Forward hooks of a layer: (module, inputs, output) -> None or another output.


def plant_item(_, inputs, output):
    """As by somebody who logs the size of the activations."""
    output[0].float().norm().item()


def plant_branch(_, inputs, output):
    if output[0].isnan().any():
        raise FloatingPointError


def plant_cpu_tensor(_, inputs, output):
    """A table made without a device, as of a position encoding."""
    return output[0] + torch.ones(output[0].shape[-1]), *output[1:]


def plant_item_in_backward(_, inputs, output):
    output[0].register_hook(lambda gradient: print(gradient.abs().max().item()))


def plant_blocking_copy(_, inputs, output):
    return output[0] + torch.ones(output[0].shape[-1]).to(output[0].device), *output[1:]


def plant_synchronize(_, inputs, output):
    torch.cuda.synchronize()


def plant_collective_on_cpu(_, inputs, output):
    torch.distributed.all_reduce(torch.zeros(1))


PLANTS = {name[6:]: plant for name, plant in list(vars().items()) if name.startswith("plant_")}
LITTLE = {**ONCE, "num_layers": 1}
CASES |= {f"planted {name}": Case(LITTLE, plant=name) for name in PLANTS}
CASES["planted item in a pipeline"] = Case(LAYOUT, rank=4, ranks=8, plant="item")


def dry_run_of(case: Case) -> dict[str, object]:
    """The dry run of a case, and how it ended."""
    from megalong.config.arguments import parse_arguments
    from megalong.dry_run.step import dry_run

    words = []
    for name, value in (TINY | case.flags).items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else str(value).split()
    config = parse_arguments(words).resolve(case.ranks)

    engines = []

    def plant(engine):
        engines.append(engine)
        if case.plant is not None:
            layer = engine.model.chunks[0].decoder.layers[0]
            layer.register_forward_hook(PLANTS[case.plant])

    try:
        result = dry_run(config, 256, rank=case.rank, ranks=case.ranks, prepare=plant)
    except Exception as error:
        if case.plant is None:
            traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "error": None,
        "memory": result.memory,
        "host": result.host,
        "update": [
            [operation.kind, operation.name, operation.bytes * calls]
            for operation, calls in result.work.operations.items()
            if operation.direction == "update"
        ],
        "traffic": result.traffic,
        "counted": engines[0].traffic,  # by the engine itself
        "flops": [[*key, flops] for key, flops in result.flops.items()],
        "operators": sorted({operation.name for operation in result.work.operations}),
        "parts": sorted({operation.part for operation in result.work.operations}),
        "dtypes": sorted(
            {o.dtype for o in result.work.operations if o.kind in ("product", "attention")}
        ),
        "launches": sum(
            operation.kernels * calls
            for operation, calls in result.work.operations.items()
            if operation.name == "megalong.dilated_attention"
        ),
        "waits": result.waits,
    }


def main(output: str) -> None:
    fake_device.pretend()
    from megalong.dry_run.step import ALLOWED

    results: dict[str, object] = {"allowed": {wait.where: wait.why for wait in ALLOWED}}
    for name, case in CASES.items():
        print(name, file=sys.stderr, flush=True)  # shown if one ends the process
        results[name] = dry_run_of(case)
    from tests.dry_run.attention_memory import measured

    results["attention"] = measured()
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
