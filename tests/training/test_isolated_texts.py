"""Texts in a run that keeps documents apart: what stands before one belongs to another document."""

import pytest
import torch

from megalong.evals.trials import Trials, language_of
from megalong.hf.evaluation import task_score
from megalong.hf.loaded_model import load_model
from megalong.training.metrics import read_metrics
from tests.forked import run_ranks
from tests.launching import PRETRAIN, small_run_flags

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
