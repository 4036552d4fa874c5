"""A run killed at any moment, and started again, leaves what an uninterrupted run leaves."""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from megalong.checkpoint.folder import best, latest
from megalong.checkpoint.reading import CheckpointReader
from megalong.config.arguments import parse_arguments
from megalong.data.blend import History
from megalong.training.engine_state import _load_random_states, _random_states
from megalong.training.metrics import read_metrics
from megalong.training.resuming import starting_point
from tests.forked import run_ranks, started_ranks
from tests.launching import PRETRAIN, small_run_flags

KILLED_RUN = __file__.replace("test_resume", "killed_run")
BLEND = {"data_path": "0.7 code={corpus} 0.3 books={corpus}"}
SCHEDULE = {"train_iters": 12, "save_interval": 3, "eval_interval": 4}


def flags(corpus: Path, folder: Path, **changes) -> list[str]:
    if "data_path" in changes:
        changes["data_path"] = changes["data_path"].format(corpus=corpus)
    return small_run_flags(corpus, **SCHEDULE | changes, save=folder, load=folder)


def train(ranks: int, corpus: Path, folder: Path, **changes) -> None:
    run_ranks(ranks, PRETRAIN, *flags(corpus, folder, **changes))


def numbers(folder: Path) -> list[dict]:
    """The records of a run without the numbers that are a clock's or the machine's, and without
    what is told once after every start, wherever that was."""
    left_out = ["tokens_per_second", "mfu", "mfu_dense_equivalent", "data_share"]
    left_out += ["peak_memory_bytes", "save_seconds", "save_blocking_seconds", "flops", "traffic"]
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in left_out} for r in records]


def told_after_a_start(folder: Path) -> set[str]:
    """What some records of a run tell of its steps: FLOPs and traffic, always the same ones."""
    told = set()
    for record in read_metrics(folder / "metrics.jsonl"):
        if "flops" in record:
            del record["flops"]["peak_per_second"]  # measured
        told |= {json.dumps({k: record[k]}) for k in ("flops", "traffic") if k in record}
    return told


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = dcp.FileSystemReader(str(folder / (folder / "latest").read_text()))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_run(folder: Path, reference: Path) -> None:
    assert numbers(folder) == numbers(reference)
    assert told_after_a_start(folder) == told_after_a_start(reference)
    ours, theirs = final_tensors(folder), final_tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def kill_soon_after(checkpoint: Path, delay: float, ranks: int, *flags: str) -> None:
    """Train; SIGKILL all ranks `delay` seconds after the checkpoint appears."""
    with started_ranks(ranks, PRETRAIN, *flags) as launch:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert time.monotonic() < deadline, launch.text()
            time.sleep(0.01)
        time.sleep(delay)
        launch.kill()


