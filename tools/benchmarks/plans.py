"""Plans of long sequences by tools/plan_run.py: a million tokens on few GPUs, a billion on 1,024.

    python tools/benchmarks/plans.py --output runs/plans

plans models of 125M and 1.3B parameters, for 2^20 tokens on 1, 8 and 64 H100s, for 2^30 on 1,024:
one sequence a step, segments that grow eightfold from 2,048 tokens to the whole sequence. Writes
the answer to each, with where the time, the memory and the traffic of the best layout go, to
PLAN.txt and PLAN.json in --output, and plans.md: the best layout of each, and its command. A plan
that is there is not made again. Half an hour on two cores.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import REPOSITORY, ArgumentParser, run
from megalong.utils.errors import UserError, did_you_mean

MODELS = {"125m": "longnet-llama-125m", "1.3b": "longnet-llama-1.3b"}
SIZES = {2**20: (1, 8, 64), 2**30: (1024,)}  # tokens -> GPUs
FIRST_SEGMENT, RATIO = 2048, 8


def main() -> int:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.plans:
        path = args.output / f"{name}.json"
        if path.exists():
            continue
        print(f"{name}: {shlex.join(PLANS[name])}", flush=True)
        partial, start = path.with_suffix(".partial"), time.perf_counter()
        command = [sys.executable, str(REPOSITORY / PLANS[name][1]), *PLANS[name][2:]]
        done = subprocess.run(
            [*command, "--json", str(partial)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode not in (0, 1) or not partial.read_text():
            raise UserError(f"{name}: plan_run.py ended with status {done.returncode}")
        plan = json.loads(partial.read_text()) | {"seconds": time.perf_counter() - start}
        path.with_suffix(".txt").write_text(done.stdout)
        path.write_text(json.dumps(plan, indent=1) + "\n")
        partial.unlink()
        print(done.stdout, flush=True)
    (args.output / "plans.md").write_text(report(args.output))
    return 0


def pattern(tokens: int) -> tuple[list[int], list[int]]:
    """Segment lengths, and dilation rates that grow with them: each branch has 2,048 rows."""
    lengths = [FIRST_SEGMENT]
    while lengths[-1] * RATIO < tokens:
        lengths.append(lengths[-1] * RATIO)
    lengths.append(tokens)
    return lengths, [length // FIRST_SEGMENT for length in lengths]


def command_of(preset: str, tokens: int, gpus: int) -> list[str]:
    lengths, rates = pattern(tokens)
    words = [
        "python", "tools/plan_run.py", "--preset", preset, "--cluster", "h100",
        "--gpus", gpus, "--seq-length", tokens, "--global-batch-size", 1,
        "--segment-lengths", *lengths, "--dilation-rates", *rates, "--explain",
    ]  # fmt: skip
    return list(map(str, words))


PLANS = {
    f"{model}_2e{tokens.bit_length() - 1}_{gpus}": command_of(preset, tokens, gpus)
    for model, preset in MODELS.items()
    for tokens, sizes in SIZES.items()
    for gpus in sizes
}


def parse_arguments() -> Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), help="which (default: all)")
    args = parser.parse_args()
    for name in args.plans:
        if name not in PLANS:
            known = ", ".join(PLANS)
            raise UserError(f"--plans {name}: choose from {known}{did_you_mean(name, PLANS)}")
    return args


def report(folder: Path) -> str:
    """The best layout of each plan that is there, as a table; the commands below it."""
    lines = [
        "| plan | GPUs | step s | tokens/s | MFU | GiB of a GPU | GiB of a host | GB sent by the"
        " slowest rank | layout |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    commands = []
    for name, command in PLANS.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        plan = json.loads(path.read_text())
        best = next((layout for layout in plan["layouts"] if layout["fits"]), None)
        cells = [name, f"{plan['gpus']:,}"]
        if best is None:
            cells += ["none fits", *[""] * 6]
        else:
            cost = best["cost"]
            sent = sum(c["bytes"] for axis in best["traffic"].values() for c in axis.values())
            cells += [
                f"{cost['total']:.3g}",
                f"{cost['tokens_per_second']:,.0f}",
                f"{cost['mfu']:.1%}",
                f"{sum(best['memory'].values()) / 2**30:.1f}",
                f"{best['host'] * min(plan['gpus'], plan['gpus_per_node']) / 2**30:.0f}",
                f"{sent / 1e9:.3g}",
                best["layout"],
            ]
        lines.append(f"| {' | '.join(cells)} |")
        commands.append(f"    {shlex.join(command)}")
    return "\n".join([*lines, "", "Each by its command:", "", *commands]) + "\n"


if __name__ == "__main__":
    run(main)
