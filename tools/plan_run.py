"""What a training needs, before it is started: layouts that fit, how fast they are, at what cost.

    python tools/plan_run.py --preset longnet-llama-1.3b --cluster h100 --gpus 64
    python tools/plan_run.py --config run.yaml --cluster my-cluster.yaml --gpus 1024 --explain
    python tools/plan_run.py --config run.yaml --cluster h100 --gpus 64 --emit runs/planned
    python tools/plan_run.py --config recipe.yaml --stage long --cluster h100 --gpus 64

Takes the flags of pretrain_longnet.py, and a cluster: a name (--list-clusters) or a YAML file of
your own (megalong/dry_run/clusters has some to copy). Settings of the layout that are given stay
(--tensor-model-parallel-size 8), the others are searched: tensor, sequence and pipeline degrees,
micro batch, ZeRO stage, recomputation, memory path. Memory, traffic and FLOPs come from the
training's own code, run on tensors that hold no data; the time is a model's, from the cluster's
figures. Neither data nor tokenizer are needed. Wants a C++ compiler, and no GPU.
Exit status: 0, 1 where no layout fits, 2 for a mistake. Ctrl-C shows what has been found so far.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import run
from megalong.utils.errors import UserError, counted

if TYPE_CHECKING:
    from megalong.dry_run.cluster import Cluster
    from megalong.dry_run.plan_text import Training
    from megalong.dry_run.search import PlannedLayout, Search

VOCABULARY = 32_000  # ids, where no tokenizer is given
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> int:
    from megalong.config.arguments import build_parser
    from megalong.config.recipe import recipe_of
    from megalong.dry_run.cluster import cluster_names, load_cluster

    parser = build_parser(__doc__)
    _add_flags(parser)
    args = parser.parse_args()
    if args.list_clusters:
        for name in cluster_names():
            print(f"{name:16}{load_cluster(name).name}")
        return 0
    signal.signal(signal.SIGTERM, _stop)
    _check(args)
    cluster = load_cluster(args.cluster)
    cluster.check_gpus(args.gpus)
    recipe = recipe_of(vars(args))
    stage = recipe.stage(args.stage)
    with stage.errors():
        return plan(recipe.alone(stage), args, cluster)


def _stop(number: int, _: Any) -> None:
    """SIGTERM ends a plan as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    from megalong.config.flags import whole_number

    group = parser.add_argument_group("plan", "what is planned for, and what comes of it")

    def add(name: str, default: Any = None, **options: Any) -> None:
        group.add_argument(name, default=default, **options)

    add("--cluster", metavar="NAME|FILE", help="what it runs on")
    add("--gpus", type=whole_number, help="devices of the launch, a rank each")
    add("--stage", metavar="NAME", help="which of the stages that the file of --config has")
    add("--list-clusters", False, action="store_true", help="say which names there are")
    add(
        "--vocab-size",
        type=whole_number,
        help="ids of the tokenizer (default: of the one given, or 32000)",
    )
    add("--train-tokens", type=float, help="for days and cost (default: those of --train-iters)")
    add("--top", 5, type=int, help="layouts in the table")
    add(
        "--explain",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="say where time, memory and traffic of the N-th layout go (default: the first)",
    )
    add(
        "--emit",
        type=Path,
        metavar="FOLDER",
        help="write config.yaml, launch.sh, job.sbatch of the best layout, or of the explained one",
    )
    add("--overwrite", False, action="store_true", help="with --emit: replace such files")
    add("--json", type=Path, metavar="FILE", help="write all that was planned")
    add("--processes", type=int, help="that plan (default: one a core; of more than 4 few work)")


