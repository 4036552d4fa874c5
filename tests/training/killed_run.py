"""A training run that is disturbed at a chosen point: `killed_run.py POINT N FLAGS`.

The first rank kills itself where POINT is "step" (in the middle of the N-th optimizer step of this
process), or a point of its N-th save: "write" (the tensors are written, nothing else), "rename"
(everything is written, under the temporary name) or "pointer" (renamed, but `latest` still names
the one before).
"asked": signal N had asked it to stop while it was starting. "limit": its last rank may not write
large files any more from its N-th save on, as if its disk were full.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import pretrain_longnet
from megalong.checkpoint import folder, writing
from megalong.training import engine
from megalong.utils.errors import UserError

LARGEST = 100_000  # bytes: metrics fit, tensors do not


def kill_at(point: str, count: int) -> None:
    """Arm the kill: it goes off when the point is reached for the count-th time."""
    reached = 0

    def here() -> None:
        nonlocal reached
        reached += 1
        if reached == count and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    def after(module, name: str, counts=lambda kwargs: True) -> None:
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            if counts(kwargs):
                here()
            return result

        setattr(module, name, wrapped)

    def before_replacing(is_it) -> None:
        original = os.replace

        def wrapped(source, target):
            if is_it(Path(target).name):
                here()
            original(source, target)

        folder.os.replace = wrapped

    if point == "step":
        # The gradients are there, the update is not. Evaluations run forward only.
        after(engine.TrainingEngine, "_run", lambda kwargs: not kwargs.get("forward_only"))
    elif point == "write":
        after(writing.dcp, "save")
    elif point == "rename":
        before_replacing(lambda name: name.startswith("iter_"))
    elif point == "pointer":
        before_replacing(lambda name: name == "latest")
    else:
        raise ValueError(point)


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
    point, number = sys.argv[1], int(sys.argv[2])
    if point == "limit":
        limit_files(number)
    elif point != "asked":
        kill_at(point, number)
    try:
        pretrain_longnet.main(sys.argv[3:], asked=[number] if point == "asked" else ())
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
