"""Evaluation by context length, against the plain way to compute it."""

import dataclasses
import importlib.util
import math
import sys

import pytest
import torch

from megalong.hf.evaluation import evaluate_texts, passkey, token_losses
from megalong.hf.loaded_model import LoadedModel
from tests.hf.test_transformers import make_model
from tests.launching import REPOSITORY, run_here

TOOL = REPOSITORY / "tools" / "evaluate.py"


@pytest.fixture(scope="module")
def loaded():
    model = make_model(vocab_size=257)
    return LoadedModel(model, lambda text: list(text.encode()), bytes.decode, first=256)


def test_token_losses_are_those_of_the_logits(loaded, monkeypatch):
    monkeypatch.setattr("megalong.hf.evaluation.LOGIT_ROWS", 7)
    tokens = [256, *range(40)]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    expected = [-logits[i, token].item() for i, token in enumerate(tokens[1:])]
    assert token_losses(loaded, tokens).tolist() == pytest.approx(expected, rel=1e-5)


def test_every_token_counts_once_at_every_context_length(loaded):
    texts = ["caf\u00e9 " * 10, "x" * 33]
    for context in (10, 50, 1000):
        result = evaluate_texts(loaded, texts, context, [0, 5, context])
        assert result["tokens"] == result["bytes"] == 60 + 33  # one token a byte
        assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    whole = torch.cat([token_losses(loaded, [256, *text.encode()]) for text in texts])
    assert result["loss"] == pytest.approx(whole.mean().item(), rel=1e-6)
    first = torch.cat([token_losses(loaded, [256, *text.encode()])[:5] for text in texts])
    assert result["loss_by_position"][0] == pytest.approx(first.mean().item(), rel=1e-6)
    assert evaluate_texts(loaded, ["ab"], 9, [0, 5, 9])["loss_by_position"][1] is None


def test_a_passkey_is_found_by_a_model_that_copies(loaded):
    result = passkey(loaded, 300, 0.5, trials=2)
    assert result["accuracy"] == 0 and result["loss"] > 3

    class Copies(torch.nn.Module):
        """Says after the question what came behind the first "is" of the text."""

        device = torch.device("cpu")

        def base_model(self, ids, use_cache):
            text = bytes(ids[0, 1:].tolist()).decode()
            key = text.split("pass key is ")[1][:5]
            said = torch.zeros(1, ids.shape[1], 257)
            for place, byte in zip(range(-6, 0), f" {key}".encode(), strict=True):
                said[0, place, byte] = 20
            return type("Outputs", (), {"last_hidden_state": said})

        def get_output_embeddings(self):
            return torch.nn.Identity()

    copies = dataclasses.replace(loaded, model=Copies())
    for depth in (0.0, 0.3, 1.0):
        assert passkey(copies, 400, depth, trials=3)["accuracy"] == 1
    with pytest.raises(ValueError, match="--passkey-lengths 50"):
        passkey(loaded, 50, 0.5, trials=1)


def test_an_earlier_evaluation_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    command = [TOOL, "--model", "none", "--passkey-lengths", "9", "--output", tmp_path]
    refused = run_here(*command, check=False)
    assert refused.returncode == 2 and "or --overwrite" in refused.stderr
    asked = run_here(*command, "--overwrite", check=False)
    assert "none is not a checkpoint" in asked.stderr
    assert (tmp_path / "evaluation.json").read_text() == "{}"


@pytest.mark.parametrize("length, hinted", [(300, True), (12_000, False)])
def test_a_handful_of_tokens_is_worth_a_hint(loaded, length, hinted, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("evaluate", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(
        sys, "argv", f"x --model y --input z --output {TOOL} --context-lengths 400".split()
    )
    results = tool.evaluate(loaded, ["x" * length], tool.parse_arguments())
    assert results["texts"][0]["tokens"] == length
    printed = capsys.readouterr().err
    assert ("hint: --input has only 300 tokens" in printed) == hinted
    assert ("the longest has 300 tokens, and is read as a whole" in printed) == (length < 400)
