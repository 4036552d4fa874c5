"""Makes one .bin/.idx of several, such as the tasks of an array job have written.

    python tools/merge_datasets.py --input 'tokens/corpus_*_text_document' --output-prefix corpus

writes corpus.bin, .idx and .json: the documents of the inputs, one input after the other. Merged
partitions are, byte for byte, what one run of tools/preprocess_data.py would have written, with
--deduplicate too. Inputs must be of one tokenizer and made with the same flags, and no partition
may be missing. Loss masks (.loss) are merged too; all tokens of an input without one count. When
the command was killed, the same command goes on.
Exit status: 0, or 2 after an error.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import counted


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="prefixes, or glob patterns of prefixes")
    add("--output-prefix", required=True, help="writes PREFIX.bin, .idx and .json")
    add("--overwrite", action="store_true", help="replace existing output files")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    from megalong.data.preprocessing.merging import find_prefixes, merge
    from megalong.utils.progress import progress_bar

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prefixes = find_prefixes(args.input)
    size = sum(os.path.getsize(prefix + ".bin") for prefix in prefixes)
    with progress_bar(size, "B", "merging") as progress:
        made = merge(prefixes, args.output_prefix, overwrite=args.overwrite, progress=progress)
    repeats = made["repeats"] or {"documents": 0}
    print(
        f"{args.output_prefix}: {counted(made['documents'], 'document')},"
        f" {counted(made['tokens'], 'token')}, of {counted(len(prefixes), 'dataset')}"
    )
    if repeats["documents"]:
        print(
            f"{counted(repeats['documents'], 'document')} with a text that has come before,"
            f" {counted(repeats['tokens'], 'token')}: "
            + ("left out" if made["deduplicate"] else "--deduplicate of each share leaves them out")
        )


if __name__ == "__main__":
    run(main)
