"""Evaluation while a model is trained: held-out loss, tasks, sample texts."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.config import Config
from megalong.config.arguments import parse_arguments
from megalong.config.run import RunConfig
from megalong.data.batches import IGNORE_INDEX
from megalong.evals.scores import position_edges
from megalong.evals.trials import Trials, language_of
from megalong.hf.evaluation import task_score
from megalong.hf.loaded_model import load_model
from megalong.training.evaluation import evaluate
from megalong.training.metrics import MetricsLog, read_metrics, training_records
from megalong.training.run_data import open_run_data
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import PRETRAIN, REPOSITORY, run_here, small_run_flags


class KnownLosses:
    """In the engine's place: the loss of a label is the label itself, in nats."""

    seq_length = 24

    def token_losses(self, batches):
        masks = [batch["labels"] != IGNORE_INDEX for batch in batches]
        return [(b["labels"].float() * mask, mask) for b, mask in zip(batches, masks, strict=True)]


class OneRank:
    device = torch.device("cpu")
    pipeline_parallel_size = 1

    def sum_of_losses(self, tensor):
        return tensor


def test_sums_by_hand():
    generator = np.random.default_rng(0)
    labels = generator.integers(1, 9, (5, 24))
    labels[3, 10:] = IGNORE_INDEX
    labels[4] = IGNORE_INDEX
    batches = [
        {"labels": torch.from_numpy(part), "positions": torch.arange(24)}
        for part in (labels[:2], labels[2:4], labels[4:])
    ]
    token_bytes = generator.integers(0, 5, 9)
    result = evaluate(KnownLosses(), batches, token_bytes, OneRank())

    counted = labels[labels != IGNORE_INDEX]
    assert result.tokens == counted.size
    assert result.loss == pytest.approx(counted.mean(), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(counted.mean()), rel=1e-12)
    bits = counted.sum() / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / token_bytes[counted].sum(), rel=1e-12)
    edges = position_edges(24)
    for start, stop, loss in zip(edges, edges[1:], result.loss_by_position, strict=False):
        part = labels[:, start:stop]
        assert loss == pytest.approx(part[part != IGNORE_INDEX].mean(), rel=1e-12)


def test_positions_of_documents_apart_count_from_their_beginnings():
    labels = torch.ones(2, 24, dtype=torch.long)
    labels[0, 5], labels[1, 3] = 9, 5
    starts = torch.zeros(2, 24, dtype=torch.int32)
    starts[0, 5:], starts[1, 2:] = 5, 2
    batch = {"labels": labels, "positions": torch.arange(24), "document_start": starts}
    result = evaluate(KnownLosses(), [batch], np.ones(10), OneRank())
    first = 4 + 4 + 2 + 4  # predictions at the first four places of four documents
    assert result.loss_by_position[:2] == [(first + 8 + 4) / first, 1.0]
    assert result.loss == (48 + 8 + 4) / 48


def test_without_a_byte_of_text_there_are_no_bits_per_byte():
    batch = {"labels": torch.ones(1, 24, dtype=torch.long), "positions": torch.arange(24)}
    assert evaluate(KnownLosses(), [batch], np.zeros(9), OneRank()).bits_per_byte is None


def test_a_bucket_without_predictions_has_no_loss():
    labels = torch.full((1, 24), IGNORE_INDEX)
    labels[0, :5] = 1
    batch = {"labels": labels, "positions": torch.arange(24)}
    result = evaluate(KnownLosses(), [batch], np.ones(9), OneRank())
    assert result.loss_by_position == [1.0, 1.0, None, None, None, None]


RUN = {
    "document_attention": "isolated",
    "seq_length": 256,
    "segment_lengths": "64 256",
    "dilation_rates": "1 3",
    "train_iters": 4,
    "lr": 0.02,
    "lr_decay_style": "constant",
    "make_vocab_size_divisible_by": 1,  # an export has no rows that fill up the vocabulary
    "eval_tasks": "mqar",
    "eval_task_samples": 3,
    "eval_task_lengths": 240,
    "sample_prompts": "class",
    "sample_tokens": 6,
}


