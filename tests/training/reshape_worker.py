"""Runs of two steps, each saved in one layout, and their continuations in every other layout.

    reshape_worker.py CORPUS FOLDER [save] [load] [seldom]

does those of the layouts that have as many ranks as this was started with, with each optimizer.
"save" leaves FOLDER/OPTIMIZER/saved/LAYOUT, and on one rank FOLDER/OPTIMIZER/whole, four steps that
nothing interrupts; "load" goes on from the former, two more steps, and leaves
FOLDER/OPTIMIZER/resumed/LAYOUT/FROM; "seldom" does so for the pairs of `make test-long`.
"""

import contextlib
import sys
from pathlib import Path

import torch.distributed as dist

from megalong.checkpoint.content import tensor_name
from megalong.checkpoint.reading import CheckpointReader
from megalong.config import world_size
from megalong.config.arguments import parse_arguments
from megalong.model.stage import named_parameters
from megalong.parallel import process_group, temporary_mesh
from megalong.training.engine_state import kinds_of
from megalong.training.loop import Trainer
from megalong.training.resuming import open_checkpoint
from megalong.training.run_data import open_run_data
from megalong.training.run_folder import prepare_run_folder
from megalong.training.stopping import StopRequest
from tests.launching import small_run_flags
from tests.training.parity_cases import ALL_KINDS, AXES, BRANCHES, MUON, OPTIMIZER, SGD

# Layout -> ranks; dp is what the rest leaves, and z the ZeRO stage.
LAYOUTS = {
    "one": 1,
    "tp2": 2,
    "pp2": 2,
    "sp2": 2,
    "dp2-z1": 2,
    "dp2-z2": 2,
    "dp2-z3": 2,
    "tp2-pp2-sp2": 8,
}
# Only loaded: eight ranks share tensors of 66 elements, which they do not divide evenly.
UNEVEN = ("sp2-dp4-z3", "tp2")

STEPS = {"train_iters": 4, "lr_decay_iters": 4, "save_interval": 2}
MODEL = {**BRANCHES, "hidden_size": 66, "kv_channels": 16, "head_offsets": "layer"}
MODEL |= {"sub_layer_norm": True}
BATCH = {"micro_batch_size": 1, "global_batch_size": 4, "split": "1,0,0"}


# The second with all kinds of attention.
OPTIMIZERS = {"adam": OPTIMIZER, "sgd": SGD | ALL_KINDS, "muon": OPTIMIZER | MUON}

# Those that Muon accepts, but of such as are alike for it one.
MUON_LAYOUTS = {"one": 1, "dp2-z2": 2, "tp2-pp2-sp2": 8, "tp2-dp4-z2": 8}


def layouts_of(optimizer: str) -> dict[str, int]:
    """Those in which it saves -> ranks."""
    return MUON_LAYOUTS if optimizer == "muon" else LAYOUTS


def pairs() -> list[tuple[str, str, str]]:
    """(the optimizer, the layout that loads, the one that saved): a way around through all layouts
    for each optimizer; that all save the same is a test of its own."""
    found = []
    for optimizer in OPTIMIZERS:
        layouts = list(layouts_of(optimizer))
        found += [(optimizer, to, layouts[number - 1]) for number, to in enumerate(layouts)]
    return [*found, ("muon", "tp2-dp4-z2", "one"), ("adam", *UNEVEN), ("sgd", *UNEVEN)]


def flags_of(layout: str) -> dict[str, int]:
    """Of "tp2-pp2-z1", say."""
    axes = {**AXES, "z": "zero_stage"}
    words = [(word.rstrip("0123456789"), word) for word in layout.split("-")]
    return {axes[axis]: int(word[len(axis) :]) for axis, word in words if axis in axes}


@contextlib.contextmanager
def counted_reads():
    """The names of the parameters' tensors that this rank reads inside."""
    original, names = CheckpointReader.read, []

    def read(self, name):
        if not name.startswith("random."):
            names.append(name)
        return original(self, name)

    CheckpointReader.read = read
    try:
        yield names
    finally:
        CheckpointReader.read = original


def assert_nothing_is_read_twice(names, engine, mesh):
    """The ranks that need the same tensors share the reading of them."""
    of_ranks = [None] * dist.get_world_size(mesh.replica_group)
    dist.all_gather_object(of_ranks, names, group=mesh.replica_group)
    needed = [
        tensor_name(kind, name)
        for name, _ in named_parameters(engine.model)
        for kind in kinds_of(name, engine.optimizer)
    ]
    assert sorted(name for read in of_ranks for name in read) == sorted(needed)
    assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1


def main(corpus: str, folder: Path, *what: str) -> None:
    with process_group() as device, StopRequest() as stop:

        def run(optimizer: str, layout: str, **changes: object) -> None:
            flags = OPTIMIZERS[optimizer] | STEPS | MODEL | BATCH | flags_of(layout) | changes
            flags["data_path"] = f"0.7 code={corpus} 0.3 books={corpus}"
            given = parse_arguments(small_run_flags(Path(corpus), **flags))
            config = given.resolve(world_size())
            prepare_run_folder(config)
            checkpoint = open_checkpoint(config)
            with temporary_mesh(config, device) as mesh, counted_reads() as read:
                trainer = Trainer(config, given, open_run_data(config), checkpoint, mesh, stop)
                if checkpoint is not None:
                    assert_nothing_is_read_twice(read, trainer.engine, mesh)
                trainer.train()
                trainer.engine.deepspeed.destroy()  # its hooks keep model and groups alive

        if "save" in what:
            for optimizer in OPTIMIZERS:
                if world_size() == 1:
                    run(optimizer, "one", save=folder / optimizer / "whole")
                for layout, ranks in layouts_of(optimizer).items():
                    if ranks == world_size():
                        save = folder / optimizer / "saved" / layout
                        run(optimizer, layout, train_iters=2, save=save)
        for optimizer, to, source in pairs() if "load" in what else ():
            if LAYOUTS.get(to, 8) == world_size():
                load = folder / optimizer / "saved" / source
                save = folder / optimizer / "resumed" / to / source
                run(optimizer, to, load=load, save=save, async_save=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
