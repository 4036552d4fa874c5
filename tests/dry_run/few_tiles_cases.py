"""Steps with all tiles and with three of each loop, in a process with a fake GPU: whether they are
the same. Writes a dict by case as JSON into the file that it is given."""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

from megalong.config.arguments import config_from_values
from megalong.dry_run import step as module

BASE = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 2048,
    "segment_lengths": (512, 2048),
    "dilation_rates": (1, 8),
    "tile_size": 512,
    "loss_chunk_size": 512,
    "memory_path": "on",
    "data_path": ("unread",),
    "tokenizer_type": "ByteTokenizer",
}
TENSOR, SEQUENCE = "tensor_model_parallel_size", "sequence_parallel_size"
CASES = {  # ranks, and settings
    "a last tile that is shorter": (1, {"seq_length": 2100}),
    "a list of moments": (4, {SEQUENCE: 2, TENSOR: 2, "tile_size": 256, "sub_layer_norm": True}),
    "recomputed, ZeRO 3": (2, {"recompute_granularity": "full", "zero_stage": 3}),
    "no offload, GELU": (1, {"num_layers": 1, "offload_activations": False, "swiglu": False}),
}


def main(output: Path) -> None:
    results = {}
    for name, (ranks, values) in CASES.items():
        config = config_from_values(BASE | values).resolve(ranks)

        def step(config=config, ranks=ranks):
            return module.dry_run(config, 1000, rank=ranks - 1, ranks=ranks, quick=True)

        with mock.patch.object(module, "few_tiles", lambda *_: contextlib.nullcontext()):
            step()  # makes tables, which the next ones find
            whole = step()
        few = step()
        results[name] = {
            "operations": few.work.operations == whole.work.operations,
            "collectives": few.work.collectives == whole.work.collectives,
            "memory": [few.memory, whole.memory],
            "host": [few.host, whole.host],
            "most of one": max(whole.work.operations.values()),
        }
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
