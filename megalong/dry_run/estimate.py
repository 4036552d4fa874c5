"""Roughly how long a step takes and what activations it holds, without running it: which layouts
are worth a dry run.

Layers are alike, so of each kind of attention models of one and of two are run, on the ranks that
share a sequence and its matrices, with one sequence: what the second layer adds, and the rest.
From this and the cost model comes a step of any number of layers, pipeline stages, micro batches
and replicas. What ZeRO does is counted by parameters. Tests hold what the layers do to be exact,
and the whole to be near what a dry run gives.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalong.config import Config
from megalong.dry_run.cluster import Cluster
from megalong.dry_run.cost import step_cost
from megalong.dry_run.ranks import layers_of_stage, ranks_to_plan
from megalong.dry_run.work import Collective, Operation, Work
from megalong.model.optimizers import optimizer_of
from megalong.model.parameters import TABLE, is_layer_matrix
from megalong.model.tensor_slices import matrix_shapes

if TYPE_CHECKING:
    from megalong.dry_run.step import DryRun

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# What ZeRO does with the gradients of a micro batch, the first and each other, as dry runs have it:
# bytes of memory that it reads and writes for a parameter of the rank, and launches for a layer.
_ACCUMULATION = {1: ((6, 6), (18, 12)), 2: ((4, 6), (4, 6)), 3: ((4, 6), (4, 6))}
# And in the update: bytes for a parameter, and a part that is divided by the ranks; launches, those
# for a layer, and of these a part that is divided.
_UPDATE, _DIVIDED_UPDATE = {1: 36, 2: 0, 3: 0}, {1: 102, 2: 74, 3: 74}
_UPDATE_KERNELS = {1: (131, 6, 108), 2: (117, 0, 90), 3: (71, 12, 0)}
# Of a matrix that the update sees whole, beside its products: bytes for an element, and launches.
_OF_ELEMENT, _OF_MATRIX = 30, 12


@dataclass(frozen=True)
class Shares:
    """What a rank does, forward and backward, for one sequence: in a layer of each kind of
    attention, and before and after all layers (collectives of the embedding count as after); and
    the bytes of activations that it holds for that, in a layer of each kind and outside of them. Of
    the ranks that share a sequence the one that attends to most."""

    layers: dict[str, Work]
    before: Work
    after: Work
    activations: dict[str, int]
    other_activations: int

    def of_stage(self, kinds: Mapping[str, int], ends: tuple[bool, bool]) -> Work:
        """Of a pipeline stage with so many layers of each kind. ends: whether it is the first, and
        the last."""
        total = Work()
        for kind, count in kinds.items():
            total = total.plus(self.layers[kind], count)
        for end, work in zip(ends, (self.before, self.after), strict=True):
            total = total.plus(work) if end else total
        return total


def one_stage(config: Config) -> Config | None:
    """The layout of one sequence in one pipeline stage, which does in a layer what this one does;
    None where layers are recomputed in groups, or some of them, so that they are not alike."""
    if config.parallel.recompute_granularity == "full" and not (
        config.parallel.recomputes_each_layer
    ):
        return None
    parallel = dataclasses.replace(
        config.parallel,
        pipeline_model_parallel_size=1,
        num_layers_per_virtual_pipeline_stage=None,
        zero_stage=1,
    )
    training = dataclasses.replace(
        config.training,
        micro_batch_size=1,
        global_batch_size=1,
        deepspeed_config=None,
        optimizer="adam",  # whose update nobody looks at here
    )
    return dataclasses.replace(config, parallel=parallel, training=training)


def shares(config: Config, vocab_size: int) -> Shares:
    """Run what a layout is made of. config: of `one_stage`."""
    layers, activations = {}, {}
    for kind in config.attention.kinds:
        runs = [
            _run(
                dataclasses.replace(
                    config,
                    model=dataclasses.replace(config.model, num_layers=count),
                    attention=dataclasses.replace(config.attention, attention=(kind,)),
                ),
                vocab_size,
            )
            for count in (1, 2)
        ]
        one, two = (_of_model(run.work) for run in runs)
        layers[kind] = two.plus(one, -1)
        held_by_one, held_by_two = (run.activations for run in runs)
        activations[kind] = held_by_two - held_by_one
    rest = one.plus(layers[kind], -1)
    before = Work(Counter({c: n for c, n in rest.operations.items() if c.part == "embedding"}))
    other = held_by_one - activations[kind]
    return Shares(layers, before, rest.plus(before, -1), activations, other)


def model_work(config: Config, vocab_size: int) -> Work:
    """Run forward and backward of a layout of `one_stage`; without ZeRO's part."""
    return _of_model(_run(config, vocab_size).work)


