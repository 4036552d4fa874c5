"""The choice of `--memory-path auto`, and its cost.

The rungs, from the one that is fastest to the one that needs least of the device:
- off: the layers as Megatron-core computes them;
- on, and the device keeps two tensors of a layer, its input and its attention's output;
- on, with `--recompute-granularity full`: it keeps the input alone;
- on, and the host keeps two;
- on, and the host keeps the input alone.
The first that fits is taken. What a rung needs is estimated here, on the safe side; a test holds
the estimates against dry runs. Exact numbers: tools/benchmarks/memory.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalong.config import Config
from megalong.config.memory import USABLE
from megalong.config.training import keeps_optimizer_on_host
from megalong.model.flops import executed_flops
from megalong.model.optimizers import optimizer_of
from megalong.model.output import tokens_of_a_chunk
from megalong.model.parameters import is_layer_matrix, parameters
from megalong.parallel.mesh import Mesh
from megalong.utils.errors import UserError, counted
from megalong.utils.machine import host_bytes_available

MARGIN = 1.05  # on what is estimated
GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """Bytes that a rank needs at the peak: of its device, and of the host for activations."""

    device: float
    host: float


@dataclass(frozen=True)
class Room:
    """Bytes of a rank's device and its share of the host; whether the device is a GPU; and how many
    ranks hold the same weights, over which ZeRO divides."""

    device: float
    host: float
    on_gpu: bool
    replicas: int


def settle_memory_path(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Config, str]:
    """`choose_memory_path` for this launch, by the rank that has least; all ranks call it."""
    on_gpu = mesh.device.type == "cuda"
    # Where no launcher says how many ranks share the host: as many as it has GPUs, or all.
    most = torch.cuda.device_count() if on_gpu else mesh.world_size
    here = int(os.environ.get("LOCAL_WORLD_SIZE", min(most, mesh.world_size)))
    host = device = host_bytes_available() / here
    if on_gpu:
        device = torch.cuda.get_device_properties(mesh.device).total_memory
    found = torch.tensor([device, host], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    device, host = found.tolist()
    replicas = mesh.data_parallel_size * mesh.sequence.size
    return choose_memory_path(config, vocab_size, Room(device, host, on_gpu, replicas))


def choose_memory_path(config: Config, vocab_size: int, room: Room) -> tuple[Config, str]:
    """Return the configuration with nothing left open in its memory section, and a line that says
    what was chosen and what it costs.

    config: resolved. vocab_size: the tokenizer's.
    Raises UserError where what was asked to be offloaded does not fit in the host's memory.
    """
    rungs = [
        (rung, needs(rung, vocab_size, room.replicas, on_gpu=room.on_gpu))
        for rung in _rungs(config, room)
    ]
    on_host = [pair for pair in rungs if pair[1].host <= USABLE * room.host]
    if not on_host:  # every rung has what was asked for
        least, needed = rungs[-1]
        way_out = "set --no-offload-activations, or a larger --sequence-parallel-size"
        if least.parallel.recompute_granularity != "full":
            way_out = f"set --recompute-granularity full, which keeps about half, or {way_out[4:]}"
        raise UserError(
            f"--offload-activations keeps {needed.host / GIB:.1f} GiB of each rank in the host's"
            f" memory, which has {room.host / GIB:.1f} GiB left for it: {way_out}"
        )
    fitting = (pair for pair in on_host if pair[1].device <= USABLE * room.device)
    # Where nothing seems to fit, what needs least has the best chance.
    chosen, needed = next(fitting, None) or min(on_host, key=lambda pair: pair[1].device)
    return chosen, _description(chosen, vocab_size, needed, room)


def needs(config: Config, vocab_size: int, replicas: int = 1, on_gpu: bool = True) -> Needs:
    """Estimate, on the safe side, what a rank needs, mostly of what grows with the sequence.

    config: nothing left open. replicas: ranks that hold the same weights. on_gpu: else on a CPU.
    """
    model, parallel, memory = config.model, config.parallel, config.memory
    tensor = parallel.tensor_model_parallel_size
    tokens = config.training.micro_batch_size * model.seq_length // parallel.sequence_parallel_size
    size = 4 if config.training.precision == "fp32" else 2
    shares = tensor if parallel.divides_norms else 1
    hidden = model.hidden_size * size / shares  # bytes of a token in a tensor like the residual
    channels = model.num_attention_heads * model.kv_channels / tensor
    heads = channels * size + 4 * model.num_attention_heads / tensor  # with a log-sum-exp
    inner = model.ffn_hidden_size * size / tensor
    ranks, patterns = parallel.sequence_parallel_size, config.attention.patterns.values()
    partial = 4 * channels * max(pattern.partial_rows(ranks) for pattern in patterns)
    before_norm = 2 * heads if model.qk_layernorm else 0.0
    # PyTorch's norms keep their input, but for RMSNorm on a CPU, which keeps what it makes of it in
    # float32.
    keep_input = on_gpu or model.normalization == "LayerNorm"
    attention_half = (4 if keep_input else 9) * hidden + 5 * heads + before_norm
    attention_twice = 13.5 * hidden + 7.5 * heads + 1.5 * before_norm
    mlp_half = (6 if model.swiglu else 3) * inner
    mlp_twice = (7.5 if model.swiglu else 4) * inner
    if model.sub_layer_norm:
        of_norm = 1 if keep_input or tensor > 1 else 5  # one that tensor ranks share is our own
        attention_half += of_norm * heads
        attention_twice += 1.5 * of_norm * heads
        mlp_half += of_norm * inner
        mlp_twice += of_norm * inner
    tiled = memory.tiled_attention or memory.tiled_mlp
    recompute = parallel.recompute_granularity == "full"
    kept = hidden  # of a layer, until its backward pass
    working = (3 if keep_input else 5) * hidden  # of the one layer that goes backward
    if recompute and tiled and not parallel.recomputes_each_layer:
        recompute = False  # several layers together: in the second forward pass each keeps its own
        working += 2 * hidden
    if memory.tiled_attention:
        kept += 0 if recompute else heads
        group = 9 * heads + partial + before_norm
        working += 4 * heads + group / memory.attention_head_groups
        working += 1.5 * heads if model.sub_layer_norm else 0  # as dry runs have it
    else:
        kept += 0 if recompute else attention_half
        working += attention_twice + partial
    if memory.tiled_mlp:
        kept += 0 if memory.tiled_attention else hidden
    else:
        kept += 0 if recompute else mlp_half
        working += mlp_twice if recompute else mlp_half
    vocabulary = model.vocabulary_rows(vocab_size)
    logits = vocabulary / tensor * (size + 4)
    peak = working if memory.linear_cross_entropy else max(working, logits + 4 * hidden)
    of_tile = 7 if model.sub_layer_norm else 6  # activations of the MLP
    scratch = memory.tile_size * of_tile * inner if memory.tiled_mlp else 0
    if memory.linear_cross_entropy:  # never at the same time as a tile
        scratch = max(scratch, tokens_of_a_chunk(config, vocabulary) * logits)
    # Layers whose activations the first stage holds at once, over its micro batches.
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.chunks_per_stage(model)
    microbatches = config.num_microbatches(max(replicas // parallel.sequence_parallel_size, 1))
    under_way = stages if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages + 1
    kept *= model.num_layers // (stages * chunks) * min(under_way, microbatches * chunks)
    host = kept if memory.offload_activations else 0.0
    if config.data.isolates_documents:  # int32 bounds of all micro batches under way
        bounds = 4 if config.training.causal else 8
        peak += bounds * stages
    peak += 0.0 if memory.offload_activations else kept
    return Needs(
        device=MARGIN * tokens * peak + scratch + _of_parameters(config, vocab_size, replicas),
        host=tokens * host,
    )


def _of_parameters(config: Config, vocab_size: int, replicas: int) -> float:
    """Bytes of weights, gradients and optimizer, of which ZeRO divides some over the replicas."""
    parallel, component = config.parallel, optimizer_of(config.training)
    count = moments = 0
    for parameter in parameters(config.model, config.model.vocabulary_rows(vocab_size)):
        size = math.prod(parameter.shape)
        count += size
        moments += size * len(component.moments_of(is_layer_matrix(parameter.name)))
    weights = (4 if config.training.precision == "fp32" else 2) * count
    optimizer, gradients = 4 * (count + moments), 4 * count  # with float32 weights; in float32
    if keeps_optimizer_on_host(config.training.deepspeed_config):
        optimizer = 0
    sharded = (optimizer, gradients, weights)[: parallel.zero_stage]
    whole = (optimizer, gradients, weights)[parallel.zero_stage :]
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return (sum(whole) + sum(sharded) / replicas) / ranks


def _rungs(config: Config, room: Room) -> Iterator[Config]:
    """What is left open decided in every way, the fastest first."""
    model, parallel, memory = config.model, config.parallel, config.memory
    if not room.on_gpu:  # the host's memory is the device's: nothing is moved
        memory = dataclasses.replace(memory, offload_activations=False)
    if memory.memory_path != "auto":
        yield dataclasses.replace(config, memory=memory)
        return
    off = memory.with_pieces(False, model, parallel)
    yield dataclasses.replace(config, memory=off)
    recomputing = dataclasses.replace(
        parallel, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    ways = [parallel] if parallel.recompute_granularity == "full" else [parallel, recomputing]
    for offload in (False, True) if memory.offload_activations is None else (None,):
        for way in ways:
            pieces = memory.with_pieces(True, model, way, offload=offload)
            yield dataclasses.replace(config, memory=pieces, parallel=way)


def _description(config: Config, vocab_size: int, needed: Needs, room: Room) -> str:
    memory = config.memory
    pieces = []
    if memory.linear_cross_entropy:
        pieces.append("loss without logits")
    if memory.tiled_mlp:
        pieces.append("tiled MLP")
    if memory.tiled_attention:
        pieces.append(f"attention in {counted(memory.attention_head_groups, 'group')} of heads")
    size = f"about {needed.device / GIB:.1f} of {room.device / GIB:.1f} GiB a rank"
    if needed.device > USABLE * room.device:
        size += ", which may not fit"
    if not pieces and not memory.offload_activations:
        return f"memory path: off ({size})"
    if config.parallel.recompute_granularity == "full":
        pieces.append("full recomputation")
    if memory.offload_activations:
        pieces.append(f"{needed.host / GIB:.1f} GiB a rank on the host")
    plain = dataclasses.replace(
        config,
        memory=dataclasses.replace(
            memory, linear_cross_entropy=False, tiled_mlp=False, tiled_attention=False
        ),
        parallel=dataclasses.replace(config.parallel, recompute_granularity=None),
    )
    more = sum(executed_flops(config, vocab_size).values())
    more /= sum(executed_flops(plain, vocab_size).values())
    return f"memory path: {', '.join(pieces)} ({size}; {more - 1:.0%} more FLOPs than without)"
