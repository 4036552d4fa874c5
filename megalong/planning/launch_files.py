"""The files that start a planned layout: its configuration, a command, a SLURM job."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from megalong.config import Config
from megalong.config.arguments import to_yaml
from megalong.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

_JOB = """\
#!/usr/bin/env bash
# Pretrain as planned: {summary}
#     RUN=runs/planned sbatch {name} [further flags of pretrain_longnet.py]
# Fill in the first two lines. MEGALONG is the folder of megalong, as all nodes see it; what the job
# does at its end, and the variables that it knows: examples/slurm/README.md there.
#SBATCH --account=ACCOUNT
#SBATCH --partition=PARTITION
#SBATCH --job-name=longnet
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

trap early=true USR1 TERM # until examples/slurm/common.sh has a better one
export MEGALONG=${{MEGALONG:-{repository}}}
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
exec {launcher} "$MEGALONG/pretrain_longnet.py" --config {config} "$@"
"""

_SEVERAL_NODES = """\
# on every node, with NODE_RANK (0 is the first) and MASTER_ADDR, the first node's name, set"""


def write_launch_files(
    folder: Path, config: Config, ranks: int, ranks_per_node: int, summary: str, *, overwrite: bool
) -> list[Path]:
    """Write config.yaml, launch.sh and job.sbatch into a folder, and return their paths.

    config: as given, not resolved, with the layout's settings. summary: a line about the layout.
    Raises UserError where one of them is there already, unless `overwrite`.
    """
    folder = folder.resolve()
    per_node = min(ranks, ranks_per_node)
    if ranks % per_node:
        raise UserError(
            f"--emit: {ranks} ranks do not fill nodes of {per_node}: set --gpus to a multiple"
        )
    nodes = ranks // per_node
    settings = folder / "config.yaml"
    words = {
        "summary": summary,
        "config": shlex.quote(str(settings)),
        "repository": shlex.quote(str(REPOSITORY)),
        "nodes": nodes,
        "per_node": per_node,
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
        "config.yaml": to_yaml(_open(config), leave_out="defaults"),
        "launch.sh": _COMMAND.format(name="launch.sh", how=how, launcher=torchrun, **words),
        "job.sbatch": _JOB.format(name="job.sbatch", **words),
    }
    paths = [folder / name for name in texts]
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"--emit {path}: is there already: set --overwrite to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    return paths


def _open(config: Config) -> Config:
    """Without a run folder: the job scripts choose it."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, save=None, load=None))
