"""Steps that are planned beside steps that are run, in a process with a fake GPU.

Writes {case: {"planned", "run"}} as JSON to the file it is given, of each its operations,
collectives, memory and pinned memory; and under "launches" of small ones, for every rank, what it
does.
"""

import json
import sys
from pathlib import Path

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()

VOCABULARY = 256
SHAPE = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 256,
    "seq_length": 1024,
    "segment_lengths": (128, 512, 1024),
    "dilation_rates": (1, 2, 4),
    "micro_batch_size": 1,
    "precision": "bf16",
    "memory_path": "off",
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}
ON = {"memory_path": "on", "tile_size": 256}
HYBRID = {"attention": ("dilated", "dense", "local"), "window_size": 256}
PIPELINE = {"pipeline_model_parallel_size": 4}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
FULL = {"recompute_granularity": "full"}

# name -> flags, rank, ranks, micro batches
CASES = {
    "one, six": ({}, 0, 1, 6),
    "hybrid, recomputed, five": ({**HYBRID, **FULL}, 0, 1, 5),
    "dense, selective recomputation, ZeRO 2, five": (
        {"attention": "dense", "zero_stage": 2, "recompute_granularity": "selective"}, 1, 2, 5,
    ),
    "ZeRO 3, five": ({"zero_stage": 3, "num_layers": 2}, 1, 2, 5),
    "tp2 sp2, memory path, four": (
        {**ON, "tensor_model_parallel_size": 2, "sequence_parallel_size": 2}, 3, 4, 4,
    ),
    "pp4, second stage, eight": ({**PIPELINE, **FULL}, 1, 4, 8),
    "pp4, last stage, five": (PIPELINE, 3, 4, 5),
    "pp2, interleaved, first stage, ten": (INTERLEAVED, 0, 2, 10),
    "pp4, interleaved, second stage, sixteen": (
        {**PIPELINE, "num_layers_per_virtual_pipeline_stage": 1, "num_layers": 8}, 1, 4, 16,
    ),
    **{f"{count} micro batches": ({"num_layers": 1}, 0, 1, count) for count in (1, 3)},
}  # fmt: skip

# name -> flags, ranks
LAUNCHES = {
    "sp4": ({"sequence_parallel_size": 4, "num_layers": 1}, 4),
    "dense, sp4": ({"sequence_parallel_size": 4, "num_layers": 1, "attention": "dense"}, 4),
    "pp4 sp2": ({**PIPELINE, "sequence_parallel_size": 2}, 8),
}


def config_of(flags, ranks, microbatches):
    from megalong.config.arguments import config_from_values

    values = SHAPE | flags
    sizes = ("tensor_model_parallel_size", "sequence_parallel_size", "pipeline_model_parallel_size")
    for size in sizes:
        ranks //= values.get(size, 1)
    values["global_batch_size"] = microbatches * ranks * values["micro_batch_size"]
    return config_from_values(values)


def told(step) -> dict:
    """What is compared of a step."""
    return {
        **of_work(step.work),
        "memory": dict(step.memory),
        "host": step.host,
    }


def of_work(work) -> dict:
    return {
        "operations": sorted([*vars(call).values(), n] for call, n in work.operations.items()),
        "collectives": sorted([*vars(call).values(), n] for call, n in work.collectives.items()),
    }


def main(output: str) -> None:
    fake_device.pretend()
    from megalong.dry_run.layouts import ranks_to_plan
    from megalong.dry_run.step import dry_run, planned_step

    results = {}
    for name, (flags, rank, ranks, microbatches) in CASES.items():
        print(name, file=sys.stderr, flush=True)
        config = config_of(flags, ranks, microbatches).resolve(ranks)
        place = {"rank": rank, "ranks": ranks}
        results[name] = {
            "planned": told(planned_step(config, VOCABULARY, **place)),
            "run": told(dry_run(config, VOCABULARY, **place, quick=True)),
        }
    launches = {}
    for name, (flags, ranks) in LAUNCHES.items():
        print(name, file=sys.stderr, flush=True)
        config = config_of(flags, ranks, 4).resolve(ranks)
        steps = [planned_step(config, VOCABULARY, rank=r, ranks=ranks) for r in range(ranks)]
        launches[name] = {
            "flops": [step.flops.total() for step in steps],
            "memory": [step.memory.total() for step in steps],
            "planned": [vars(place) for place in ranks_to_plan(config, ranks)],
        }
    everything = {"steps": results, "launches": launches}
    Path(output).write_text(json.dumps(everything))


if __name__ == "__main__":
    main(sys.argv[1])
