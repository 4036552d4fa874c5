"""Steps with all layers and with few, in a process with a fake GPU.

Writes {case: {"few", "whole", "fallen", "calls", "rotary"}} as JSON into the file that it is given,
of the cases that are named after it: what is told of each step, how many calls of layers each made,
and how many modules of angles the chunks have. `fallen`: of the first case, where a layer is said
to leave something, so that all have to be run.
"""

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

from tests.dry_run.extension_cases import HYBRID, VOCABULARY, config_of, told

SEQUENCE, TENSOR = "sequence_parallel_size", "tensor_model_parallel_size"
PIPELINE = "pipeline_model_parallel_size"
ON = {"memory_path": "on", "tile_size": 256, "offload_activations": False}
FULL = {"recompute_granularity": "full"}
INTERLEAVED = {PIPELINE: 2, "num_layers_per_virtual_pipeline_stage": 5, "num_layers": 20}
ONE_LAYER = {"num_layers_per_virtual_pipeline_stage": 1, "num_layers": 12}
SMALL_BUCKETS = {"deepspeed_config": "buckets.json"}  # beside the results
BUCKETS = {"zero_optimization": {"reduce_bucket_size": 100_000}}  # less than a layer's weights
EVERYTHING = {  # that a layer may have
    "normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True, "add_qkv_bias": True,
    "qk_layernorm": True, "sub_layer_norm": True, TENSOR: 2,
}  # fmt: skip

# name -> flags, rank, ranks, micro batches; those of `SHORT` are of every test run
CASES = {
    "tp2 sp2": ({TENSOR: 2, SEQUENCE: 2}, 3, 4, 3),
    "ZeRO 2, small buckets, recomputed": ({**FULL, **SMALL_BUCKETS, "zero_stage": 2}, 1, 4, 3),
    "one": ({"num_layers": 8}, 0, 1, 3),
    "float32": ({"precision": "fp32"}, 1, 2, 3),
    "fp16": ({"precision": "fp16"}, 1, 2, 3),
    "ZeRO 1, small buckets": (SMALL_BUCKETS, 1, 4, 3),
    "memory path": (ON, 0, 1, 3),
    "memory path, tp2 sp2": ({**ON, TENSOR: 2, SEQUENCE: 2}, 3, 4, 3),
    "memory path, tiles alike": ({**ON, "tile_size": 128}, 0, 1, 3),
    "memory path, recomputed": ({**ON, **FULL}, 1, 2, 3),
    "memory path without attention, recomputed": (
        {**ON, **FULL, TENSOR: 2, "tiled_attention": False}, 1, 2, 3,
    ),
    "memory path without MLP, recomputed": ({**ON, **FULL, "tiled_mlp": False}, 1, 2, 3),
    "some layers recomputed": (
        {**FULL, "recompute_method": "block", "recompute_num_layers": 5, "num_layers": 10}, 0, 1, 3,
    ),
    "selective recomputation": ({"recompute_granularity": "selective"}, 0, 1, 3),
    "hybrid": ({**HYBRID, "num_layers": 15}, 0, 1, 3),
    "hybrid, documents apart": (
        {**HYBRID, "num_layers": 15, "document_attention": "isolated"}, 0, 1, 3,
    ),
    "everything": (EVERYTHING, 1, 2, 3),
    "everything, memory path": ({**EVERYTHING, **ON}, 1, 2, 3),
    "pp2, first stage": ({PIPELINE: 2, "num_layers": 10}, 0, 2, 4),
    "pp2, last stage, tied embedding": (
        {PIPELINE: 2, "num_layers": 10, "untie_embeddings_and_output_weights": False}, 1, 2, 4,
    ),
    "pp3, between, small buckets": ({PIPELINE: 3, "num_layers": 15, **SMALL_BUCKETS}, 2, 6, 4),
    "pp3, between, small buckets, recomputed": (
        {PIPELINE: 3, "num_layers": 15, **SMALL_BUCKETS, **FULL}, 2, 6, 4,
    ),
    "interleaved": (INTERLEAVED, 1, 2, 4),
    "interleaved, tp2, recomputed": ({**INTERLEAVED, TENSOR: 2, **FULL}, 1, 4, 4),
    "chunks of one layer, first stage": ({**ONE_LAYER, PIPELINE: 2}, 0, 2, 6),
    "chunks of one layer, between, sp2": ({**ONE_LAYER, PIPELINE: 3, SEQUENCE: 2}, 3, 6, 9),
    "chunks of one layer, last stage, recomputed": ({**ONE_LAYER, PIPELINE: 3, **FULL}, 2, 3, 9),
    "chunks of one layer, memory path, recomputed": (
        {**ONE_LAYER, PIPELINE: 2, **ON, **FULL}, 1, 2, 6,
    ),
}  # fmt: skip
SHORT = list(CASES)[:2]


@contextlib.contextmanager
def counting_calls(*owners):
    """Yields a list that has an entry for each call of these classes' forward passes."""
    calls = []

    def counting(forward):
        def call(*args, **kwargs):
            calls.append(forward)
            return forward(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for owner in owners:
            patch = mock.patch.object(owner, "forward", counting(owner.forward))
            stack.enter_context(patch)
        yield calls


def main(output: str, *names: str) -> None:
    from megatron.core.transformer import TransformerLayer

    from megalong.dry_run import step as module
    from megalong.dry_run.few_layers import LeavesSomething, few_layers
    from megalong.model.tiled_layer import TiledTransformerLayer

    @contextlib.contextmanager
    def leaving_something(*args):
        with few_layers(*args):
            yield
        raise LeavesSomething

    results = {}
    os.chdir(Path(output).parent)
    Path("buckets.json").write_text(json.dumps(BUCKETS))
    for name in names:
        flags, rank, ranks, microbatches = CASES[name]
        config = config_of({"num_layers": 6, **flags}, ranks, microbatches).resolve(ranks)

        rotary = set()

        def look(engine, rotary=rotary):
            rotary |= {id(chunk.rotary_pos_emb) for chunk in engine.model.chunks}

        def step(config=config, look=lambda _: None, **place):
            with counting_calls(TransformerLayer, TiledTransformerLayer) as calls:
                result = module.dry_run(config, VOCABULARY, prepare=look, quick=True, **place)
            return told(result), len(calls)

        step = partial(step, rank=rank, ranks=ranks)

        with mock.patch.object(module, "few_layers", lambda *_: contextlib.nullcontext()):
            whole, all_calls = step(look=look)
        few, few_calls = step()
        results[name] = {"few": few, "whole": whole, "calls": [few_calls, all_calls]}
        results[name]["rotary"] = len(rotary)
        if len(results) == 1:
            with mock.patch.object(module, "few_layers", leaving_something):
                results[name]["fallen"], calls = step()
            results[name]["calls"].append(calls)
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
