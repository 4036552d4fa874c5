"""A search in words: the table of the best layouts, one of them explained, what does not fit."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.config import Config
from megalong.config.arguments import to_yaml
from megalong.config.memory import USABLE
from megalong.dry_run.cluster import Cluster
from megalong.dry_run.layouts import searched_settings, ways_out
from megalong.dry_run.search import PlannedLayout, Search
from megalong.utils.errors import UserError, aligned, counted
from megalong.utils.progress import human_bytes

REPOSITORY = Path(__file__).resolve().parents[2]

_JOB = """\
#!/usr/bin/env bash
# Pretrain as planned: {summary}
#     sbatch {name} [further flags of pretrain_longnet.py]
# Fill in the first two lines. MEGALONG is the folder of megalong, as all nodes see it; what the job
# does at its end, and the variables that it knows: examples/slurm/README.md there.
#SBATCH --account=ACCOUNT
#SBATCH --partition=PARTITION
#SBATCH --job-name=longnet
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --exclusive
# Set it to what the partition allows: a job whose time is up is started again, and goes on.
# {predicted}
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

trap early=true USR1 TERM # until examples/slurm/common.sh has a better one
export MEGALONG=${{MEGALONG:-{repository}}} RUN=${{RUN:-{run}}}{ranks}
set -- --config {config} "$@"
# shellcheck source=/dev/null
source "$MEGALONG/examples/slurm/srun_torchrun.sbatch"
"""

_COMMAND = """\
#!/usr/bin/env bash
# Pretrain as planned: {summary}
#     bash {name} [further flags of pretrain_longnet.py]
{how}
set -euo pipefail
MEGALONG=${{MEGALONG:-{repository}}}
if [[ -d $MEGALONG/.venv ]]; then PATH=$MEGALONG/.venv/bin:$PATH; fi
exec {launcher} "$MEGALONG/pretrain_longnet.py" --config {config}{save} "$@"
"""

_SEVERAL_NODES = """\
# on every node, with NODE_RANK (0 is the first) and MASTER_ADDR, the first node's name, set"""


FILES = "config.yaml", "launch.sh", "job.sbatch"


def check_emit(folder: Path, ranks: int, ranks_per_node: int, *, overwrite: bool) -> None:
    """Raise UserError where `write_launch_files` would."""
    if ranks > ranks_per_node and ranks % ranks_per_node:
        raise UserError(
            f"--emit: {ranks} ranks do not fill nodes of {ranks_per_node}: set --gpus to a multiple"
        )
    for name in FILES:
        if (folder / name).exists() and not overwrite:
            raise UserError(f"--emit {folder / name}: is there already: set --overwrite")


def write_launch_files(
    folder: Path,
    config: Config,
    ranks: int,
    ranks_per_node: int,
    summary: str,
    *,
    overwrite: bool,
    on_gpu: bool = True,
    predicted: str = "",
) -> list[Path]:
    """Write config.yaml, launch.sh and job.sbatch into a folder, and return their paths.

    config: as given, not resolved, with the layout's settings. summary: a line about the layout.
    on_gpu: a job on CPUs asks for no GPUs, and says how many ranks a node has instead. predicted:
        what is known of the time that the training takes, a sentence.
    Raises UserError where one of them is there already, unless `overwrite`.
    """
    check_emit(folder, ranks, ranks_per_node, overwrite=overwrite)
    folder, per_node = folder.resolve(), min(ranks, ranks_per_node)
    nodes = ranks // per_node
    settings = folder / "config.yaml"
    words = {
        "summary": summary,
        "config": shlex.quote(str(settings)),
        "repository": shlex.quote(str(REPOSITORY)),
        "nodes": nodes,
        "run": shlex.quote(str(Path(config.run.save or folder / "run").resolve())),
        "save": "" if config.run.save else f" --save {shlex.quote(str(folder / 'run'))}",
        "gpus": f"#SBATCH --gpus-per-node={per_node}\n" if on_gpu else "",
        "ranks": "" if on_gpu else f" RANKS_PER_NODE={per_node}",
        "predicted": predicted or "How long the training takes was not planned.",
    }
    torchrun = f"torchrun --standalone --nproc-per-node={per_node}"
    how = "# on the node"
    if nodes > 1:
        how = _SEVERAL_NODES
        torchrun = (
            f'torchrun --nnodes={nodes} --nproc-per-node={per_node} --node-rank="$NODE_RANK"'
            ' --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}"'
        )
    texts = {
        "config.yaml": to_yaml(config, leave_out="defaults"),
        "launch.sh": _COMMAND.format(name="launch.sh", how=how, launcher=torchrun, **words),
        "job.sbatch": _JOB.format(name="job.sbatch", **words),
    }
    paths = [folder / name for name in FILES]
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    return paths


