"""The layouts that a launch may have: what was given stays, what was left open is tried.

A *division* says how the ranks share the work: tensor, sequence and pipeline degrees, layers in a
chunk of the interleaved schedule, the micro batch. Each can be had with several *rungs*: a ZeRO
stage, recomputation and the memory path.

What is not tried: tensor parallelism over several nodes, degrees that do not divide the ranks,
interleaved chunks of several layers, micro batches that are no power of two, and where the global
batch is open any but one sequence; recomputation of the attention alone, of the first layers or of
several together, single pieces of the memory path. Whoever gives one of these has it: the others
are tried around it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalong.config import Config, flag_name
from megalong.config.arguments import config_from_values
from megalong.config.flags import require_positive, shown
from megalong.config.memory import PIECES, USABLE
from megalong.config.training import read_deepspeed_file
from megalong.dry_run.cluster import Cluster
from megalong.utils.errors import UserError, counted


@dataclass(frozen=True)
class PlannedRank:
    """A rank, its pipeline stage and place in a sequence, and how many ranks, this one with them,
    do as it does or, along the sequence, a little less."""

    rank: int
    stage: int
    shard: int
    count: int


def ranks_to_plan(config: Config, ranks: int) -> list[PlannedRank]:
    """The ranks of a launch of `ranks` that stand for all.

    Stages: the first, the last, and of those between the first of each sequence of attentions: it
    has the most micro batches under way. Shards of a sequence: the first, which attends to nothing
    before it, and the one that stands furthest in all segments, which attends to most. Tensor and
    data ranks do alike, but for where ZeRO cuts its partitions.

    config: resolved for as many ranks.
    """
    parallel = config.parallel
    tensor, shards = parallel.tensor_model_parallel_size, parallel.sequence_parallel_size
    stages = parallel.pipeline_model_parallel_size
    alike = ranks // (shards * stages)  # tensor and data ranks of a stage and a shard
    return [
        PlannedRank(
            tensor * shard + ranks // stages * stage, stage, shard, alike * stage_count * count
        )
        for stage, stage_count in _stages(config).items()
        for shard, count in _shards(config).items()
    ]


def layers_of_stage(config: Config, stage: int) -> list[int]:
    """Numbers of the layers of a pipeline stage, from 0, chunk after chunk."""
    model, parallel = config.model, config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.chunks_per_stage(model)
    count = model.num_layers // (stages * chunks)
    starts = ((chunk * stages + stage) * count for chunk in range(chunks))
    return [layer for start in starts for layer in range(start, start + count)]


def _stages(config: Config) -> dict[int, int]:
    """Stage -> how many are like it."""
    stages = config.parallel.pipeline_model_parallel_size
    found: dict[object, list[int]] = {}
    for stage in range(stages):
        kinds = tuple(config.attention.kind(layer) for layer in layers_of_stage(config, stage))
        found.setdefault((stage == 0, stage == stages - 1, kinds), []).append(stage)
    return {alike[0]: len(alike) for alike in found.values()}


def _shards(config: Config) -> dict[int, int]:
    """Place in the sequence -> how many are like it."""
    size = config.parallel.sequence_parallel_size
    shard = config.model.seq_length // size
    if size == 1:
        return {0: 1}
    groups = {
        number
        for name, kind in config.attention.kinds.items()
        for number in kind.passes_class().subgroup_sizes(
            config.attention.patterns[name], shard, size
        )
    }
    first = [place for place in range(size) if not any(place % number for number in groups)]
    furthest = max(range(size), key=lambda place: (sum(place % n for n in groups), place))
    if furthest in first:  # nothing is exchanged
        return {0: size}
    return {0: len(first), furthest: size - len(first)}


# Settings of a division, and of a rung.
DIVISION = (
    "tensor_model_parallel_size",
    "sequence_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "micro_batch_size",
)
RUNG = ("zero_stage", "recompute_granularity", "memory_path")

# What is computed again, and what is held.
_MEMORY = (
    {"recompute_granularity": None, "memory_path": "off"},
    {"recompute_granularity": None, "memory_path": "on", "offload_activations": False},
    {"recompute_granularity": "full", "memory_path": "off"},
    {"recompute_granularity": "full", "memory_path": "on", "offload_activations": False},
    {"recompute_granularity": None, "memory_path": "on"},
    {"recompute_granularity": "full", "memory_path": "on"},
)
_LARGEST_MICRO_BATCH = 8
_DOUBLINGS = 10


@dataclass(frozen=True)
class Division:
    """How the ranks share the work, and what else is to be decided.

    settings: of `DIVISION`, by name. rungs: resolved configurations, at least one.
    """

    settings: Mapping[str, Any]
    rungs: tuple[Config, ...]


@dataclass(frozen=True)
class Layouts:
    """divisions: those that can be. refused: messages of the configuration about the others, and
    how many layouts each is about."""

    divisions: tuple[Division, ...]
    refused: Counter[str]


def possible_layouts(
    values: Mapping[str, Any], ranks: int, ranks_per_node: int, on_gpu: bool = True
) -> Layouts:
    """All layouts of `ranks` ranks in which the given settings stand.

    values: settings by field name, as given: those of `DIVISION` and `RUNG` among them are not
        varied, but for `--memory-path auto`, which leaves it open. Raises UserError where no layout
        can be: the configuration's own message where there is one for all.
    on_gpu: on CPUs nothing is offloaded, as the host's memory is the device's.
    """
    if not on_gpu:
        values = {"offload_activations": False, **values}
    values = {name: v for name, v in values.items() if (name, v) != ("memory_path", "auto")}
    divisions, refused = [], Counter()
    for settings in _divisions(values, ranks, ranks_per_node):
        rungs = []
        for rung in _rungs(values, settings, ranks):
            try:
                rungs.append(config_from_values({**values, **settings, **rung}).resolve(ranks))
            except UserError as error:
                refused[str(error)] += 1
        if rungs:
            divisions.append(Division(settings, tuple(dict.fromkeys(rungs))))
    if not divisions:
        raise UserError(_nothing(values, refused, ranks))
    return Layouts(tuple(divisions), refused)


def _divisions(
    values: Mapping[str, Any], ranks: int, ranks_per_node: int
) -> Iterator[dict[str, Any]]:
    given = config_from_values(dict(values))
    model = given.model.resolve()
    require_positive(given.parallel, *DIVISION[:3])

    def choices(name: str, otherwise: list[int]) -> list[int]:
        return [values[name]] if name in values else otherwise

    tensor_sizes = [
        size
        for size in _divisors(min(ranks, ranks_per_node))
        if model.num_query_groups % size == 0 and ranks % size == 0
    ]
    for tensor in choices(DIVISION[0], tensor_sizes):
        pipelines = [size for size in _divisors(model.num_layers) if ranks % (tensor * size) == 0]
        for pipeline in choices(DIVISION[2], pipelines):
            left = ranks // (tensor * pipeline) if ranks % (tensor * pipeline) == 0 else 1
            sequences = [size for size in _divisors(left) if model.seq_length % size == 0]
            for sequence in choices(DIVISION[1], sequences):
                replicas = max(1, left // sequence)
                for micro in choices(DIVISION[4], _micro_batches(values, replicas)):
                    for chunk in choices(DIVISION[3], _chunks(model.num_layers, pipeline)):
                        sizes = (tensor, sequence, pipeline, chunk, micro)
                        yield dict(zip(DIVISION, sizes, strict=True))


def _micro_batches(values: Mapping[str, Any], replicas: int) -> list[int]:
    """Where the global batch was left open, it is a micro batch a replica: of one sequence."""
    batch = values.get("global_batch_size")
    if batch is None:
        return [1]
    sizes = [2**i for i in range(_LARGEST_MICRO_BATCH.bit_length())]
    return [size for size in sizes if batch % (size * replicas) == 0] or [1]


def _chunks(layers: int, stages: int) -> list[int | None]:
    """Layers in a chunk: all of the stage, or one, where the schedule may be interleaved."""
    return [None, 1] if 1 < stages < layers else [None]


def _rungs(
    values: Mapping[str, Any], settings: Mapping[str, Any], ranks: int
) -> Iterator[dict[str, Any]]:
    """ZeRO stages that can do something beside this division, with all of `_MEMORY`."""
    model_ranks = settings[DIVISION[0]] * settings[DIVISION[2]]
    divides = settings[DIVISION[2]] == 1 and ranks > model_ranks
    seen = []
    for memory in _MEMORY:
        for stage in (1, 2, 3) if divides else (1,):
            rung = {"zero_stage": stage, **memory}
            rung = {name: value for name, value in rung.items() if name not in values}
            if rung not in seen:
                seen.append(rung)
                yield rung


def _nothing(values: Mapping[str, Any], refused: Counter[str], ranks: int) -> str:
    if not refused:  # the given degrees have no layout of so many ranks
        given = {name: values[name] for name in DIVISION[:3] if name in values}
        words = " x ".join(f"{flag_name(name)} {size}" for name, size in given.items())
        sizes = ", ".join(map(str, _divisors(ranks)))
        return f"--gpus {ranks} does not divide by {words}: set a divisor of it, one of {sizes}"
    message, _ = refused.most_common(1)[0]
    if len(refused) == 1:
        return message
    return (
        f"no layout of {ranks} ranks can be: {message} (and"
        f" {counted(len(refused) - 1, 'other reason')})"
    )


def _divisors(value: int) -> list[int]:
    return [size for size in range(1, value + 1) if value % size == 0]


def searched_settings(config: Config) -> dict[str, Any]:
    """What of a configuration `possible_layouts` may vary, by name."""
    sections = config.parallel, config.training, config.memory
    found = {}
    for section in sections:
        for field in dataclasses.fields(section):
            if field.name in DIVISION + RUNG:
                found[field.name] = getattr(section, field.name)
    return found


def layout_settings(config: Config) -> dict[str, Any]:
    """Return what `possible_layouts` may vary and this layout has set, by field name."""
    settings = {name: v for name, v in searched_settings(config).items() if v is not None}
    if config.memory.memory_path == "on":
        settings["offload_activations"] = config.memory.offload_activations
    return settings


def replicas_of(config: Config, ranks: int) -> int:
    """Return how many ranks hold the same weights."""
    parallel = config.parallel
    return ranks // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def ways_out(
    values: Mapping[str, Any], vocab_size: int, cluster: Cluster, ranks: int
) -> list[tuple[str, Config, int]]:
    """Return what would make a model fit, by the estimate of `--memory-path auto`.

    values: settings as given.
    Returns: words ("without --zero-stage 1", "512 GPUs", "--seq-length 65536"), the layout that
        needs least, and its ranks: each given setting that is alone in the way, or else all of
        them, the fewest GPUs and the longest sequence. Empty where nothing helps.
    """
    given = [name for name in (*DIVISION, *RUNG, *PIECES) if name in values]
    sets = [[name] for name in given] + [given] * (len(given) > 1)
    flags = {name: flag_name(name) + f" {shown(values[name])}" for name in given}
    flags |= {name: f"--no-{flag_name(name)[2:]}" for name in given if values[name] is False}
    flags |= {name: flag_name(name) for name in given if values[name] is True}
    found = []
    for names in sets:
        fewer = {name: value for name, value in values.items() if name not in names}
        least = None if names == given and found else _smallest(fewer, vocab_size, cluster, ranks)
        if least is not None:
            found.append((f"without {' '.join(flags[n] for n in names)}", least, ranks))
    lengths = [values.get("seq_length", 0) >> i for i in range(1, _DOUBLINGS + 1)]
    changes = [
        [(counted(ranks << i, "GPU"), values, ranks << i) for i in range(1, _DOUBLINGS + 1)],
        [(f"--seq-length {n}", {**values, "seq_length": n}, ranks) for n in lengths if n >= 512],
    ]
    for tried in changes:
        leasts = ((what, _smallest(v, vocab_size, cluster, n), n) for what, v, n in tried)
        found += itertools.islice((each for each in leasts if each[1] is not None), 1)
    return found


def _smallest(
    values: Mapping[str, Any], vocab_size: int, cluster: Cluster, ranks: int
) -> Config | None:
    """Return the layout with the smallest estimate, if that fits."""
    from megalong.model.memory_path import needs

    on_gpu = cluster.device.on_gpu
    try:
        cluster.check_gpus(ranks)
        layouts = possible_layouts(values, ranks, cluster.gpus_per_node, on_gpu)
    except UserError:
        return None
    least, found = USABLE * cluster.device.memory, None
    for config in (rung for division in layouts.divisions for rung in division.rungs):
        needed = needs(config, vocab_size, replicas_of(config, ranks), on_gpu=on_gpu)
        on_node = needed.host * min(ranks, cluster.gpus_per_node)
        fits = needed.device <= least and on_node <= USABLE * cluster.host_memory
        if fits and (found is None or needed.device < least):
            least, found = needed.device, config
    return found


def check_offload(config: Config) -> None:
    """Raise UserError where the DeepSpeed file offloads what cannot be planned: all but an
    optimizer that is wholly in the host's memory."""
    file = config.training.deepspeed_config
    zero = read_deepspeed_file(file).get("zero_optimization") if file is not None else None
    if not isinstance(zero, dict):
        return
    weights, optimizer = (
        given if isinstance(given := zero.get(key), dict) else {}
        for key in ("offload_param", "offload_optimizer")
    )
    on_host = optimizer.get("device") == "cpu"
    replaced = "set offload_optimizer instead, which took its place"
    divides = "leave it out; --zero-stage 3 divides the weights over the ranks"
    without = "set it to cpu, or leave offload_optimizer out"
    for key, refused, instead in (
        ("cpu_offload", zero.get("cpu_offload"), replaced),
        ("cpu_offload_param", zero.get("cpu_offload_param"), replaced),
        ("offload_param", weights.get("device", "none") != "none", divides),
        ("offload_optimizer.device nvme", optimizer.get("device") == "nvme", without),
        (
            "offload_optimizer.ratio",
            on_host and optimizer.get("ratio", 1.0) != 1.0,
            "leave it out",
        ),
        (
            "offload_optimizer.super_offload",
            on_host and optimizer.get("super_offload"),
            "leave it out",
        ),
        ("zenflow", "zenflow" in zero, "leave it out"),
    ):
        if refused:
            raise UserError(
                f"--deepspeed-config {file}: zero_optimization.{key} cannot be planned: {instead}"
            )