@pytest.mark.parametrize(
    "ranks, changes, kills",
    [
        # (point, count): see killed_run.py; behind it, the checkpoint that is in force after it.
        (2, {"zero_stage": 1}, [("step", 2, None), ("write", 2, 3), ("rename", 1, 3)]),
        (2, {"zero_stage": 3, "precision": "bf16"}, [("pointer", 2, 3), ("step", 4, 6)]),
        pytest.param(
            *(2, {"zero_stage": 1, "precision": "bf16"}, [("step", 5, 3)]), marks=pytest.mark.long
        ),
        (
            1,
            {"zero_stage": 2, "precision": "bf16", "log_interval": 2, "async_save": True} | BLEND,
            [("write", 1, None), ("pointer", 3, 6)],
        ),
    ],
    ids=[
        "2 ranks ZeRO 1 fp32",
        "2 ranks ZeRO 3 bf16",
        "2 ranks ZeRO 1 bf16",
        "1 rank ZeRO 2 bf16 async",
    ],
)
def test_killed_runs_continue_bit_for_bit(corpus, tmp_path, ranks, changes, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(ranks, corpus, whole, **changes)
    records = numbers(whole)
    assert len(told_after_a_start(whole)) == ranks  # one rank sends nothing
    interval = changes.get("log_interval", 1)
    assert [r["iteration"] for r in records if "split" not in r] == [*range(interval, 13, interval)]
    sets = 2 if "data_path" in changes else 1
    evaluated = [r["iteration"] for r in records if "split" in r]
    assert evaluated == [i for i in (4, 8, 12, 12) for _ in range(sets)]

    for point, count, in_force in kills:
        arguments = (point, count, *flags(corpus, killed, **changes))
        assert run_ranks(ranks, KILLED_RUN, *arguments, check=False).returncode != 0
        latest = killed / "latest"
        found = latest.read_text() if latest.exists() else None
        assert found == (in_force and f"iter_{in_force:07d}"), (point, count)
    # And somewhere, wherever the clock has it.
    delay = random.Random(ranks).uniform(0.0, 0.3)
    again = flags(corpus, killed, **changes)
    kill_soon_after(killed / "iter_0000009", delay, ranks, *again)
    for _ in range(2):  # starting a finished run again changes nothing
        run_ranks(ranks, PRETRAIN, *again)
        assert_same_run(killed, whole)


def test_more_iterations_continue_the_same_stream(corpus, tmp_path):
    """Six iterations, then six more, are twelve, past the end of an epoch as well."""
    constant = {"lr_decay_style": "constant", "eval_interval": 100, "global_batch_size": 64}
    constant |= {"micro_batch_size": 16, "split": "10,80,10", "seq_length": 32}
    constant |= {"segment_lengths": "8 32", "dilation_rates": "1 3"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(1, corpus, whole, **constant)
    train(1, corpus, parts, **constant | {"train_iters": 6})
    train(1, corpus, parts, **constant)
    losses = [[r["loss"] for r in numbers(folder) if "split" not in r] for folder in (whole, parts)]
    assert losses[0] == losses[1]
    # What was evaluated at the end of the first part is not made again, and stays.
    evaluated = [(r["iteration"], r["split"]) for r in numbers(parts) if "split" in r]
    assert evaluated == [(i, split) for i in (6, 12) for split in ("validation", "test")]

    # Two more with sequences twice as long: the same stream goes on where it stood.
    longer = {"seq_length": 64, "global_batch_size": 32, "train_iters": 14}
    train(1, corpus, parts, **constant | longer)
    tokens = [r["consumed_tokens"] for r in numbers(parts) if "split" not in r]
    assert tokens == [32 * 64 * i for i in range(1, 15)]

    # And on two ranks instead of one, with moments that begin anew, and another source.
    anew = constant | longer | {"train_iters": 15, "no_load_optim": True}
    anew |= {"data_path": f"0.75 {corpus} 0.25 other={corpus}", "skip_loss_spikes": 100.0}
    said = run_ranks(2, PRETRAIN, *flags(corpus, parts, **anew)).stdout
    assert "resuming (--no-load-optim) from" in said
    name, sample = corpus.name, 14 * 32
    now, before = f"{name} 0.75, other 0.25", f"{name} 1"
    assert f"from sample {sample} on the training data is {now}; before it was {before}" in said
    sources = [r["sources"] for r in numbers(parts) if "sources" in r]
    assert [{n: its["share"] for n, its in found.items()} for found in sources] == [
        {name: 0.75, "other": 0.25}
    ]
    history = History.from_values(CheckpointReader(latest(parts)).progress().blend)
    assert history.phases[-1].began == {name: sample, "other": 0}
    assert history.taken == {name: 24, "other": 8}
    progress = CheckpointReader(latest(parts)).progress()
    assert progress.updates == 1 and len(progress.recent_losses) == 1
    tokens = [r["consumed_tokens"] for r in numbers(parts) if "split" not in r]
    assert tokens == [32 * 64 * i for i in range(1, 16)]

    # All of the data may be new, if that is asked for; the optimizer goes on. Its losses are not
    # measured by those of the data before.
    new = anew | {"train_iters": 16, "data_path": f"third={corpus}", "new_data": True}
    del new["no_load_optim"]
    said = run_ranks(2, PRETRAIN, *flags(corpus, parts, **new)).stdout
    assert f"from sample {15 * 32} on the training data is third 1; before it was {now}" in said
    assert "--skip-loss-spikes looks back on losses from here on" in said
    progress = CheckpointReader(latest(parts)).progress()
    assert progress.updates == 2 and len(progress.recent_losses) == 1
    history = History.from_values(progress.blend)
    assert history.phases[-1].began == {name: sample + 24, "other": 8, "third": 0}

    # Fewer are done already; and in another folder other data may follow, which is said.
    other = [*flags(corpus, parts, **constant | longer | {"train_iters": 3})]
    said = run_ranks(1, PRETRAIN, *other).stdout
    assert "evaluating only" in said and "test at iteration 16" in said
    other = flags(corpus, parts, **constant | longer | {"split": "50,40,10", "train_iters": 15})
    other[other.index("--save") + 1] = str(tmp_path / "other")
    said = run_ranks(1, PRETRAIN, *other).stdout
    assert "--split is 50,40,10; the checkpoint was written with 10,80,10" in said

    # The weights alone begin a new run, which then goes on by the same command.
    tuned = tmp_path / "tuned"
    new = constant | longer | {"split": "50,40,10", "seed": 7, "pretrained_checkpoint": parts}
    new |= {"lr_warmup_iters": 0, "keep_best": True, "save_interval": 100, "rotary_ntk_factor": 2}
    schedule = {"lr": 0.5, "use_checkpoint_opt_param_scheduler": True}  # there is none of it yet
    config, _ = starting_point(parse_arguments(flags(corpus, tuned, **new | schedule)).resolve(1))
    assert config.training.lr == 0.5 and config.run.finetune
    positions = "--rotary-ntk-factor is 2.0; the checkpoint was written without"
    for train_iters, begins in ((1, f"with the weights of {latest(parts)}"), (2, "resuming from")):
        again = flags(corpus, tuned, **new | {"train_iters": train_iters})
        said = run_ranks(1, PRETRAIN, *again).stdout
        assert begins in said and (positions in said) == (train_iters == 1)
        validation = {
            r["loss"]: r["iteration"] for r in numbers(tuned) if r.get("split") == "validation"
        }
        assert best(tuned).name == f"iter_{validation[min(validation)]:07d}"
    first, second = (r for r in numbers(tuned) if "split" not in r)
    assert first["loss"] < numbers(whole)[0]["loss"] - 0.5
    assert (first["iteration"], first["consumed_samples"]) == (1, 32)
    assert second["iteration"] == 2


MESH = SimpleNamespace(rank=3, device=torch.device("cpu"))


def draw():
    return [random.random(), torch.rand(1).item(), np.random.random()]


def test_each_generator_for_itself():
    states = _random_states(MESH)
    assert sorted(states) == ["random.3.numpy", "random.3.python", "random.3.torch"]
    first = draw()

    def load(*names):
        known = {f"random.3.{name}": states[f"random.3.{name}"] for name in names}
        _load_random_states(SimpleNamespace(tensors=known, read=known.__getitem__), MESH)
        return [a == b for a, b in zip(draw(), first, strict=True)]

    assert load("python", "torch", "numpy") == [True, True, True]
    assert load("torch", "numpy") == [False, True, True]
    assert load("python") == [True, False, False]
    assert load() == [False, False, False]
