"""Datasets of tasks: what a training reads is the samples, one a sequence."""

import json

import numpy as np
import pytest

from megalong.config.arguments import parse_arguments
from megalong.data.batches import IGNORE_INDEX, training_batches
from megalong.evals.scores import AnswerSums
from megalong.evals.trials import Trials, language_of
from megalong.training.run_data import open_run_data
from tests.launching import REPOSITORY, run_here, small_run_flags

TOOL = REPOSITORY / "tools" / "make_task_data.py"
BYTES = ("--tokenizer-type", "ByteTokenizer")


def make(prefix, *more, check=True):
    flags = ["--tasks", "mqar", "copy", "--length", 128, "--samples", 9, "--task-style", "ids"]
    return run_here(TOOL, *flags, *BYTES, "--output-prefix", prefix, *more, check=check)


def test_every_sequence_of_the_training_is_a_sample(tmp_path):
    assert "9 samples of mqar, copy, 128 tokens each" in make(tmp_path / "tasks").stdout
    config = parse_arguments(small_run_flags(tmp_path / "tasks", split="1,0,0")).resolve(1)
    data = open_run_data(config)
    assert not data.oddities
    language = language_of("ids", data.tokenizer.encode, data.tokenizer.text_ids, 256)
    written = {
        trials.sample(i).tokens.tobytes()
        for trials in (
            Trials("mqar", language, 128, 5, "data 1234", spread=False),
            Trials("copy", language, 128, 4, "data 1234", spread=False),
        )
        for i in range(trials.samples)
    }
    read = {data.train.sample(i, 0, 128).astype(np.int64).tobytes() for i in range(9)}
    assert len(written) == 9 and read == written
    made = json.loads((tmp_path / "tasks.json").read_text())
    assert made["documents"] == 9 and made["tasks"] == ["mqar", "copy"] and made["seed"] == 1234


def test_what_follows_from_what_is_before_it_counts_alone(tmp_path):
    make(tmp_path / "tasks", "--loss", "predictable")
    language = language_of("ids", lambda text: [], range(256), 256)
    samples = [
        Trials(("mqar", "copy")[i % 2], language, 128, 5, "data 1234", spread=False).sample(i // 2)
        for i in range(9)
    ]
    counts = np.concatenate([sample.answered | sample.hay for sample in samples])
    written = np.fromfile(tmp_path / "tasks.loss", np.uint8)
    assert np.array_equal(written, counts) and 0 < counts.mean() < 1


def test_the_loss_of_the_answers_alone(tmp_path):
    """The data is the same, and what the training predicts is what an evaluation scores."""
    make(tmp_path / "all")
    make(tmp_path / "tasks", "--loss", "answers")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"tasks{suffix}").read_bytes() == (
            tmp_path / f"all{suffix}"
        ).read_bytes()
    assert not (tmp_path / "all.loss").exists()
    config = parse_arguments(small_run_flags(tmp_path / "tasks", split="1,0,0")).resolve(1)
    data = open_run_data(config)
    language = language_of("ids", data.tokenizer.encode, data.tokenizer.text_ids, 256)
    predicted = {}
    for task, samples in (("mqar", 5), ("copy", 4)):
        trials = Trials(task, language, 128, samples, "data 1234", spread=False)
        sums = AnswerSums(trials)
        for i in range(samples):
            places, _ = sums.places(i, 0, 128)
            predicted[trials.sample(i).tokens.tobytes()] = places
    batches = training_batches(
        data.train, consumed_samples=0, global_batch_size=9, micro_batch_size=9,
        data_parallel_rank=0, data_parallel_size=1,
    )  # fmt: skip
    batch = next(batches)
    for tokens, labels in zip(batch["tokens"].numpy(), batch["labels"].numpy(), strict=True):
        places = predicted.pop(tokens.tobytes())
        assert np.flatnonzero(labels != IGNORE_INDEX).tolist() == places
        assert np.array_equal(labels[places], tokens[np.array(places) + 1])
    assert not predicted
    assert batch["predicted"] == (batch["labels"] != IGNORE_INDEX).sum()
    made = json.loads((tmp_path / "tasks.json").read_text())["loss_mask"]
    assert made["tokens"] == batch["predicted"] and made["bytes"] == 9 * 128


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "mqra"], "--tasks mqra: no such task; did you mean mqar?"),
        (["--samples", 1], "--samples 1: must be at least 1 for each task"),
        (["--length", 8], "--length 8: mqar needs at least 9 tokens"),
        (["--task-style", "text", "--length", 64], "--length 64: mqar needs at least"),
        (["--prepend-bos"], "--prepend-bos: the tokenizer has no token"),
        ([], "tasks.bin is there already: choose another --output-prefix, or --overwrite"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, flags, message):
    if not flags:
        make(tmp_path / "tasks")
    refused = make(tmp_path / "tasks", *flags, check=False)
    assert refused.returncode == 2 and message in refused.stderr
    assert (tmp_path / "tasks.bin").exists() == (not flags)
