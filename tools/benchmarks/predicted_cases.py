"""What predicted.py compares: launches on the CPU, and configurations whose steps are timed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 4000
MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 352,
    "make_vocab_size_divisible_by": 2,
    "seq_length": 2048,
    "segment_lengths": (256, 512, 2048),
    "dilation_rates": (1, 2, 4),
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "precision": "fp32",
    "memory_path": "off",
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}

# Fewer than the weights of this model, so that gradients go in several buckets, as those of large
# models do: without this, all would be in one.
DEEPSPEED = {"zero_optimization": {"reduce_bucket_size": 500_000}}

DENSE = {"attention": ["dense"]}
HYBRID = {
    "attention": ["dilated", "dense", "local", "sparse"],
    "window_size": 300,
    "sparse_block_size": 128,
}
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
PATH = {"memory_path": "on", "offload_activations": False, "tile_size": 512}
SP2 = {"sequence_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "global_batch_size": 4}
INTERLEAVED = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}


@dataclass(frozen=True)
class Case:
    """A launch: so many ranks, and what its configuration has otherwise than `MODEL`."""

    ranks: int
    flags: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """What predicted_ranks.py reads."""
        deepspeed = folder / "deepspeed.json"
        deepspeed.write_text(json.dumps(DEEPSPEED))
        values = MODEL | self.flags | {"deepspeed_config": str(deepspeed)}
        content = {"ranks": self.ranks, "values": values, "vocabulary": VOCABULARY}
        (folder / "case.json").write_text(json.dumps(content))


EXACT = {
    "1 rank, dense": Case(1, DENSE),
    "1 rank, dilated, memory path": Case(1, {**PATH, "seq_length": 4096}),
    "DP 2, ZeRO 1, dilated": Case(2),
    "DP 2, ZeRO 2, dense": Case(2, {**DENSE, "zero_stage": 2}),
    "DP 2, ZeRO 3, dilated, full recomputation": Case(
        2, {**FULL, "zero_stage": 3, "global_batch_size": 4}
    ),
    "SP 2, dilated": Case(2, {**SP2, "seq_length": 4096}),
    "TP 2, hybrid": Case(2, {**TP2, **HYBRID}),
    "PP 2, 1F1B, dense": Case(2, {**PP2, **DENSE}),
    "PP 2, interleaved, dilated, selective recomputation": Case(2, {**INTERLEAVED, **SELECTIVE}),
    # Longer, since what besides tensors is resident is known to some 3 MiB, and this holds little.
    "SP 2 x TP 2, hybrid, memory path": Case(
        4, {**SP2, **TP2, **HYBRID, **PATH, "seq_length": 8192}
    ),
    "SP 4, hybrid": Case(4, {**HYBRID, "sequence_parallel_size": 4, "seq_length": 4096}),
    "SP 2 x DP 2, ZeRO 3, dilated, memory path": Case(
        4, {**SP2, **PATH, "zero_stage": 3, "seq_length": 4096}
    ),
    "PP 2 x DP 2, interleaved, dense": Case(4, {**INTERLEAVED, **DENSE, "global_batch_size": 8}),
    "TP 2 x SP 2 x PP 2, 1F1B, hybrid": Case(
        8, {**TP2, **SP2, **PP2, **HYBRID, "seq_length": 4096}
    ),
    "TP 2 x SP 2 x DP 2, ZeRO 2, dilated": Case(
        8, {**TP2, **SP2, "zero_stage": 2, "seq_length": 4096}
    ),
    "SP 2 x PP 2 x DP 2, interleaved, dilated, full recomputation": Case(
        8, {**SP2, **INTERLEAVED, **FULL, "global_batch_size": 8, "seq_length": 4096}
    ),
}

# Each twice as many tokens a step as micro batches of its length, four times for a pipeline.
RANKING = {
    "DP 2, dilated, 1024": Case(2, {"seq_length": 1024}),
    "DP 2, dilated, 4096, full recomputation": Case(2, {**FULL, "seq_length": 4096}),
    "DP 2, dense, 2048, selective recomputation": Case(2, {**DENSE, **SELECTIVE}),
    "DP 2, ZeRO 3, dilated, 2048": Case(2, {"zero_stage": 3}),
    "DP 2, ZeRO 2, hybrid, 4096": Case(2, {**HYBRID, "zero_stage": 2, "seq_length": 4096}),
    "SP 2, dilated, 2048": Case(2, SP2),
    "SP 2, dilated, 8192": Case(2, {**SP2, "seq_length": 8192}),
    "SP 2, dense, 4096": Case(2, {**SP2, **DENSE, "seq_length": 4096}),
    "SP 2, hybrid, 4096, memory path": Case(2, {**SP2, **HYBRID, **PATH, "seq_length": 4096}),
    "TP 2, dilated, 1024": Case(2, {**TP2, "seq_length": 1024}),
    "TP 2, dense, 2048, full recomputation": Case(2, {**TP2, **DENSE, **FULL}),
    "PP 2, 1F1B, dilated, 2048": Case(2, PP2),
    "PP 2, interleaved, dilated, 2048, full recomputation": Case(2, {**INTERLEAVED, **FULL}),
    "PP 2, 1F1B, dense, 4096": Case(2, {**PP2, **DENSE, "seq_length": 4096}),
}