GIB = 2**30
# Of 14 launches of two CPU ranks, the only ones that were measured.
ERROR = (
    "Where predicted times were measured (14 launches of 2 CPU ranks), they were 1.35 to 2.6 times"
    " too short, in the right order; no GPU was."
)
_SECONDS = {"days": 86_400, "hours": 3_600, "min": 60, "s": 1}


@dataclass(frozen=True)
class Training:
    """What is planned: tokens of the whole training, on so many devices of a cluster."""

    tokens: int
    ranks: int
    cluster: Cluster

    def seconds(self, layout: PlannedLayout) -> float:
        """Of the training, without evaluations, checkpoints and failures."""
        return self.tokens / layout.cost.tokens_per_second

    def days(self, layout: PlannedLayout) -> float:
        """The same in days."""
        return self.seconds(layout) / _SECONDS["days"]

    def dollars(self, layout: PlannedLayout) -> float:
        """Of all devices for as long, at the cluster's price."""
        hours = self.seconds(layout) / _SECONDS["hours"]
        return hours * self.ranks * self.cluster.price


def duration(seconds: float) -> str:
    """ "5.33 s", "1 hour", "1,234 days"."""
    unit = next((unit for unit, size in _SECONDS.items() if seconds >= size), "s")
    value = seconds / _SECONDS[unit]
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{number} {unit.removesuffix('s') if number == '1' and unit != 's' else unit}"


