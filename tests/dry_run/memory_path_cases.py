"""Peak and executed FLOPs of a step on a fake GPU, and what `megalong.model` says of them.

    memory_path_cases.py FILE usual|seldom

Writes {case: {"peak", "host", "flops", "needs", "needs_host", "executed"}} as JSON to the file.
"""

import json
import sys
from pathlib import Path

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()

VOCABULARY = 8000
SHAPE = {
    "num_layers": 3,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "ffn_hidden_size": 1408,
    "seq_length": 2**16,
    "tile_size": 2**14,  # four of them
    "loss_chunk_size": 8192,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "precision": "bf16",
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}
FULL = {"recompute_granularity": "full"}
ON = {"memory_path": "on"}
USUAL = {
    "off": {"memory_path": "off"},
    "off, full recomputation": {"memory_path": "off", **FULL},
    "on": ON,
    "on, six layers": {**ON, "num_layers": 6},
    "on, full recomputation": {**ON, **FULL},
    "on, five branches, norms of queries and keys": {
        **ON,
        "qk_layernorm": True,
        "segment_lengths": (2048, 4096, 8192, 16384, 32768),
        "dilation_rates": (1, 2, 3, 4, 6),
    },
    "on, local and sparse": {**ON, "attention": ("local", "sparse")},
}
# Each a feature switched on or off by itself: `make test-long`.
SELDOM = {
    "on, GELU": {**ON, "swiglu": False, "ffn_hidden_size": 2048},
    "on, grouped queries": {**ON, "num_query_groups": 2},
    "on, kept on the device": {**ON, "offload_activations": False},
    "on, norms of sub-layers": {**ON, "sub_layer_norm": True, "normalization": "LayerNorm"},
    "off, GELU": {"memory_path": "off", "swiglu": False, "ffn_hidden_size": 2048},
    "off, selective recomputation": {"memory_path": "off", "recompute_granularity": "selective"},
    "on, MLP as it is": {**ON, "tiled_mlp": False, **FULL},
    "on, GELU's MLP as it is": {
        **ON,
        "tiled_mlp": False,
        **FULL,
        "swiglu": False,
        "ffn_hidden_size": 2048,
    },
    "on, attention as it is": {**ON, "tiled_attention": False, **FULL},
    "on, eight groups of heads": {**ON, "attention_head_groups": 8},
    "off, norms of sub-layers": {"memory_path": "off", "sub_layer_norm": True},
    "off, norms of sub-layers, full recomputation": {
        "memory_path": "off",
        **FULL,
        "sub_layer_norm": True,
    },
    "on, three layers recomputed at once": {**ON, **FULL, "recompute_num_layers": 3},
}


def main(output: str, which: str) -> None:
    fake_device.pretend()
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.step import dry_run
    from megalong.model.flops import executed_flops
    from megalong.model.memory_path import needs

    results = {}
    for name, flags in {"usual": USUAL, "seldom": SELDOM}[which].items():
        config = config_from_values(SHAPE | flags).resolve(1)
        result, needed = dry_run(config, VOCABULARY, quick=True), needs(config, VOCABULARY)
        results[name] = {
            "peak": result.memory.total(),
            "host": result.host,
            "flops": result.flops.total(),
            "needs": needed.device,
            "needs_host": needed.host,
            "executed": executed_flops(config, VOCABULARY),
        }
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
