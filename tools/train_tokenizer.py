"""Trains a SentencePiece BPE tokenizer with byte fallback on text.

    python tools/train_tokenizer.py --input stdlib.jsonl --output-prefix tokenizer --vocab-size 4096

writes tokenizer.model. Inputs are those of tools/preprocess_data.py. The tokenizer is lossless
(every text comes back unchanged), ends documents with <eod>, and is the same for the same input.
Use it with --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.data.formats import raw_documents, texts
from megalong.data.text.documents import (
    BrokenDocument,
    LeftOut,
    Reading,
    Remarks,
    add_reading_flags,
    reading_of,
)
from megalong.data.text.files import find_files, total_size
from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, counted

if TYPE_CHECKING:
    from tqdm import tqdm


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_reading_flags(parser)
    add = parser.add_argument
    add("--output-prefix", required=True, help="writes PREFIX.model")
    add("--vocab-size", type=int, required=True, help="number of ids, special ones included")
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of the text's characters that get an id of their own; the rest is spelled "
        "in bytes",
    )
    add(
        "--max-bytes",
        type=int,
        default=100_000_000,
        help="train on a uniform sample of so many bytes of text",
    )
    add("--seed", type=int, default=1234, help="of that sample")
    add("--overwrite", action="store_true", help="replace an existing model")
    add("--verbose", action="store_true", help="show the library's own log")
    args = parser.parse_args()
    if args.vocab_size < 1:
        raise UserError(f"--vocab-size {args.vocab_size} must be positive, some thousands usually")
    if args.max_bytes <= 0:
        raise UserError("--max-bytes must be positive")
    if not 0 < args.character_coverage <= 1:
        raise UserError("--character-coverage must be in (0, 1]")
    return args


def read_texts(
    files: list[str], reading: Reading, progress: tqdm, remarks: Remarks
) -> Iterator[str]:
    """Yields every text of the files; says what is broken and goes on."""
    for file in files:
        for document in raw_documents(file, reading, remarks.say):
            try:
                values = texts(document, reading).values()
            except BrokenDocument as error:
                values = [error]
            for value in values:
                if isinstance(value, LeftOut):
                    continue
                if isinstance(value, BrokenDocument):
                    remarks.skip(value)
                else:
                    yield value
            progress.update(document.size)


def main() -> None:
    args = parse_arguments()
    from megalong.data.tokenizers.sentencepiece_tokenizer import (
        SentencePieceTokenizer,
        sample_chunks,
        train_sentencepiece,
    )
    from megalong.utils.files import writable_folder
    from megalong.utils.progress import human_bytes, progress_bar, stopwatch

    start = time.monotonic()
    output = Path(args.output_prefix + ".model")
    if output.exists() and not args.overwrite:
        raise UserError(
            f"{output} is there already: choose another --output-prefix, or --overwrite"
        )
    writable_folder("--output-prefix", output.parent)
    files = find_files(args.input, args.documents)
    with progress_bar(total_size(files), "B", "reading") as progress:
        remarks = Remarks(progress)
        found = read_texts(files, reading_of(args), progress, remarks)
        chunks = sample_chunks(found, args.max_bytes, args.seed)
    size = human_bytes(sum(len(chunk.encode()) for chunk in chunks))
    with stopwatch(f"training {args.vocab_size:,} ids on {size} of text"):
        model = train_sentencepiece(
            chunks,
            args.vocab_size,
            character_coverage=args.character_coverage,
            verbose=args.verbose,
        )
    temporary = output.with_name(output.name + ".partial")
    temporary.write_bytes(model)
    os.replace(temporary, output)
    tokenizer = SentencePieceTokenizer(str(output))
    seconds = time.monotonic() - start
    print(
        f"{output}: {tokenizer.vocab_size} ids, end of document {tokenizer.eod}, of {size} of text,"
        f" {counted(remarks.skipped, 'document')} skipped, {seconds:.1f} s"
    )


if __name__ == "__main__":
    run(main)