def _dollars(value: float) -> str:
    """ "1,234", "0.56", and what is below a cent as such."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.01 else "<0.01"


def layout_name(config: Config, ranks: int) -> str:
    """ "TP 2 SP 8 PP 2 DP 4, micro batches 4 of 1, ZeRO 1, recompute full, memory path on"."""
    parallel, training, memory = config.parallel, config.training, config.memory
    replicas = parallel.data_parallel_size(ranks)
    words = (
        f"TP {parallel.tensor_model_parallel_size} SP {parallel.sequence_parallel_size}"
        f" PP {parallel.pipeline_model_parallel_size} DP {replicas}"
    )
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        words += f", chunks of {counted(parallel.num_layers_per_virtual_pipeline_stage, 'layer')}"
    words += f", {config.num_microbatches(replicas)} x {training.micro_batch_size} sequences"
    words += f", ZeRO {parallel.zero_stage}"
    if parallel.recompute_granularity is not None:
        words += f", recompute {parallel.recompute_granularity}"
    words += f", memory path {memory.memory_path}"
    if memory.memory_path == "on" and not memory.offload_activations:
        words += " without offload"
    return words


def table(layouts: Sequence[PlannedLayout], training: Training) -> str:
    """The layouts as lines of a table, numbered from 1."""
    head = (
        "step s", "tokens/s", "MFU", "GiB", "of it", "host GiB", "traffic GB", "time", "cost $",
        "layout",
    )  # fmt: skip
    rows = [("", *head)]
    for number, layout in enumerate(layouts, 1):
        cost = layout.cost
        rows.append(
            (
                str(number),
                f"{cost.total:.3g}",
                f"{cost.tokens_per_second:,.0f}",
                f"{cost.mfu:.1%}",
                f"{sum(layout.memory.values()) / GIB:.1f}",
                _shares(layout.memory),
                f"{layout.host / GIB:.1f}",
                f"{sum(_bytes_by_axis(layout).values()) / 1e9:.3g}",
                duration(training.seconds(layout)),
                _dollars(training.dollars(layout)),
                layout_name(layout.config, training.ranks),
            )
        )
    return aligned(rows, words=(-1,))


def rejected(search: Search, training: Training, most: int = 5) -> str:
    """What does not fit, and by how much; what the configuration refuses, and why."""
    lines = []
    usable = USABLE * training.cluster.device.memory
    short = [layout for layout in search.planned if not layout.fits]
    if short:
        lines.append(
            f"{counted(len(short), 'layout')} would not fit in {usable / GIB:.1f} GiB"
            f" ({USABLE:.0%} of the device's memory), or in the host's; the nearest:"
        )
        short.sort(key=lambda layout: sum(layout.memory.values()))
        for layout in short[:most]:
            lines.append(f"    {_what_is_short(layout, training)}")
    for activations, why in (
        (False, "by the estimate of --memory-path auto"),
        (True, "by their activations, of which another ZeRO stage tells"),
    ):
        of_reason = [each for each in search.not_run if each.activations == activations]
        if of_reason:
            least = min(of_reason, key=lambda each: each.estimate)
            lines.append(
                f"{counted(len(of_reason), 'layout')} not run that would not fit in"
                f" {usable / GIB:.1f} GiB {why}; the nearest:"
            )
            name = layout_name(least.config, training.ranks)
            lines.append(f"    {least.estimate / GIB:,.1f} GiB: {name}")
    if search.slower:
        lines.append(
            f"{counted(len(search.slower), 'other way')} to share the work not run, which closed"
            " formulas estimate to be slower"
        )
    if search.refused:
        lines.append(f"{counted(search.refused.total(), 'layout')} refused:")
        for message, count in search.refused.most_common(most):
            lines.append(f"    {count} x {message}")
        if len(search.refused) > most:
            lines.append(f"    and {len(search.refused) - most} other reasons")
    return "\n".join(lines)


def ways_out_of(values: Mapping[str, Any], vocab_size: int, cluster: Cluster, ranks: int) -> str:
    """Return a line for each thing that would make the model fit."""
    found = ways_out(values, vocab_size, cluster, ranks)
    if not found:
        return (
            "\nNo layout fits, nor with other settings of it, more GPUs or a shorter sequence: a"
            " smaller model would."
        )
    lines = [f"    {what}: {layout_name(config, more)}" for what, config, more in found]
    return "\n".join(
        ["\nNo layout fits. By the estimate of --memory-path auto these would:", *lines]
    )


def explained(layout: PlannedLayout, training: Training) -> str:
    """Where the time, the memory and the traffic of a step go."""
    cost, cluster = layout.cost, training.cluster
    device = cluster.device
    lines = [
        layout_name(layout.config, training.ranks),
        f"on {counted(training.ranks, 'GPU')} of {cluster.name}"
        f" ({'calibrated ' + cluster.calibrated if cluster.calibrated else 'not calibrated'})",
        "",
        "seconds of a step, in the slowest stage:",
    ]
    seconds = {f"compute, {part}": value for part, value in cost.compute.items()}
    seconds |= {f"waiting for the {axis} axis": v for axis, v in cost.communication.items()}
    seconds |= {
        "idle in the pipeline": cost.bubble,
        "waiting for the host's memory": cost.offload,
        "waiting for launches": cost.launches,
        "optimizer": cost.update,
    }
    rows = [
        (what, f"{value:.4g}", f"{value / cost.total:.1%}")
        for what, value in sorted(seconds.items(), key=lambda item: -item[1])
        if value > 1e-6 * cost.total
    ]
    rows.append(("total", f"{cost.total:.4g}", ""))
    rows += [
        (f"hidden behind computation: {axis} axis", f"{value:.4g}", "")
        for axis, value in cost.hidden.items()
        if value
    ]
    lines += [_indented(rows), "", "GiB of the fullest rank at its peak:"]
    memory = [(kind, f"{value / GIB:.3f}") for kind, value in layout.memory.items() if value]
    total = sum(layout.memory.values())
    memory.append(("total", f"{total / GIB:.3f}"))
    memory.append(("the device has", f"{device.memory / GIB:.3f}"))
    memory.append(("of the host", f"{layout.host / GIB:.3f}"))
    lines += [
        _indented(memory),
        "",
        "traffic of a step, of the slowest rank (a call counts its larger buffer):",
    ]
    traffic = [
        (axis, name, f"{count['calls']:,} calls", human_bytes(count["bytes"]))
        for axis, of_axis in layout.traffic.items()
        for name, count in of_axis.items()
    ]
    lines.append(_indented(traffic) if traffic else "    nothing")
    flops = sum(layout.flops.values())
    lines += [
        "",
        f"{flops:.4g} FLOPs and {layout.kernels:,} launches a rank; {cost.tokens_per_second:,.0f}"
        f" tokens/s, {cost.mfu:.1%} MFU; {training.tokens:.4g} tokens in"
        f" {duration(training.seconds(layout))} for ${_dollars(training.dollars(layout))}",
        ERROR,
    ]
    return "\n".join(lines)


def as_json(found: Search, training: Training, vocab_size: int) -> dict[str, Any]:
    """All of a plan: sizes in bytes, times in seconds."""

    def cost_of(layout: PlannedLayout) -> dict[str, Any] | None:
        if layout.cost is None:
            return None
        cost = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in vars(layout.cost).items()
        }
        return cost | {"days": training.days(layout), "dollars": training.dollars(layout)}

    def row(layout: PlannedLayout) -> dict[str, Any]:
        return {
            "layout": layout_name(layout.config, training.ranks),
            "settings": searched_settings(layout.config),
            "global_batch_size": layout.config.training.global_batch_size,
            "fits": layout.fits,
            "memory": dict(layout.memory),
            "host": layout.host,
            "traffic": layout.traffic,
            "flops": {f"{part}, {way}": n for (part, way), n in layout.flops.items()},
            "kernels": layout.kernels,
            "cost": cost_of(layout),
        }

    return {
        "cluster": training.cluster.name,
        "calibrated": training.cluster.calibrated,
        "gpus": training.ranks,
        "gpus_per_node": training.cluster.gpus_per_node,
        "tokens": training.tokens,
        "vocab_size": vocab_size,
        "layouts": [row(layout) for layout in found.planned],
        "not_run": [
            {
                "layout": layout_name(each.config, training.ranks),
                "estimate": each.estimate,
                "activations": each.activations,
            }
            for each in found.not_run
        ],
        "slower": [
            {"layout": layout_name(each.config, training.ranks), "estimate": each.estimate}
            for each in found.slower
        ],
        "refused": dict(found.refused),
    }


def _what_is_short(layout: PlannedLayout, training: Training) -> str:
    total, cluster = sum(layout.memory.values()), training.cluster
    name = layout_name(layout.config, training.ranks)
    words = f"{total / GIB:.1f} GiB ({_shares(layout.memory)})"
    on_node = layout.host * min(cluster.gpus_per_node, training.ranks)
    if on_node > USABLE * cluster.host_memory:
        words += (
            f", and {on_node / GIB:.0f} GiB on the host of a node, which has"
            f" {cluster.host_memory / GIB:.0f} GiB"
        )
    return f"{words}: {name}"


def _shares(memory: Mapping[str, int], most: int = 2) -> str:
    """The largest kinds and their shares: "62% activations, 21% weights"."""
    total = sum(memory.values())
    largest = sorted(memory.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{value / total:.0%} {kind}" for kind, value in largest)


def _bytes_by_axis(layout: PlannedLayout) -> Counter[str]:
    found: Counter[str] = Counter()
    for axis, of_axis in layout.traffic.items():
        found[axis] += sum(count["bytes"] for count in of_axis.values())
    return found


def _indented(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"    {line}" for line in aligned(rows).splitlines())
