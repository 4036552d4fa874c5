"""Seconds of a training step, from what its ranks do (`megalong.dry_run.work`) and a cluster.

Nothing here knows the model: the work comes from a dry run of the training's own code, and every
factor is a number in the cluster's file. What is assumed:

- An operation takes the longer of its FLOPs at the attainable rate of its kind and dtype and its
  bytes at the attainable bandwidth, and `kernel_seconds` for each kernel. Products and attention of
  a dtype that has no peak of its own are refused.
- The host launches kernels and collectives ahead of the device. A step takes `launch_seconds` for
  each of them at least; what that is more than the device needs is "launches".
- Collectives: `megalong.dry_run.cost`; nobody is late. Those of an axis run one after the
  other; what runs beside computation is in the table below, and of it the share `overlap` of the
  shorter of the two is hidden. The rest is exposed.
- A stage of a pipeline sends while it receives, so the longer of the two counts.
- Pipeline: with m micro batches and v chunks a stage, the slowest stage works all the time, and is
  idle while the first micro batch comes to it and the last one goes on: for the time of one micro
  batch of every other stage, a v-th of it if chunks are interleaved. Stages that are alike: the
  bubble is (p - 1) / (v m) of their work, as of 1F1B and of the interleaved schedule (Narayanan et
  al., arXiv 2104.04473, section 2.2).
- The update comes after everybody's backward pass.
- Copies to the host and back run on a stream of their own, beside everything else of the same
  direction, and hide behind it wholly; what is longer is exposed. In the update nothing hides them:
  an optimizer on the host (ZeRO-Offload) waits for the gradients, the device for the weights.
- The host's own share of such an update is bound by the node's memory, which all ranks share.
- What is attainable of a product depends on its FLOPs (of one kernel, where there are several); of
  attention on its FLOPs for each byte, which grow with the rows that a query attends to.

| what                              | runs beside              | because                          |
|-----------------------------------|--------------------------|----------------------------------|
| sequence axis                     | attention of the shard   | started before it, finished      |
|                                   | itself, same direction   | after it                         |
| data axis, ZeRO 3                 | all, same direction      | DeepSpeed fetches ahead, and has |
|                                   |                          | overlap_comm on                  |
| data axis, ZeRO 2, overlap_comm   | all, backward            | reduced on a stream of its own   |
| pipeline axis, interleaved        | all, same direction      | Megatron-core's overlap_p2p_comm |
| all others, and in the update all | nothing                  | see below                        |

DeepSpeed leaves overlap_comm off for ZeRO 1 and 2. Of the tensor axis, Megatron-core's linear
layers run the gather of their input beside the gradient of it, and its reduction beside the
weight's gradient, in the backward pass: that is left out, since the other half (the forward pass,
what is computed again, all of the tiled layers) is exposed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalong.config import Config
from megalong.dry_run.cluster import Cluster, Device, Link
from megalong.dry_run.work import TO_DEVICE, TO_HOST, Collective, Operation, Work
from megalong.model.flops import executed_flops, step_flops
from megalong.model.parameters import count_parameters
from megalong.training.deepspeed_config import deepspeed_config


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a group are. ranks: how many; nodes: on how many; fewest, most: on one."""

    ranks: int
    nodes: int
    fewest: int
    most: int

    @classmethod
    def of(cls, ranks: tuple[int, ...], gpus_per_node: int) -> Placement:
        """Of global ranks."""
        on_node = Counter(rank // gpus_per_node for rank in ranks).values()
        return cls(len(ranks), len(on_node), min(on_node), max(on_node))


def collective_seconds(collective: Collective, cluster: Cluster) -> float:
    """Of one call, in which nobody waits for somebody else to come; 0 for a group of one."""
    place = Placement.of(collective.ranks, cluster.gpus_per_node)
    if place.ranks == 1:
        return 0.0
    return cluster.collective_seconds + _FORMULAS[collective.name](
        place, collective.name, collective.bytes, cluster
    )


def _all_gather(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    share = (place.ranks - 1) / place.ranks
    return _ring_latency(place, cluster) + share * size / _ring_rate(place, name, size, cluster)


def _all_reduce(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    ring = 2 * _all_gather(place, name, size, cluster)
    across = math.ceil(math.log2(place.nodes)) * _between(place, cluster).latency
    steps = (place.most - 1) * cluster.within_node.latency + across
    tree = 2 * (steps + size / _ring_rate(place, name, size, cluster))
    return min(ring, tree)


def _broadcast(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    return _ring_latency(place, cluster) + size / _ring_rate(place, name, size, cluster)


def _all_to_all(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    """What goes to other nodes and what stays in one go at the same time."""
    inside = place.fewest - 1 if place.nodes > 1 else place.ranks - 1
    outside, within, between = place.ranks - 1 - inside, cluster.within_node, None
    seconds = inside / place.ranks * size / within.rate(name, size)
    if outside:
        between = _between(place, cluster)
        share = between.adapters / cluster.gpus_per_node
        crossing = outside / place.ranks * size / (share * between.rate(name, size))
        seconds = max(seconds, crossing)
    return inside * within.latency + outside * (between.latency if between else 0) + seconds


def _send(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    link = _between(place, cluster)
    share = link.adapters / cluster.gpus_per_node if place.nodes > 1 else 1
    return link.latency + size / (share * link.rate(name, size))


_FORMULAS = {
    "all_gather": _all_gather,
    "reduce_scatter": _all_gather,
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "reduce": _broadcast,
    "all_to_all": _all_to_all,
    "send": _send,
    "receive": _send,
}


def _between(place: Placement, cluster: Cluster) -> Link:
    """The slowest link of the group."""
    if place.nodes == 1:
        return cluster.within_node
    assert cluster.between_nodes is not None, "check_gpus comes first"
    return cluster.between_nodes


def _ring_latency(place: Placement, cluster: Cluster) -> float:
    """Of the n - 1 steps from a rank to the one before it."""
    across = place.nodes - 1
    inside = (place.ranks - 1 - across) * cluster.within_node.latency
    return inside + (across * _between(place, cluster).latency if across else 0)


def _ring_rate(place: Placement, name: str, size: int, cluster: Cluster) -> float:
    """Bytes/s that go through each rank."""
    within = cluster.within_node.rate(name, size)
    if place.nodes == 1:
        return within
    link = _between(place, cluster)
    across = place.fewest / cluster.gpus_per_node * link.adapters * link.rate(name, size)
    return min(within, across) if place.most > 1 else across


# Attention of a shard to itself. Where a direction has none of these, it is all of its attention:
# the ring's is of one shard while the next arrives, a window's rows of neighbours are few.
_LOCAL_ATTENTION = ("megalong.dilated_attention", "megalong.dilated_attention_backward")
_COPIES = (TO_HOST, TO_DEVICE)
# Of `rough_seconds`, about as dry runs have it: tensors of the width of the residual that a layer
# reads or writes in a pass, and kernels that it launches.
_TENSORS_OF_A_LAYER, _KERNELS_OF_A_LAYER = 60, 60
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step, by what they are spent on in the slowest stage of the pipeline.

    compute: by part of the model (`work.PARTS`), forward and backward.
    communication: exposed, by axis of the mesh. hidden: what computation hides, not in the total.
    bubble: idle time of the pipeline. offload: copies to the host and back, exposed.
    launches: waiting for the host. update: the optimizer's own computation, on the device or the
        host.
    total: the sum of all but what is hidden. tokens_per_second: of all ranks.
    mfu: model FLOPs (`megalong.model.flops`) as a share of the peak of all ranks, as the training
        log has it.
    """

    compute: Mapping[str, float]
    communication: Mapping[str, float]
    hidden: Mapping[str, float]
    bubble: float
    offload: float
    launches: float
    update: float
    total: float
    tokens_per_second: float
    mfu: float


@dataclass(frozen=True)
class PhaseCost:
    """Seconds of a rank: forward and backward over all its micro batches, or the update.

    compute: by part. communication, hidden: by axis, exposed and not. offload: exposed. launches:
    what the host takes longer than all that.
    """

    compute: Mapping[str, float]
    communication: Mapping[str, float]
    hidden: Mapping[str, float]
    offload: float
    launches: float

    @property
    def total(self) -> float:
        exposed = sum(self.communication.values()) + self.offload + self.launches
        return sum(self.compute.values()) + exposed


@dataclass(frozen=True)
class Overlap:
    """Which axes run beside computation: the settings of a run that the table above asks for."""

    data_forward: bool = False
    data_backward: bool = False
    pipeline: bool = False

    @classmethod
    def of(cls, config: Config, ranks: int) -> Overlap:
        """Of a resolved configuration; UserError if its DeepSpeed file cannot be."""
        stage = config.parallel.zero_stage
        settings = deepspeed_config(config, config.parallel.data_parallel_size(ranks))
        asked = bool(settings["zero_optimization"].get("overlap_comm", stage == 3))
        interleaved = config.parallel.chunks_per_stage(config.model) > 1
        return cls(stage == 3, asked and stage > 1, interleaved)

    def beside(self, axis: str, direction: str) -> str:
        """What a collective runs beside: "attention" of the shard itself, "compute", "nothing"."""
        if direction == "update":
            return "nothing"
        if axis == "sequence":
            return "attention"
        data = self.data_forward if direction == "forward" else self.data_backward
        return "compute" if {"data": data, "pipeline": self.pipeline}.get(axis) else "nothing"


def step_cost(
    stages: Sequence[Work], cluster: Cluster, config: Config, vocab_size: int, ranks: int
) -> StepCost:
    """The time of a training step.

    stages: the work of one rank of each pipeline stage, in order; of the busiest, where the ranks
        of a stage differ. Stages that are alike may share one.
    config: resolved for `ranks` ranks.
    Raises UserError for more ranks than the cluster can have, or a dtype without a peak.
    """
    cluster.check_gpus(ranks)
    cluster = cluster.used_by(ranks)
    parallel, training = config.parallel, config.training
    if len(stages) != parallel.pipeline_model_parallel_size:
        raise ValueError(f"work of {len(stages)} pipeline stages, of which there are others")
    overlap = Overlap.of(config, ranks)
    batches, updates = (
        {id(work): phase_cost(work, directions, cluster, overlap) for work in stages}
        for directions in (("forward", "backward"), ("update",))
    )
    slowest = max(batches.values(), key=lambda cost: cost.total)
    update = max(updates.values(), key=lambda cost: cost.total)
    bubble = pipeline_bubble(
        [batches[id(work)].total for work in stages],
        config.num_microbatches(parallel.data_parallel_size(ranks)),
        parallel.chunks_per_stage(config.model),
    )
    total = slowest.total + bubble + update.total
    peak = ranks * cluster.device.peak(_DTYPES[training.precision])
    return StepCost(
        compute=slowest.compute,
        communication=Counter(slowest.communication) + Counter(update.communication),
        hidden=slowest.hidden,
        bubble=bubble,
        offload=slowest.offload + update.offload,
        launches=slowest.launches + update.launches,
        update=sum(update.compute.values()),
        total=total,
        tokens_per_second=training.global_batch_size * config.model.seq_length / total,
        mfu=sum(step_flops(config, vocab_size).values()) / total / peak,
    )


def pipeline_bubble(stages: Sequence[float], micro_batches: int, chunks: int = 1) -> float:
    """Idle seconds of the slowest stage of a pipeline. stages: seconds of each, of all its micro
    batches. chunks: of layers, interleaved, in a stage."""
    return (sum(stages) - max(stages)) / micro_batches / chunks


def phase_cost(
    work: Work, directions: Sequence[str], cluster: Cluster, overlap: Overlap
) -> PhaseCost:
    """What a rank does in these directions, one after the other."""
    compute: Counter[str] = Counter()
    communication: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    offload = 0.0
    for direction in directions:
        device = _compute_seconds(work, direction, cluster)
        exposed = _axis_seconds(work, direction, cluster)
        hides = _hidden(
            exposed,
            device,
            _local_attention(work, direction, cluster.device),
            direction,
            cluster.device.overlap,
            overlap,
        )
        exposed -= hides
        copies = _host_seconds(work, direction, cluster)
        beside = 0.0 if direction == "update" else device.total() + exposed.total()
        offload += max(0.0, copies - beside)
        compute += device
        communication += exposed
        hidden += hides
    host = work.launches(directions) * cluster.device.launch_seconds
    waiting = max(0.0, host - compute.total() - communication.total() - offload)
    return PhaseCost(compute, communication, hidden, offload, waiting)


def operation_seconds(operation: Operation, device: Device) -> float:
    """Of one call, on a device that does nothing else; not of a copy to the host, nor of what the
    host computes."""
    rate = device.memory_bandwidth * device.memory_share.at(operation.bytes)
    seconds = operation.bytes / rate
    if operation.kind != "memory":
        curves, size = device.product, operation.flops / max(1, operation.kernels)
        if operation.kind == "attention":
            backward = operation.name.endswith("_backward")
            curves = device.attention_backward if backward else device.attention_forward
            size = operation.flops / max(1, operation.bytes)
        rate = device.peak(operation.dtype) * curves[operation.dtype].at(size)
        seconds = max(seconds, operation.flops / rate)
    return seconds + operation.kernels * device.kernel_seconds


def _compute_seconds(work: Work, direction: str, cluster: Cluster) -> Counter[str]:
    """By part."""
    seconds: Counter[str] = Counter()
    for operation, calls in work.operations.items():
        if operation.direction != direction or operation.name in _COPIES:
            continue
        if operation.kind == "host":
            one = cluster.host_seconds(operation.bytes)
        else:
            one = operation_seconds(operation, cluster.device)
        seconds[operation.part] += calls * one
    return seconds


def _local_attention(work: Work, direction: str, device: Device) -> float:
    """Seconds of the attention of the shard to itself."""
    attention = [
        (operation, calls)
        for operation, calls in work.operations.items()
        if operation.kind == "attention" and operation.direction == direction
    ]
    local = [pair for pair in attention if pair[0].name in _LOCAL_ATTENTION]
    return sum(calls * operation_seconds(op, device) for op, calls in local or attention)


def _axis_seconds(work: Work, direction: str, cluster: Cluster) -> Counter[str]:
    """Of all collectives, by axis."""
    seconds: Counter[tuple[str, str]] = Counter()
    for collective, calls in work.collectives.items():
        if collective.direction == direction:
            one = collective_seconds(collective, cluster)
            seconds[collective.axis, collective.name] += calls * one
    for axis in {axis for axis, _ in seconds}:
        both = seconds.pop((axis, "send"), 0.0), seconds.pop((axis, "receive"), 0.0)
        seconds[axis, "send"] = max(both)
    of_axes: Counter[str] = Counter()
    for (axis, _), of_name in seconds.items():
        of_axes[axis] += of_name
    return of_axes


def _hidden(
    communication: Counter[str],
    compute: Counter[str],
    local_attention: float,
    direction: str,
    share: float,
    overlap: Overlap,
) -> Counter[str]:
    """Of the seconds of communication, those that computation hides, by axis; no second of it hides
    two others. share: `Device.overlap`."""
    hidden: Counter[str] = Counter()
    free = compute.total()
    order = {"attention": 0, "compute": 1, "nothing": 2}
    for axis in sorted(communication, key=lambda axis: order[overlap.beside(axis, direction)]):
        beside = overlap.beside(axis, direction)
        room = {"attention": local_attention, "compute": free, "nothing": 0.0}[beside]
        together = min(communication[axis], room)
        free -= together
        hidden[axis] = share * together
    return hidden


def _host_seconds(work: Work, direction: str, cluster: Cluster) -> float:
    """Of the copies to the host, or back."""
    moved = sum(
        calls * operation.bytes
        for operation, calls in work.operations.items()
        if operation.name in _COPIES and operation.direction == direction
    )
    return moved / cluster.host_bandwidth


def rough_seconds(config: Config, vocab_size: int, cluster: Cluster, ranks: int) -> float:
    """Return seconds of a step by closed formulas, which rank layouts before any is run.

    Counted are FLOPs at the rate of large products, weights and activations at the memory's
    bandwidth, launches, and the collectives of the axes, none of them hidden.

    Args:
        config: resolved, nothing left open in its memory section.
    """
    parallel, model, training = config.parallel, config.model, config.training
    tensor, sequence = parallel.tensor_model_parallel_size, parallel.sequence_parallel_size
    stages, replicas = parallel.pipeline_model_parallel_size, parallel.data_parallel_size(ranks)
    device, cluster = cluster.device, cluster.used_by(ranks)
    micro_batches = config.num_microbatches(replicas)
    layers, dtype = model.num_layers / stages, _DTYPES[training.precision]
    size = 4 if training.precision == "fp32" else 2
    row = model.hidden_size * size * training.micro_batch_size
    rows = model.seq_length // sequence
    weights = count_parameters(model, vocab_size).used // (tensor * stages)

    def called(name: str, nbytes: float, members: range) -> float:
        return collective_seconds(Collective("", "", name, int(nbytes), tuple(members)), cluster)

    flops = sum(executed_flops(config, vocab_size).values()) / ranks
    seconds = flops / (device.peak(dtype) * device.product[dtype].points[-1][1])
    passes = 2 if parallel.recompute_granularity == "full" else 1
    touched = _TENSORS_OF_A_LAYER * (1 + passes) * rows * row / tensor + 8 * weights / layers
    bandwidth = device.memory_bandwidth * device.memory_share.points[-1][1]
    launches = (
        _KERNELS_OF_A_LAYER * (2 + passes) * max(device.launch_seconds, device.kernel_seconds)
    )
    of_layer = max(touched / bandwidth, launches)
    of_layer += 2 * (1 + passes) * called("all_reduce", rows * row, range(tensor))
    if sequence > 1:
        gathered = max(p.partial_rows(sequence) for p in config.attention.patterns.values())
        pair = range(0, tensor * sequence, tensor)
        of_layer += (2 + passes) * called("all_gather", 2 * gathered * rows * row / tensor, pair)
    seconds += of_layer * layers * micro_batches
    seconds *= 1 + (stages - 1) / micro_batches / parallel.chunks_per_stage(model)
    group = range(0, ranks // stages, tensor)
    reduced = 1 if parallel.zero_stage == 1 else micro_batches
    gathers = 2 * micro_batches if parallel.zero_stage == 3 else 1
    seconds += reduced * called("all_reduce", size * weights, group)
    seconds += gathers * called("all_gather", size * weights, group)
    return seconds + (36 + 102 / len(group)) * weights / bandwidth
