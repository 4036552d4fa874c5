"""A training run whose last rank may not write large files any more from its second save on, as if
its disk were full: `limited_run.py FLAGS`."""

import os
import resource
import sys

import pretrain_longnet
from megalong.checkpoint import writing
from megalong.utils.errors import UserError

LARGEST = 100_000  # bytes: metrics fit, tensors do not


def limit_files(saves: int) -> None:
    """From the `saves`-th save on."""
    original, begun = writing.write_checkpoint, 0

    def wrapped(*arguments):
        nonlocal begun
        begun += 1
        if begun == saves and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, resource.RLIM_INFINITY))
        original(*arguments)

    writing.write_checkpoint = wrapped


if __name__ == "__main__":
    limit_files(2)
    try:
        pretrain_longnet.main(sys.argv[1:])
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
