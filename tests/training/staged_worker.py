"""Runs of several stages: whole, stopped at chosen moments and begun again, and by hand.

    staged_worker.py CORPUS FOLDER

On one rank it leaves in FOLDER
    whole/          what nothing interrupts
    stopped/NAME/   stopped at one of `STOPS`, and begun again
    left/NAME/      what it had left before it was begun again
    by_hand/1, 2    the first two stages as two runs, the second in another folder than the first
    pretrained/     two stages that begin with the weights of `whole`
    facts.json      "moments": the iteration at each of those at which `whole` could have been
                    stopped; "alive": models that were there when it built one, for each stage
and on two ranks, which need the former,
    resumed/NAME/   what `left` goes on to in other layouts
    own_layout/     a stage with a layout of its own
"""

import contextlib
import gc
import json
import shutil
import signal
import sys
import weakref
from pathlib import Path

import torch.distributed as dist
import yaml

import pretrain_longnet
from megalong.config import world_size
from megalong.parallel import process_group, temporary_mesh
from megalong.training import loop, stopping
from megalong.utils import machine

COMMON = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 128,
    "segment_lengths": [32, 64, 128],
    "dilation_rates": [1, 2, 3],
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "precision": "fp32",
    "lr": 1e-2,
    "adam_eps": 1e-3,
    "lr_warmup_iters": 1,
    "skip_loss_spikes": 100.0,
    "data_path": "{corpus}",
    "tokenizer_type": "ByteTokenizer",
    "split": "80,15,5",
    "eval_iters": 1,
    "eval_interval": 2,
    "eval_tasks": ["copy"],
    "eval_task_style": "ids",
    "eval_task_lengths": [32],
    "eval_task_samples": 2,
    "sample_prompts": ["def "],
    "sample_tokens": 2,
    "save_interval": 2,
    "keep_last": 1,
}
# Each has of everything something else: length, pattern, kinds, positions, batch, data, schedule.
SHORT = {
    "name": "short",
    "seq_length": 64,
    "segment_lengths": [16, 64],
    "dilation_rates": [1, 2],
    "train_iters": 3,
    "lr_decay_style": "linear",
}
MIDDLE = {
    "name": "middle",
    "global_batch_size": 4,
    "attention": {"attention": ["dilated", "dense"]},
    "data_path": ["0.7", "code={corpus}", "0.3", "books={corpus}"],
    "train_tokens": 3 * 4 * 128 - 5,
    "lr": 4e-3,
    "lr_decay_style": "WSD",
    "lr_wsd_decay_iters": 2,
}
LONG = {
    "name": "long",
    "seq_length": 256,
    "segment_lengths": [64, 256],
    "dilation_rates": [1, 3],
    "rotary_base": 40000.0,
    "yarn_rotary_scaling_factor": 2.0,
    "yarn_original_max_position_embeddings": 128,
    "document_attention": "isolated",
    "data_path": ["0.5", "books={corpus}", "0.5", "new={corpus}"],
    "train_iters": 2,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 0,
}
STAGES = [SHORT, MIDDLE, LONG]
ENDS = [3, 6, 8]
# The iteration that is done, and which of the moments then at which a run looks whether it has to
# stop: before its model is built, after each step, after each batch of an evaluation.
STOPS = {
    "unbuilt": (0, 0),
    "in_short": (2, 0),
    "end_of_short": (3, 0),
    "begin_of_middle": (3, -1),
    "in_middle": (5, 0),
    "last_evaluation": (8, 2),
}
# What each goes on from, and the flags.
RESUMED = {
    "sp2": ("end_of_short", {"sequence-parallel-size": 2}),
    "tp2": ("in_short", {"tensor-model-parallel-size": 2}),
    "pp2": ("end_of_short", {"pipeline-model-parallel-size": 2}),
    "dp2": ("in_middle", {"micro-batch-size": 1}),
    "zero3": ("in_short", {"zero-stage": 3, "micro-batch-size": 1}),
}
OWN_LAYOUT = [SHORT, MIDDLE | {"sequence_parallel_size": 2}, LONG]


