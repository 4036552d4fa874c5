"""The files that start a planned layout: its configuration, a command, a SLURM job."""

from __future__ import annotations

import shlex
from pathlib import Path

from megalong.config import Config
from megalong.config.arguments import to_yaml
from megalong.utils.errors import UserError

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
