"""Runs that only save, each killed at a random moment: `saving_loop.py FOLDER KILLS MODE`.

MODE is "now" or "background". After each kill the folder must hold, in force, a sound checkpoint no
older than the last one that was announced. Prints how many checkpoints were announced in all.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megalong.checkpoint.content import Progress
from megalong.checkpoint.folder import checkpoints, has_pointer, iteration_of, latest
from megalong.checkpoint.manifest import check_files, check_share
from megalong.checkpoint.reading import CheckpointReader
from megalong.checkpoint.writing import Saver
from megalong.config import Config, RunConfig


def save_for_ever(folder: Path, iteration: int, background: bool, announced: int) -> None:
    """Save after save, faster than any training; each announcement is a line to `announced`."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    run = RunConfig(save=str(folder), async_save=background, keep_last=2, keep_every=10)

    def announce(line: str) -> None:
        os.write(announced, f"{line}\n".encode())

    saver = Saver(Config(run=run), announce)
    while True:
        iteration += 1
        saver.save(Progress(iteration=iteration), {"weights.x": torch.full((20_000,), iteration)})


def main(folder: Path, kills: int, mode: str) -> None:
    clock, last, announcements = random.Random(mode), 0, 0
    folder.mkdir()
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            save_for_ever(folder, last, mode == "background", writer)
        os.close(writer)
        with open(reader) as lines:
            first = lines.readline()  # the rest is a matter of the clock
            time.sleep(clock.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            said = [line for line in [first, *lines] if line.endswith("\n")]
        os.waitpid(child, 0)
        assert said and all(line.startswith("saved ") for line in said), said
        announcements += len(said)
        last = check(folder, iteration_of(Path(said[-1].split()[1])))
    print(announcements)


def check(folder: Path, announced: int) -> int:
    """That the checkpoint in force is sound, and no older than this; its iteration."""
    checkpoint = latest(folder)
    iteration = iteration_of(checkpoint)
    assert iteration >= announced, (iteration, announced)
    check_share(checkpoint, check_files(checkpoint))
    reader = CheckpointReader(checkpoint)
    assert reader.progress().iteration == iteration
    assert bool((reader.read("weights.x") == iteration).all())
    # And so is everything that carries a checkpoint's name.
    for other in checkpoints(folder):
        check_share(other, check_files(other))
    assert has_pointer(folder)
    return iteration


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
