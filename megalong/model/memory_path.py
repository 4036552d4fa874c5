"""The choice that `--memory-path auto` stands for, and what it costs.

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
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalong.config import Config
from megalong.errors import UserError
from megalong.host_memory import host_bytes_available
from megalong.model.flops import executed_flops
from megalong.model.parameters import count_parameters
from megalong.parallel.mesh import Mesh

USABLE = 0.9  # of the device's memory and of the host's: the rest is for fragments and for others
GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """Bytes that a rank needs at the peak: of its device, and of the host for what is offloaded."""

    device: float
    host: float


def settle_memory_path(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Config, str]:
    """The configuration with nothing left open in its memory section, and a line that says what
    was chosen and what it costs; the same on every rank.

    config: resolved. vocab_size: the tokenizer's.
    Raises UserError where what is to be offloaded does not fit in the host's memory.
    """
    device, host = _memory(mesh)
    chosen = next(
        (rung for rung in _rungs(config, mesh) if _fits(needs(rung, vocab_size), device, host)),
        None,
    )
    if chosen is None:  # the leanest has the best chance
        *_, chosen = _rungs(config, mesh)
    needed = needs(chosen, vocab_size)
    if needed.host > USABLE * host:
        raise UserError(_no_room(chosen, needed, host))
    return chosen, _description(chosen, vocab_size, needed, device)


def needs(config: Config, vocab_size: int) -> Needs:
    """An estimate, mostly of what grows with the sequence. config: nothing left open."""
    model, parallel, memory = config.model, config.parallel, config.memory
    tensor = parallel.tensor_model_parallel_size
    tokens = config.training.micro_batch_size * model.seq_length // parallel.sequence_parallel_size
    size = 4 if config.training.precision == "fp32" else 2
    shares = tensor if parallel.divides_norms else 1
    hidden = model.hidden_size * size / shares  # bytes of a token in a tensor like the residual
    heads = model.num_attention_heads * (model.kv_channels * size + 4) / tensor
    inner = model.ffn_hidden_size * size / tensor
    layers = model.num_layers // parallel.pipeline_model_parallel_size
    # Under 1F1B the first stage has as many micro batches under way as there are stages.
    layers *= parallel.pipeline_model_parallel_size
    attention_half = 9 * hidden + 5 * heads
    mlp_half = (6 if model.swiglu else 3) * inner
    tiled = memory.tiled_attention or memory.tiled_mlp
    recompute = parallel.recompute_granularity == "full"
    kept = hidden  # of a layer, until its backward pass
    working = 5 * hidden  # of the one layer that goes backward
    if recompute and tiled and not parallel.recomputes_each_layer:
        recompute = False  # several layers together: in the second forward pass each keeps its own
        working += 2 * hidden
    if memory.tiled_attention:
        kept += 0 if recompute else heads
        working += 4 * heads + 9 * heads / memory.attention_head_groups
    else:
        kept += 0 if recompute else attention_half
        working += 1.5 * attention_half
    if memory.tiled_mlp:
        kept += 0 if memory.tiled_attention else hidden
    else:
        kept += 0 if recompute else mlp_half
        working += 2 * mlp_half if recompute else mlp_half
    logits = model.vocabulary_rows(vocab_size) / tensor * (size + 4)
    peak = working if memory.linear_cross_entropy else max(working, logits + 4 * hidden)
    host = layers * kept if memory.offload_activations else 0.0
    if not memory.offload_activations:
        peak += layers * kept
    count = count_parameters(model, vocab_size)
    parameters = (count.used + count.padding) / (tensor * parallel.pipeline_model_parallel_size)
    return Needs(device=tokens * peak + parameters * 20, host=tokens * host)


def _rungs(config: Config, mesh: Mesh) -> Iterator[Config]:
    """What is left open decided in every way, the fastest first."""
    model, parallel, memory = config.model, config.parallel, config.memory
    if memory.memory_path != "auto":
        yield _without_offload_on_cpu(config, mesh)
        return
    yield dataclasses.replace(config, memory=memory.with_pieces(False, model, parallel))
    recomputing = dataclasses.replace(
        parallel, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    ways = [parallel] if parallel.recompute_granularity == "full" else [parallel, recomputing]
    for offload in (False, True) if mesh.device.type == "cuda" else (False,):
        for way in ways:
            pieces = memory.with_pieces(True, model, way, offload=offload)
            yield dataclasses.replace(config, memory=pieces, parallel=way)


def _without_offload_on_cpu(config: Config, mesh: Mesh) -> Config:
    """The host's memory is the device's there, so that nothing is moved."""
    if mesh.device.type == "cuda":
        return config
    return dataclasses.replace(
        config, memory=dataclasses.replace(config.memory, offload_activations=False)
    )


def _memory(mesh: Mesh) -> tuple[float, float]:
    """Bytes of a rank's device, and what the host has for it; of the rank that has least."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = host_bytes_available() / here
    device = host
    if mesh.device.type == "cuda":
        device = torch.cuda.get_device_properties(mesh.device).total_memory
    found = torch.tensor([device, host], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    device, host = found.tolist()
    return device, host


def _fits(needed: Needs, device: float, host: float) -> bool:
    return needed.device <= USABLE * device and needed.host <= USABLE * host


def _description(config: Config, vocab_size: int, needed: Needs, device: float) -> str:
    memory = config.memory
    pieces = []
    if memory.linear_cross_entropy:
        pieces.append("loss without logits")
    if memory.tiled_mlp:
        pieces.append("tiled MLP")
    if memory.tiled_attention:
        pieces.append(f"attention in {memory.attention_head_groups} groups of heads")
    size = f"about {needed.device / GIB:.1f} of {device / GIB:.1f} GiB a rank"
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


def _no_room(config: Config, needed: Needs, host: float) -> str:
    way_out = "set --no-offload-activations, or a larger --sequence-parallel-size"
    if config.parallel.recompute_granularity != "full":
        way_out = f"set --recompute-granularity full, which keeps about half, or {way_out[4:]}"
    return (
        f"--offload-activations keeps {needed.host / GIB:.1f} GiB of each rank in the host's"
        f" memory, which has {host / GIB:.1f} GiB left for it: {way_out}"
    )
