"""Pretrain a LongNet.

    deepspeed pretrain_longnet.py --data-path DATA --tokenizer-model FILE --save RUN [flags]
    torchrun --nproc_per_node 8 pretrain_longnet.py ...
    python pretrain_longnet.py ...                        (one process)
    deepspeed pretrain_longnet.py --config recipe.yaml    (a run of several stages, from one file)

A run small enough for a laptop's CPU, on the data that `make quickstart` leaves behind:

    python pretrain_longnet.py --precision fp32 --num-layers 2 --hidden-size 128 \\
        --num-attention-heads 4 --seq-length 1024 --train-iters 20 --lr 3e-3 \\
        --segment-lengths 256 512 1024 --dilation-rates 1 2 4 \\
        --data-path runs/quickstart/data/python_text_document \\
        --tokenizer-model runs/quickstart/tokenizer.model --save runs/first

`--help` lists all flags; `--config FILE.yaml` takes the same from a file, which may have a list
`stages:` of what changes in the course of the run (megalong/config/stages.py); `--dry-run` says
what that costs.
"""

import sys
from collections.abc import Sequence


def main(arguments: list[str], asked: Sequence[int] = ()) -> None:
    """Train as these flags say, as one rank of however many were started; `asked`: signals that
    have asked it to stop already. Raises UserError where a flag, a file or the machine does not
    allow it."""
    from megalong.config import world_size
    from megalong.config.recipe import parse_run
    from megalong.training.stopping import Launchers
    from megalong.utils.machine import check_master_port

    launchers = Launchers()
    recipe = parse_run(arguments, description=__doc__)
    if recipe.dry_run is not None:
        from megalong.training.stage_table import print_stages

        print_stages(recipe)
        return
    stages = recipe.resolve(world_size())
    check_master_port()

    # The slow imports wait until the flags are known to be right, and the processes wait for each
    # other only once each of them has found its data and its checkpoint.
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    from megalong.parallel import check_precision, set_gpu_defaults
    from megalong.training.loop import Beginning, checked_data, train_stages
    from megalong.training.metrics import check_wandb
    from megalong.training.run_folder import prepare_run_folder
    from megalong.training.stages import stages_ahead
    from megalong.training.stopping import StopRequest

    set_gpu_defaults()
    first, *later = stages_ahead(stages)
    config = first.config
    check_precision(config.training.precision)
    data = checked_data(first, world_size())
    for stage in later:  # what is missing there is better found now
        checked_data(stage, world_size())
    check_wandb(config)
    prepare_run_folder(config)
    train_stages(
        Beginning.of(first, data),
        later,
        lambda: StopRequest(config.run.exit_duration_in_mins, asked, launchers=launchers),
    )


if __name__ == "__main__":
    from megalong.utils.command_line import remember_requests

    asked = remember_requests()  # before anything that takes longer to import

    from megalong.utils.command_line import run

    run(lambda: main(sys.argv[1:], asked), system_errors=False)