def write_settings(file: Path, corpus: str, **settings: object) -> Path:
    """A file for --config."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(COMMON | settings).replace("{corpus}", corpus))
    return file


class Moments(stopping.StopRequest):
    """Asks a run to stop when it looks for the `at`-th time whether it has to; and keeps which
    iteration was done by then, for each look."""

    at, seen, iteration = 0, [], 0

    def check(self, group=None):
        Moments.seen.append(Moments.iteration)
        if len(Moments.seen) == Moments.at:
            self.ask(signal.SIGTERM)
        super().check(group)


class Trainer(loop.Trainer):
    """Tells the iterations to `Moments`."""

    def _advance(self, iteration, result):
        super()._advance(iteration, result)
        Moments.iteration = iteration


def count_models(alive: list[int]) -> None:
    """Have each building of a model append how many there are from before."""
    build, models = loop.build_model, []

    def counted(*arguments):
        alive.append(sum(model() is not None for model in models))
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    loop.build_model = counted


def train(file: Path, at: int = 0, **flags: object) -> list[int]:
    """Run until the `at`-th moment, or to the end; the iterations of the moments."""
    Moments.at, Moments.seen, Moments.iteration = at, [], 0
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    pretrain_longnet.main(["--config", str(file), *words])
    gc.collect()
    return Moments.seen


def on_one_rank(corpus: str, folder: Path) -> None:
    def recipe(name: str, stages=STAGES) -> Path:
        place = folder / name
        file = place.with_name(f"{place.name}.yaml")
        return write_settings(file, corpus, stages=stages, save=str(place), load=str(place))

    alive = []
    count_models(alive)
    moments = train(recipe("whole"))
    facts = {"moments": moments, "alive": list(alive)}
    for name, (iteration, which) in STOPS.items():
        file = recipe(f"stopped/{name}")
        train(file, [k for k, done in enumerate(moments, 1) if done == iteration][which])
        shutil.copytree(folder / "stopped" / name, folder / "left" / name)
        train(file)

    by_hand = folder / "by_hand"
    first = {key: value for key, value in SHORT.items() if key != "name"}
    train(write_settings(by_hand / "1.yaml", corpus, **first, save=str(by_hand / "1")))
    second = {key: value for key, value in MIDDLE.items() if key not in ("name", "train_tokens")}
    second |= {"train_iters": 6, "lr_begin_iters": 3, "load": str(by_hand / "1")}
    train(write_settings(by_hand / "2.yaml", corpus, **second, save=str(by_hand / "2")))

    other = {"train_iters": 1, "lr_warmup_iters": 0}
    start = {"pretrained_checkpoint": str(folder / "whole" / "iter_0000003")}
    train(recipe("pretrained", [SHORT | other | start, {"name": "more"} | other]))
    (folder / "facts.json").write_text(json.dumps(facts))


def on_two_ranks(corpus: str, folder: Path) -> None:
    def recipe(name: str, stages=STAGES) -> Path:
        place = folder / name
        settings = {"stages": stages, "save": str(place), "load": str(place)}
        if dist.get_rank() == 0:
            write_settings(place.with_name(f"{place.name}.yaml"), corpus, **settings)
        dist.barrier()
        return place.with_name(f"{place.name}.yaml")

    for name, (left, flags) in RESUMED.items():
        file = recipe(f"resumed/{name}")
        if dist.get_rank() == 0:
            shutil.copytree(folder / "left" / left, folder / "resumed" / name)
        dist.barrier()
        train(file, **flags)
    train(recipe("own_layout", OWN_LAYOUT))


def main(corpus: str, folder: str) -> None:
    with process_group() as device:
        # Many runs in one launch, one after the other.
        loop.process_group = lambda minutes: contextlib.nullcontext(device)
        loop.build_mesh = temporary_mesh
        loop.Trainer = Trainer
        machine.check_master_port = lambda: None
        stopping.StopRequest = Moments
        of_ranks = {1: on_one_rank, 2: on_two_ranks}[world_size()]
        of_ranks(corpus, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