def _run(config: Config, vocab_size: int) -> DryRun:
    from megalong.dry_run.step import dry_run

    ranks = config.parallel.ranks_per_replica
    place = ranks_to_plan(config, ranks)[-1]
    return dry_run(config, vocab_size, rank=place.rank, ranks=ranks, quick=True)


def _of_model(work: Work) -> Work:
    return Work(
        Counter({call: n for call, n in work.operations.items() if call.part != "optimizer"}),
        Counter({c: n for c, n in work.collectives.items() if c.axis in ("sequence", "tensor")}),
    )


def estimated_seconds(
    config: Config, of: Shares, parameters: int, cluster: Cluster, vocab_size: int, ranks: int
) -> float:
    """Of a step. config: resolved. of: the shares of `one_stage(config)`. parameters: of the whole
    model."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    micro_batches = config.num_microbatches(parallel.data_parallel_size(ranks))
    local = parameters // (parallel.tensor_model_parallel_size * stages)
    works: dict[object, Work] = {}
    of_stages = []
    for stage in range(stages):
        kinds = Counter(config.attention.name(layer) for layer in layers_of_stage(config, stage))
        ends = stage == 0, stage == stages - 1
        key = tuple(sorted(kinds.items())), ends
        if key not in works:
            one = of.of_stage(kinds, ends).plus(_sent(config, ends, ranks))
            batch = _of_sequences(one, config.training.micro_batch_size)
            zero = _zero(config, local, micro_batches, ranks)
            works[key] = zero.plus(batch, micro_batches)
        of_stages.append(works[key])
    return step_cost(of_stages, cluster, config, vocab_size, ranks).total


def estimated_activations(config: Config, of: Shares, ranks: int) -> float:
    """Bytes that the first pipeline stage holds where it holds most: it has the most micro batches
    under way. config: resolved. of: the shares of `one_stage(config)`."""
    parallel = config.parallel
    stages, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.chunks_per_stage(config.model),
    )
    micro_batches = config.num_microbatches(parallel.data_parallel_size(ranks))
    passes = stages
    if chunks > 1:  # of the interleaved schedule, before the first backward pass
        passes = 2 * (stages - 1) + (chunks - 1) * stages + 1
    layers = sum(of.activations[config.attention.name(i)] for i in layers_of_stage(config, 0))
    held = layers * min(passes / chunks, micro_batches)
    if stages == 1:
        held += of.other_activations
    return held * config.training.micro_batch_size


def _of_sequences(work: Work, count: int) -> Work:
    """The same for several sequences together. Weights count as often, which is too much."""
    if count == 1:
        return work
    operations = Counter()
    for call, n in work.operations.items():
        more = dataclasses.replace(call, flops=call.flops * count, bytes=call.bytes * count)
        operations[more] += n
    collectives = Counter()
    for call, n in work.collectives.items():
        collectives[dataclasses.replace(call, bytes=call.bytes * count)] += n
    return Work(operations, collectives)


def _sent(config: Config, ends: tuple[bool, bool], ranks: int) -> Work:
    """What a pipeline stage sends and receives for one sequence. ends: whether it is the first, and
    the last."""
    parallel, model = config.parallel, config.model
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.chunks_per_stage(model)
    rows = model.seq_length // parallel.sequence_parallel_size
    if parallel.divides_norms:
        rows //= parallel.tensor_model_parallel_size
    size = rows * model.hidden_size * BYTES[config.training.precision]
    found: Counter[Collective] = Counter()
    pair = (0, ranks // stages)
    for end, (forward, backward) in zip(
        ends, (("receive", "send"), ("send", "receive")), strict=True
    ):
        times = chunks - end  # the ring of an interleaved schedule is open at one place
        if stages > 1 and times:
            found[Collective("pipeline", "forward", forward, size, pair)] += times
            found[Collective("pipeline", "backward", backward, size, pair)] += times
    return Work(collectives=found)


def _zero(config: Config, parameters: int, micro_batches: int, ranks: int) -> Work:
    """Accumulation, reduction and update. parameters: of a rank."""
    parallel = config.parallel
    stage = parallel.zero_stage
    group = ranks // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    members = tuple(
        range(0, group * parallel.tensor_model_parallel_size, parallel.tensor_model_parallel_size)
    )
    size = BYTES[config.training.precision] * parameters

    layers = config.model.num_layers // parallel.pipeline_model_parallel_size
    update = parameters * (_UPDATE[stage] + _DIVIDED_UPDATE[stage] / group)
    once, a_layer, divided = _UPDATE_KERNELS[stage]
    kernels = round(once + layers * (a_layer + divided / group))
    work = Work(Counter({_moves("update", update, kernels): 1}))
    work = work.plus(_whole_matrices(config, layers, members))
    for (nbytes, launches), times in zip(_ACCUMULATION[stage], (1, micro_batches - 1), strict=True):
        of_layer = _moves("backward", nbytes * parameters / layers, launches)
        work.operations[of_layer] += times * layers
    if group == 1:
        return work

    def data(direction: str, name: str, times: int) -> None:
        work.collectives[Collective("data", direction, name, size, members)] += times

    if stage == 1:
        data("update", "all_reduce", 1)
    if stage == 2:
        data("backward", "all_reduce", micro_batches)
    if stage == 3:
        data("forward", "all_gather", micro_batches)
        data("backward", "all_gather", micro_batches)
        data("backward", "reduce_scatter", micro_batches)
    else:
        data("update", "all_gather", 1)
    return work


def _whole_matrices(config: Config, layers: int, members: tuple[int, ...]) -> Work:
    """What an optimizer does besides that sees the matrices of layers whole. layers: of a stage,
    whose matrices the members share; the busiest has a piece of another one, too."""
    training, tensor = config.training, config.parallel.tensor_model_parallel_size
    optimizer = optimizer_of(training)
    if not optimizer.layer_matrices_apart:
        return Work()
    dtype, size = ("bfloat16", 2) if training.precision == "bf16" else ("float32", 4)
    parameters = []
    for name in (row.name for row in TABLE if is_layer_matrix(row.name)):
        work, elements = Work(), 0
        for rows, columns in matrix_shapes(name, config.model, training.muon_split_qkv):
            elements += rows * columns
            moved = 3 * size * rows * columns
            for flops in optimizer.matrix_products(rows, columns):
                product = ("optimizer", "update", "product", "estimate", dtype, flops, moved)
                work.operations[Operation(*product)] += 1
            work.operations[_moves("update", _OF_ELEMENT * rows * columns, _OF_MATRIX)] += 1
        if tensor > 1:
            gather = "tensor", "update", "all_gather", size * elements, tuple(range(tensor))
            work.collectives[Collective(*gather)] += 1
        parameters.append(work)
    total = Work()
    for work in parameters:
        total = total.plus(work, layers / len(members))
    if len(members) > 1:
        total = total.plus(max(parameters, key=lambda work: work.flops().total()))
    return total


def _moves(direction: str, nbytes: float, kernels: int) -> Operation:
    return Operation(
        "optimizer", direction, "memory", "estimate", "float32", 0, int(nbytes), kernels
    )
