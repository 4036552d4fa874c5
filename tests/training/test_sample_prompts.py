"""A run with --sample-prompts: what is written of it, and what is refused. That every layout has
the same samples: test_parity.py."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.config.arguments import parse_arguments
from megalong.hf.loaded_model import load_model
from megalong.training.metrics import read_metrics, training_records
from megalong.training.run_data import open_run_data
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import PRETRAIN, small_run_flags

SAMPLES = {"sample_interval": 2, "sample_tokens": 5}


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("def main(\n\nclass A\n")
    return f"{file} x"


def test_a_run_and_its_continuation(corpus, tmp_path, prompts):
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
        ({"sample_temperature": -1}, "--sample-temperature"),
        ({"objective": "mlm"}, "--sample-prompts .*--objective"),
    ],
)
def test_what_cannot_be_asked_is_refused(corpus, changes, message):
    flags = small_run_flags(corpus, **{"sample_prompts": "abc", **changes})
    with pytest.raises(UserError, match=message):
        open_run_data(parse_arguments(flags).resolve(1))


def test_a_file_without_text_is_refused(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    flags = small_run_flags(corpus, sample_prompts=tmp_path / "empty.txt")
    with pytest.raises(UserError, match="there is no text in it"):
        open_run_data(parse_arguments(flags).resolve(1))


def test_settings_of_samples_want_prompts(corpus):
    with pytest.raises(UserError, match=r"--sample-tokens .*--sample-prompts"):
        parse_arguments(small_run_flags(corpus, sample_tokens=3)).resolve(1)
