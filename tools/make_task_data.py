"""Makes a dataset of recall tasks, for a model that is trained on what --eval-tasks asks for.

    python tools/make_task_data.py --tasks mqar --length 256 --samples 20000 --task-style ids \\
        --tokenizer-type ByteTokenizer --output-prefix mqar
    python pretrain_longnet.py --data-path mqar --tokenizer-type ByteTokenizer --seq-length 256 \\
        --eval-tasks mqar --eval-task-style ids ...

Every document is one sample of exactly --length tokens, so that with as long a --seq-length every
sequence of the training is one. Small models
find out on short samples what they need for long ones: a blend has both, one dataset for each
length. Where shorter samples fill a sequence, --document-attention isolated keeps them apart.

The loss counts all tokens, or with --loss answers those of the answers alone, with --loss
predictable the haystack too: a PREFIX.loss beside the data says which, and the training heeds it.
The samples are drawn apart from those of evaluations, whatever the seed; only where a task is very
short can two be the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.data.tokenizers.tokenizer import TOKENIZERS, build_tokenizer
from megalong.evals import STYLES, TASKS
from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, counted, did_you_mean


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    names = ", ".join(TASKS)
    add("--tasks", nargs="+", required=True, metavar="TASK", help=f"in turn, any of {names}")
    add("--length", type=int, required=True, help="tokens of a sample")
    add("--samples", type=int, required=True, help="how many, of all tasks together")
    add("--task-style", choices=STYLES, default="text", help="made of text, or of bare token ids")
    add(
        "--loss",
        choices=("all", "predictable", "answers"),
        default="all",
        help="what is to be predicted: all tokens; those that follow from others before them, which"
        " are the answers and the haystack; or the answers alone",
    )
    add("--seed", type=int, default=1234, help="others make other samples")
    add("--tokenizer-type", choices=TOKENIZERS, default="SentencePieceTokenizer", help="tokenizer")
    add("--tokenizer-model", help="file (or folder) of the tokenizer")
    add("--prepend-bos", action="store_true", help="begin samples as in a training that has it")
    add(
        "--output-prefix", required=True, help="writes PREFIX.bin, .idx and .json, or .loss besides"
    )
    add("--overwrite", action="store_true", help="replace existing output files")
    args = parser.parse_args()
    args.tasks = list(dict.fromkeys(args.tasks))
    for task in args.tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task}: no such task{did_you_mean(task, TASKS)}")
    if args.samples < len(args.tasks):
        raise UserError(f"--samples {args.samples}: must be at least 1 for each task")
    return args


def main() -> None:
    args = parse_arguments()
    from megalong import __version__
    from megalong.evals.trials import Trials, data_salt, language_of, write_dataset
    from megalong.utils.progress import progress_bar

    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    first = tokenizer.bos if args.prepend_bos else tokenizer.eod
    if first is None:
        raise UserError("--prepend-bos: the tokenizer has no token for the beginning of a text")
    try:
        language = language_of(args.task_style, tokenizer.encode, tokenizer.text_ids, first)
    except UserError as error:
        raise UserError(f"--task-style {args.task_style}: {error}") from None
    trials = []
    for number, task in enumerate(args.tasks):
        count = len(range(number, args.samples, len(args.tasks)))
        salt = data_salt(args.seed)
        trials.append(Trials(task, language, args.length, count, salt, spread=False))
        trials[-1].check("--tasks", "--length")
    description = {
        "tasks": args.tasks,
        "task_style": args.task_style,
        "seed": args.seed,
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_model": args.tokenizer_model,
        "prepend_bos": args.prepend_bos,
        "megalong": __version__,
    }
    with progress_bar(args.samples, "sample", "writing") as bar:
        write_dataset(
            args.output_prefix,
            trials,
            tokenizer,
            description,
            loss=args.loss,
            overwrite=args.overwrite,
            on_samples=bar.update,
        )
    print(
        f"{args.output_prefix}: {counted(args.samples, 'sample')} of {', '.join(args.tasks)},"
        f" {args.length:,} tokens each"
    )


if __name__ == "__main__":
    run(main)
