"""Pretrain a LongNet.

    deepspeed pretrain_longnet.py --data-path DATA --tokenizer-model FILE --save RUN [flags]
    torchrun --nproc_per_node 8 pretrain_longnet.py ...
    python pretrain_longnet.py ...                        (one process)

A run small enough for a laptop's CPU, on the data that `make quickstart` leaves behind:

    python pretrain_longnet.py --precision fp32 --num-layers 2 --hidden-size 128 \\
        --num-attention-heads 4 --seq-length 1024 --train-iters 20 --lr 3e-3 \\
        --segment-lengths 256 512 1024 --dilation-rates 1 2 4 \\
        --data-path runs/quickstart/data/python_text_document \\
        --tokenizer-model runs/quickstart/tokenizer.model --save runs/first

`--help` lists all flags; `--config FILE.yaml` takes the same from a file.
"""

import sys
from collections.abc import Sequence


def main(arguments: list[str], asked: Sequence[int] = ()) -> None:
    """Train as these flags say, as one rank of however many were started; `asked`: signals that
    have asked it to stop already. Raises UserError where a flag, a file or the machine does not
    allow it."""
    from megalong.config import world_size
    from megalong.config.arguments import parse_arguments
    from megalong.master_port import check_master_port
    from megalong.training.launchers import Launchers

    launchers = Launchers()
    given = parse_arguments(arguments, description=__doc__)
    config = given.resolve(world_size())
    check_master_port()

    # The slow imports wait until the flags are known to be right, and the processes wait for each
    # other only once each of them has found its data and its checkpoint.
    from megalong.log_filters import filter_library_logs

    filter_library_logs()
    from megalong.model.build import check_backend
    from megalong.parallel import check_precision, launch, set_gpu_defaults, watch_ranks
    from megalong.training.deepspeed_config import deepspeed_config
    from megalong.training.loop import Trainer
    from megalong.training.resuming import starting_point
    from megalong.training.run_blend import make_orders
    from megalong.training.run_data import open_run_data
    from megalong.training.run_folder import prepare_run_folder
    from megalong.training.stopping import StopRequest
    from megalong.training.weights_and_biases import check_wandb

    set_gpu_defaults()
    check_precision(config.training.precision)
    check_backend(config)
    deepspeed_config(config, config.parallel.data_parallel_size(world_size()))
    data = open_run_data(config)
    check_wandb(config)
    prepare_run_folder(config)
    config, checkpoint = starting_point(config)
    make_orders(data.train, checkpoint, config)
    with (
        launch(config) as mesh,
        watch_ranks(mesh, config.run),
        StopRequest(config.run.exit_duration_in_mins, asked, launchers=launchers) as stop,
    ):
        Trainer(config, given, data, checkpoint, mesh, stop).train()


if __name__ == "__main__":
    from megalong.early_signals import remember_requests

    asked = remember_requests()  # before anything that takes longer to import

    from megalong.command_line import run

    run(lambda: main(sys.argv[1:], asked), system_errors=False)
