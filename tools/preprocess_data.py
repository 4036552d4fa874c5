"""Tokenizes text into Megatron's .bin/.idx files.

    python tools/preprocess_data.py --input stdlib.jsonl --output-prefix data/stdlib \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod

writes data/stdlib_text_document.bin, .idx, and .json (counts, inputs, tokenizer); train on it with
--data-path data/stdlib_text_document. Inputs are files, folders and glob patterns: JSON lines
(.jsonl, .json, .ndjson, and under other names what holds them with a key of --json-keys), one
document a line; Parquet, whatever its name, one document a row; anything else as plain text, one
document a file. Standard input (-), <(command) and named pipes, which have to be named themselves,
are JSON lines. All but Parquet may be compressed (gzip, Zstandard, xz, bzip2), whatever their
names. Of source code --documents makes one document a file or a repository.
With --prompt-key a document is a prompt and the text behind it, and a PREFIX_KEY_document.loss says
that the loss counts the text alone, and the eod token.
What is broken is named on standard error, skipped and counted; --strict makes it an error. The
output has its final name only when it is complete. It does not depend on --workers, nor on
--tokenizer-backend: a faster library is used where it gives the same ids.
A run that was killed, or whose disk was full, goes on when the same command is given again, from
the last finished part in PREFIX.unfinished, with --overwrite too, which begins anew where something
else is given; a stream has to give the same again, or PREFIX.unfinished be removed. --partition k/n
takes one of n shares of the input, for an array job; shares are whole files. What all tasks have
written tools/merge_datasets.py makes one output.
Exit status: 0, or 2 after an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, needed_packages, run
from megalong.utils.errors import UserError, counted

with needed_packages():
    from megalong.data.text.documents import add_reading_flags, reading_of
    from megalong.data.tokenizers.backend import BACKENDS
    from megalong.data.tokenizers.tokenizer import TOKENIZERS

if TYPE_CHECKING:
    from megalong.data.preprocessing.preprocess import Summary


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_reading_flags(parser)
    add = parser.add_argument
    add("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin, .idx and .json")
    add(
        "--tokenizer-type",
        default="SentencePieceTokenizer",
        choices=list(TOKENIZERS),
        help="kind of tokenizer",
    )
    add(
        "--tokenizer-model",
        help="SentencePiece: the .model file; Hugging Face: a local folder; tiktoken: a .tiktoken"
        " file, or a .json that describes an encoding",
    )
    add(
        "--tokenizer-backend",
        choices=BACKENDS,
        default="auto",
        help="fast: gigatoken, if it gives the same ids for a sample of the input, else an error;"
        " auto: it or else the usual library",
    )
    add("--append-eod", action="store_true", help="end every document with the eod token")
    add(
        "--prepend-bos",
        action="store_true",
        help="begin every document with the tokenizer's beginning-of-text token, which Llama and"
        " Mistral models expect; training needs the same flag",
    )
    add(
        "--min-tokens",
        type=int,
        default=1,
        metavar="N",
        help="leave out documents of fewer tokens, those counted that --append-eod and"
        " --prepend-bos add",
    )
    add(
        "--prompt-key",
        metavar="KEY",
        help="key of JSON lines, or column of Parquet, with a prompt: a document is that and then"
        " the text of --json-keys, which are made tokens apart, so that no token is of both. The"
        " prompt is context only (and so is what --prepend-bos adds): the training predicts the"
        " text, and the eod token. A prompt may be empty; plain text has none",
    )
    add("--deduplicate", action="store_true", help="leave out texts that have come before")
    add(
        "--partition",
        metavar="K/N",
        help="only share K of N of the input: whole files, in their order, about as large as the"
        " other shares where no file is larger than that (cut such ones in several before); each"
        " share needs an --output-prefix of its own",
    )
    add(
        "--part-bytes",
        type=int,
        default=256 << 20,
        metavar="N",
        help="note what is finished after so many bytes of input",
    )
    add("--workers", type=int, default=1, help="tokenizing processes")
    add(
        "--overwrite",
        action="store_true",
        help="replace existing output files, and what is unfinished of another command",
    )
    add("--strict", action="store_true", help="stop at the first broken document")
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    for flag in ("--min-tokens", "--part-bytes"):
        if getattr(args, flag[2:].replace("-", "_")) < 1:
            raise UserError(f"{flag} must be at least 1")
    if args.prompt_key in args.json_keys:
        raise UserError(f"--prompt-key {args.prompt_key}: is one of --json-keys: name another")
    if args.prompt_key is not None and args.documents != "auto":
        raise UserError(
            f"--prompt-key {args.prompt_key} is of JSON lines and Parquet, and --documents"
            f" {args.documents} reads neither: leave one of them out"
        )
    return args


def print_summary(summary: Summary, kind: str) -> None:
    from megalong.utils.progress import human_bytes

    for part in summary.keys.values():
        print(
            f"{part.prefix}: {counted(part.documents, 'document')},"
            f" {counted(part.tokens, 'token')}, "
            f"{part.bytes:,} bytes, {part.bytes / max(part.tokens, 1):.3f} bytes per token, "
            f"longest document {part.longest:,} tokens, {counted(part.empty, 'empty one')} left out"
            + (f", {part.short:,} shorter than --min-tokens" if part.short else "")
        )
        if part.repeats:
            print(
                f"{counted(part.repeats, 'document')} with a text that has come before,"
                f" {counted(part.repeated_tokens, 'token')}: "
                + ("left out" if part.deduplicate else "--deduplicate leaves them out")
            )
    size = sum(part.bytes for part in summary.keys.values()) - summary.resumed_bytes
    seconds = max(summary.seconds, 1e-9)
    left_out = "".join(
        f", {counted(number, what)} left out" for what, number in sorted(summary.left_out.items())
    )
    lost = f", and the rest of {counted(summary.cut_short, 'file')}" if summary.cut_short else ""
    print(
        f"{counted(summary.files, kind)},"
        f" {counted(summary.skipped, 'document')} skipped{lost}{left_out},"
        f" {summary.seconds:.1f} s ({human_bytes(size / seconds)}/s)"
    )


def main() -> int | None:
    args = parse_arguments()
    from megalong.data.preprocessing.inputs import partition
    from megalong.data.preprocessing.preprocess import TokenizingTask, goes_on, preprocess
    from megalong.data.text.files import find_files, total_size
    from megalong.utils.progress import progress_bar

    # A scheduler's SIGTERM ends the run the ordinary way, with its workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    task = TokenizingTask(
        args.tokenizer_type,
        args.tokenizer_model,
        dataclasses.replace(reading_of(args), prompt_key=args.prompt_key),
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        min_tokens=args.min_tokens,
        deduplicate=args.deduplicate,
        backend=args.tokenizer_backend,
    )
    try:
        files, share = find_files(args.input, args.documents), None
        if args.partition:
            say = partial(print, file=sys.stderr)
            files, share = partition(files, args.partition, say)
        with progress_bar(total_size(files), "B", "tokenizing") as progress:
            summary = preprocess(
                files,
                args.output_prefix,
                task,
                workers=args.workers,
                overwrite=args.overwrite,
                strict=args.strict,
                partition=share,
                part_bytes=args.part_bytes,
                progress=progress,
            )
    except (KeyboardInterrupt, SystemExit) as end:
        unfinished = Path(f"{args.output_prefix}.unfinished")
        left = goes_on(unfinished) if unfinished.exists() else "nothing was written"
        print(f"interrupted: {left}", file=sys.stderr)
        return 130 if isinstance(end, KeyboardInterrupt) else end.code
    print_summary(summary, "folder" if args.documents == "repository" else "file")
    return None


if __name__ == "__main__":
    run(main)
