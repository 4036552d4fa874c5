"""A run with --eval-tasks: when, what is written of it, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from megalong.config import Config
from megalong.config.arguments import parse_arguments
from megalong.config.run import RunConfig
from megalong.evals.trials import Trials, language_of
from megalong.hf.evaluation import task_score
from megalong.hf.loaded_model import load_model
from megalong.training.metrics import MetricsLog, read_metrics, training_records
from megalong.training.run_data import open_run_data
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import PRETRAIN, REPOSITORY, run_here, small_run_flags

TASKS = {"eval_tasks": "mqar passkey", "eval_task_style": "ids", "eval_task_samples": 3}


def test_a_run_and_its_continuation(corpus, tmp_path):
    """Every second iteration and at the end; at the place where it goes on once only."""
    folder = tmp_path / "run"
    run = TASKS | {"eval_task_interval": 2, "eval_task_lengths": "128 64", "save": folder}
    first = run_ranks(1, PRETRAIN, *small_run_flags(corpus, **run, train_iters=4)).stdout
    assert (
        "tasks: mqar, passkey, of bare ids, 128, 64 tokens, 3 samples of each, every 2 iterations:"
        " an evaluation reads 12 sequences of 128, 1,536 tokens"
    ) in first
    before = read_metrics(folder / "metrics.jsonl")
    flags = small_run_flags(corpus, **run, load=folder, train_iters=5)
    text = run_ranks(1, PRETRAIN, *flags).stdout
    records = read_metrics(folder / "metrics.jsonl")
    tasks = [record for record in records if "task" in record]
    assert [(r["iteration"], r["task"], r["length"]) for r in tasks] == [
        (iteration, task, length)
        for iteration in (2, 4, 5)
        for task in ("mqar", "passkey")
        for length in (128, 64)
    ]
    assert [r["iteration"] for r in training_records(records)] == [1, 2, 3, 4, 5]
    scores = [record for record in before if "task" in record]
    assert len(scores) == 8 and tasks[:8] == scores
    last = tasks[-1]
    assert last["answers"] == 3 and last["samples"] == 3 and last["style"] == "ids"
    assert f"passkey of 64 tokens at iteration 5 | {last['accuracy']:.1%} of 3 answers" in text

    done = run_here(REPOSITORY / "tools" / "plot_run.py", folder)
    assert f"{folder / 'task_accuracy.png'}: tasks" in done.stdout
    assert (folder / "task_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_leave_the_training_as_it_is_and_score_the_checkpoint(corpus, tmp_path):
    """A run with tasks trains as one without; its last scores are those of its checkpoint."""
    kept = {}
    # An export has no rows that fill up the vocabulary, which losses depend on.
    like = {"train_iters": 4, "make_vocab_size_divisible_by": 1}
    for name, tasks in (("with", TASKS | {"eval_task_interval": 1}), ("without", {})):
        run_ranks(1, PRETRAIN, *small_run_flags(corpus, **like, **tasks, save=tmp_path / name))
        kept[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    steps = {
        name: [
            {what: record[what] for what in ("iteration", "loss", "grad_norm", "learning_rate")}
            for record in training_records(records)
        ]
        for name, records in kept.items()
    }
    assert len(steps["with"]) == 4 and steps["with"] == steps["without"]

    loaded = load_model(tmp_path / "with", "cpu", torch.float32)
    language = language_of("ids", loaded.encode, loaded.ids, loaded.first)
    last = [record for record in kept["with"] if "task" in record][-2:]
    assert [record["task"] for record in last] == TASKS["eval_tasks"].split()
    for record in last:
        score = task_score(loaded, Trials(record["task"], language, 128, 3)).record()
        assert record["iteration"] == 4 and record["loss"] == pytest.approx(score["loss"], rel=1e-5)
        assert {name: record[name] for name in score} == score | {"loss": record["loss"]}


def test_a_task_has_its_curves_and_takes_the_place_of_the_same_one_only(tmp_path):
    score = {"task": "mqar", "length": 64, "samples": 3, "style": "ids", "iteration": 2}
    others = [score | {"length": 32}, score | {"style": "text"}, score | {"samples": 4}]
    config, points = Config(run=RunConfig(save=str(tmp_path))), {}
    with MetricsLog(config, 0, print) as log:
        for record in [*others, score | {"loss": 3.0}]:
            log.task(record)
    with MetricsLog(config, 2, print) as log:
        log._boards.append(
            SimpleNamespace(
                scalars=lambda iteration, values: points.update(values), close=lambda failed: None
            )
        )
        log.task(score | {"accuracy": 0.5, "token_accuracy": 0.75, "loss": 1.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[:3] == others and [record.get("accuracy") for record in records[3:]] == [0.5]
    assert points == {
        "task/mqar/64/accuracy": 0.5,
        "task/mqar/64/token_accuracy": 0.75,
        "task/mqar/64/loss": 1.0,
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_tasks": "mqra"}, "'mqra' is not one of .*; did you mean mqar\\?"),
        (
            {"eval_tasks": "passkey", "eval_task_style": "text", "eval_task_lengths": "128 64"},
            "--eval-task-lengths 128: passkey needs at least 2.. tokens .*leave passkey out of",
        ),
        ({"eval_task_lengths": 4}, "--eval-task-lengths 4: mqar needs at least 9 tokens"),
        (
            {"eval_tasks": "common_words", "tokenizer": 40},
            "--eval-tasks common_words: it takes 20 different keys, and the vocabulary has 10",
        ),
        ({"tokenizer": 18}, "--eval-task-style ids: a vocabulary of 18 ids is too small"),
    ],
)
def test_what_cannot_be_asked_is_refused(corpus, changes, message, monkeypatch):
    changes = dict(changes)
    ids = changes.pop("tokenizer", 256)
    monkeypatch.setattr(
        "megalong.data.tokenizers.tokenizer.Tokenizer.text_ids", property(lambda self: range(ids))
    )
    with pytest.raises(UserError, match=message):
        open_run_data(parse_arguments(small_run_flags(corpus, **TASKS | changes)).resolve(1))