def _check(args: argparse.Namespace) -> None:
    for name in ("cluster", "gpus"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} says what is planned for: set it (--help shows examples)")
    for name in ("gpus", "vocab_size", "top", "processes", "train_tokens", "explain"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.stage is not None and args.emit is not None:
        raise UserError(
            "--emit writes a run of its own, and a stage goes on from the one before it: leave it"
            " out, and put into the stage what is said at the end"
        )


def _check_explain(number: int, layouts: int, at_most: str = "") -> None:
    if number > layouts:
        raise UserError(
            f"--explain {number}: the table has {at_most}{counted(layouts, 'layout')}: set a larger"
            " --top, or a smaller number"
        )


def _data(values: dict[str, Any]) -> dict[str, Any]:
    """What stands in the place of data and of a tokenizer, where none are given."""
    from megalong.config.stages import data_to_come

    unread = data_to_come(values)
    if not {"tokenizer_type", "tokenizer_model"} & set(values):
        unread["tokenizer_type"] = "ByteTokenizer"
    return unread


def plan(given: dict[str, Any], args: argparse.Namespace, cluster: Cluster) -> int:
    """Search, print, and write what is asked for; the exit status. given: settings by name."""
    from megalong.config.arguments import config_from_values
    from megalong.config.training import keeps_optimizer_on_host
    from megalong.dry_run import fake_device
    from megalong.dry_run.layouts import check_offload, possible_layouts
    from megalong.dry_run.plan_text import (
        Training,
        as_json,
        check_emit,
        explained,
        rejected,
        table,
        ways_out_of,
    )
    from megalong.dry_run.search import Search, search
    from megalong.utils.progress import progress_bar

    values = given | _data(given)
    config = config_from_values(values)
    check_offload(config)
    if cluster.device.on_gpu and keeps_optimizer_on_host(config.training.deepspeed_config):
        cluster.host_seconds(0)  # its description has to say
    cluster.device.peak(DTYPES[config.training.precision])
    vocab_size = args.vocab_size or _vocabulary(given)
    found = possible_layouts(values, args.gpus, cluster.gpus_per_node, cluster.device.on_gpu)
    if args.explain is not None:
        most = min(args.top, len(found.divisions))
        _check_explain(args.explain, most, "at most ")
    if cluster.device.on_gpu and fake_device.compiler() is None:
        raise UserError("plans for GPUs need a C++ compiler: install g++, or set CXX")
    if args.emit is not None:
        check_emit(args.emit, args.gpus, cluster.gpus_per_node, overwrite=args.overwrite)
    if args.json is not None:
        args.json.touch()
    layouts = sum(len(division.rungs) for division in found.divisions)
    print(
        f"{counted(layouts, 'layout')} in {counted(len(found.divisions), 'way')} to share the work;"
        " the promising ones are run, which takes seconds to minutes for each",
        file=sys.stderr,
    )
    result, stopped_by = Search(), None
    line = "{desc}: {n_fmt} runs done, {elapsed}"  # how many there will be, nobody knows
    with progress_bar(None, "run", "planning", bar_format=line) as bar:
        try:
            search(
                found.divisions,
                vocab_size,
                cluster,
                args.gpus,
                wanted=args.top,
                processes=args.processes,
                progress=lambda done: bar.update(done - bar.n),
                into=result,
            )
        except KeyboardInterrupt as stop:
            stopped_by = stop.args[0] if stop.args else signal.SIGINT
    result.refused += found.refused
    best = result.fitting[: args.top]
    tokens = args.train_tokens or _tokens(values, args.gpus, result)
    training = Training(tokens, args.gpus, cluster)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(result, training, vocab_size), indent=1) + "\n")
    if best:
        print(table(best, training))
    words = rejected(result, training)
    if words:
        print("\n" + words)
    number = args.explain or 1
    if args.stage is not None and number <= len(best):
        print(f"\nLayout {number}, for the stage {args.stage}; the others keep what they have, and")
        print(f"pretrain_longnet.py --dry-run {args.gpus} says whether they can:\n")
        print(stage_settings(best[number - 1], args), end="")
    if stopped_by is not None:
        print(f"\nStopped: {counted(len(result.planned), 'layout')} had been run.")
        return 128 + stopped_by
    if not result.planned and not result.not_run:
        print("\nNo layout could be run.")
        return 1
    if not best:
        print(ways_out_of(values, vocab_size, cluster, args.gpus))
        return 1
    _check_explain(number, len(best))
    if args.explain is not None:
        print("\n" + explained(best[number - 1], training))
    if args.emit is not None:
        emit(best[number - 1], given, args, training)
    return 0


def stage_settings(layout: PlannedLayout, args: argparse.Namespace) -> str:
    """YAML of a layout, and of what else of it the command line sets, as a stage has it."""
    import yaml

    from megalong.config.stages import HOW
    from megalong.dry_run.layouts import layout_settings

    given = {name: value for name, value in vars(args).items() if name in HOW}
    settings = given | layout_settings(layout.config)
    return textwrap.indent(yaml.safe_dump(settings, sort_keys=False), " " * 4)


def _vocabulary(values: dict[str, Any]) -> int:
    """Ids of the tokenizer that is given, or the usual number."""
    if not {"tokenizer_type", "tokenizer_model"} & set(values):
        return VOCABULARY
    from megalong.config.arguments import config_from_values
    from megalong.data.tokenizers.tokenizer import build_tokenizer

    data = config_from_values(values).data.resolve()
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model).vocab_size


def _tokens(values: dict[str, Any], ranks: int, found: Search) -> int:
    """Of --train-iters steps; where the global batch was left open, of the first layout."""
    if not found.planned:
        return 1
    config = found.planned[0].config
    training = config.training
    return training.train_iters * training.global_batch_size * config.model.seq_length


def emit(
    layout: PlannedLayout, given: dict[str, Any], args: argparse.Namespace, training: Training
) -> None:
    """Write what starts a layout, and say what it lacks. given: settings by name."""
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.layouts import layout_settings
    from megalong.dry_run.plan_text import duration, layout_name, write_launch_files

    config = config_from_values({**given, **layout_settings(layout.config)})
    predicted = ""
    if "train_iters" in given:
        seconds = given["train_iters"] * layout.cost.total
        predicted = f"Planned are {duration(seconds)}, without saving and evaluations."
    paths = write_launch_files(
        args.emit,
        config,
        training.ranks,
        training.cluster.gpus_per_node,
        layout_name(layout.config, training.ranks),
        overwrite=args.overwrite,
        on_gpu=training.cluster.device.on_gpu,
        predicted=predicted,
    )
    lacking = [f"--{name.replace('_', '-')}" for name in _data(given)]
    more = f"; they start with {' and '.join(lacking)} behind them" if lacking else ""
    print(f"\nwrote {', '.join(path.name for path in paths)} into {args.emit}{more}")


if __name__ == "__main__":
    run(main)
