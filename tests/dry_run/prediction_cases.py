"""Small launches of two ranks, each with another axis, in the form of predicted_ranks.py."""

import json
from pathlib import Path

from tests.launching import REPOSITORY

RANKS_SCRIPT = str(REPOSITORY / "tests" / "dry_run" / "predicted_ranks.py")
VOCABULARY = 300
TINY = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 256,
    "segment_lengths": (32, 128, 256),
    "dilation_rates": (1, 2, 3),
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "precision": "fp32",
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}
CASES = {
    "sp2, all kinds": {
        "global_batch_size": 2,
        "sequence_parallel_size": 2,
        "attention": ("dilated", "dense", "local", "sparse"),
        "window_size": 50,
        "sparse_block_size": 32,
    },
    "dp2, ZeRO 3, memory path": {
        "num_layers": 2,
        "zero_stage": 3,
        "memory_path": "on",
        "offload_activations": False,
        "tile_size": 100,
    },
    "pp2, interleaved, recomputed": {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
        "recompute_granularity": "full",
    },
}


def written(folder: Path) -> list[Path]:
    """The cases, each in a folder of its own."""
    folders = []
    for number, flags in enumerate(CASES.values()):
        folders.append(folder / str(number))
        folders[-1].mkdir(parents=True)
        deepspeed = folders[-1] / "deepspeed.json"
        deepspeed.write_text('{"zero_optimization": {"reduce_bucket_size": 20000}}')
        values = TINY | flags | {"deepspeed_config": str(deepspeed)}
        case = {"ranks": 2, "values": values, "vocabulary": VOCABULARY}
        (folders[-1] / "case.json").write_text(json.dumps(case))
    return folders