@pytest.mark.parametrize("style", ["text", "ids"])
def test_scores_and_samples_are_those_of_the_checkpoint(corpus, tmp_path, style):
    """On two ranks of the sequence; and in the checkpoint they would be others with all of it one
    document."""
    run = {**RUN, "eval_task_style": style, "sequence_parallel_size": 2, "save": tmp_path}
    run_ranks(2, PRETRAIN, *small_run_flags(corpus, **run))
    task = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "task" in record][-1]
    [*_, sample] = read_metrics(tmp_path / "samples.jsonl")
    loaded = load_model(tmp_path, "cpu", torch.float32)
    trials = Trials("mqar", language_of(style, loaded.encode, loaded.ids, loaded.first), 240, 3)
    assert task["loss"] == pytest.approx(task_score(loaded, trials).loss, abs=2e-6)
    ids = [loaded.first, *loaded.encode(sample["prompt"])]
    for token in sample["tokens"]:
        assert token == loaded.model(torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)

    prompt = torch.tensor([ids])
    apart = loaded.model(prompt).logits[0, -1]
    embeddings = loaded.model.get_input_embeddings()(prompt)
    together = loaded.model(
        inputs_embeds=embeddings, position_ids=torch.arange(len(ids))[None]
    ).logits[0, -1]
    assert (apart - together).abs().max() > 1e-3


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


def test_a_task_has_its_curves_and_takes_the_place_of_the_same_one_only(tmp_path):
    score = {"task": "mqar", "length": 64, "samples": 3, "style": "ids", "iteration": 2}
    others = [score | {"length": 32}, score | {"style": "text"}, score | {"samples": 4}]
    config, points = Config(run=RunConfig(save=str(tmp_path))), {}
    with MetricsLog(config, 0, print) as log:
        for record in [*others, score | {"loss": 3.0}]:
            log.evaluation(record)
    with MetricsLog(config, 2, print) as log:
        log._boards.append(
            SimpleNamespace(
                scalars=lambda iteration, values: points.update(values), close=lambda failed: None
            )
        )
        log.evaluation(score | {"accuracy": 0.5, "token_accuracy": 0.75, "loss": 1.0})
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


SAMPLES = {"sample_interval": 2, "sample_tokens": 5}


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("def main(\n\nclass A\n")
    return f"{file} x"


def test_a_run_and_its_continuation_sample_prompts(corpus, tmp_path, prompts):
    """Every second iteration and at the end, the likeliest tokens of the model as it is then; at
    the place where the run goes on once only; and it trains as one without."""
    folder, alone = tmp_path / "run", tmp_path / "alone"
    # An export has no rows that fill up the vocabulary.
    like = {"train_iters": 4, "make_vocab_size_divisible_by": 1}
    run = like | SAMPLES | {"sample_prompts": prompts, "save": folder}
    first = run_ranks(1, PRETRAIN, *small_run_flags(corpus, **run)).stdout
    before = read_metrics(folder / "samples.jsonl")
    loaded = load_model(folder, "cpu", torch.float32)
    for record in before[-3:]:
        ids = [loaded.first, *loaded.encode(record["prompt"])]
        for token in record["tokens"]:
            logits = loaded.model(torch.tensor([ids])).logits[0, -1]
            assert token == logits.argmax()
            ids.append(token)
        assert record["text"] == loaded.decode(record["tokens"])
        assert f"sample at iteration 4 | {record['prompt']!r} | {record['text']!r}" in first

    run |= {"load": folder, "train_iters": 5, "lr_decay_iters": 4}
    run_ranks(1, PRETRAIN, *small_run_flags(corpus, **run))
    samples = read_metrics(folder / "samples.jsonl")
    assert [(r["iteration"], r["number"], r["prompt"]) for r in samples] == [
        (iteration, number, prompt)
        for iteration in (2, 4, 5)
        for number, prompt in enumerate(("def main(", "class A", "x"))
    ]
    assert samples[:6] == before and all(len(r["tokens"]) == 5 or r["ended"] for r in samples)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    [*_, shown] = board.Tensors("sample/2/text_summary")
    assert shown.step == 5 and shown.tensor_proto.string_val[0].decode().startswith("    x")

    run_ranks(1, PRETRAIN, *small_run_flags(corpus, **like, save=alone))
    losses = [
        [(r["loss"], r["grad_norm"]) for r in training_records(read_metrics(path))]
        for path in (folder / "metrics.jsonl", alone / "metrics.jsonl")
    ]
    assert losses[0][:4] == losses[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample_prompts": "no.txt"}, "--sample-prompts no.txt: No such file"),
        ({"sample_tokens": 200}, "'abc': 4 tokens, and --sample-tokens 200 more, are longer than"),
        ({"sample_tokens": 0}, "--sample-tokens 0 must be positive"),
        ({"sample_temperature": -1}, "--sample-temperature -1.0 must be"),
        ({"objective": "mlm"}, "--sample-prompts abc .*--objective causal"),
    ],
)
def test_what_cannot_be_asked_is_refused_sample_prompts(corpus, changes, message):
    flags = small_run_flags(corpus, **{"sample_prompts": "abc", **changes})
    with pytest.raises(UserError, match=message):
        open_run_data(parse_arguments(flags).resolve(1))
