"""Evaluation by context length, against the plain way to compute it."""

import dataclasses
import importlib.util
import math
import sys

import pytest
import torch

from megalong.evals.trials import Trials, language_of
from megalong.hf.evaluation import (
    evaluate_texts,
    losses_by_prompt,
    passkey,
    task_score,
    token_losses,
)
from megalong.hf.loaded_model import LoadedModel, load_model
from megalong.utils.errors import UserError
from tests.hf.models import random_checkpoint
from tests.hf.test_transformers import make_model
from tests.launching import REPOSITORY, run_here

TOOL = REPOSITORY / "tools" / "evaluate.py"


@pytest.fixture(scope="module")
def loaded():
    model = make_model(vocab_size=257)
    return LoadedModel(model, lambda text: list(text.encode()), bytes.decode, 256, range(256))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


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


def test_the_same_tokens_are_predicted_behind_every_prompt(loaded):
    texts = ["0123456789abcdefghijklmnopqrs", "too short", "x" * 24]
    found = losses_by_prompt(loaded, texts, [1, 4, 9], suffix=3)
    ends = [list(text[:12].encode()) for text in (texts[0], texts[0][12:], "x" * 12, "x" * 12)]
    for result, prompt in zip(found, (1, 4, 9), strict=True):
        losses = torch.cat([token_losses(loaded, end[-prompt - 3 :])[-3:] for end in ends])
        assert result["prompt"] == prompt and result["tokens"] == 3 * len(ends)
        assert result["loss"] == pytest.approx(losses.double().mean().item(), rel=1e-6)
    with pytest.raises(UserError, match="--prompt-lengths 90: no text of --input has 93 tokens"):
        losses_by_prompt(loaded, texts, [1, 90], suffix=3)


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
def test_a_handful_of_tokens_is_worth_a_hint(loaded, tool, length, hinted, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", f"x --model y --input z --output {TOOL} --context-lengths 400".split()
    )
    results = tool.evaluate(loaded, ["x" * length], tool.parse_arguments())
    assert results["texts"][0]["tokens"] == length
    [column] = [r["loss_by_position"] for r in results["texts"]]
    assert f"| 0 to 3 | {column[0]:.4f} |" in tool.tables(results)
    printed = capsys.readouterr().err
    assert ("hint: --input has only 300 tokens" in printed) == hinted
    assert ("the longest has 300 tokens, and is read as a whole" in printed) == (length < 400)


@pytest.mark.parametrize("style", ["text", "ids"])
@pytest.mark.parametrize("task", ["niah_multiquery", "copy", "mqar"])
def test_a_task_is_scored_as_the_whole_logits_say(loaded, style, task, monkeypatch):
    """In chunks of the sequence and of the answers, against the plain way."""
    monkeypatch.setattr("megalong.hf.evaluation.LOGIT_ROWS", 7)
    monkeypatch.setattr("megalong.hf.evaluation.CHUNK", 100)
    language = language_of(style, loaded.encode, loaded.ids, loaded.first)
    trials = Trials(task, language, 600, 3)
    read = []
    score = task_score(loaded, trials, read.append)
    assert sum(read) == 3 * 599
    losses, right, found = [], [], []
    for number in range(3):
        sample = trials.sample(number)
        with torch.no_grad():
            logits = loaded.model(torch.from_numpy(sample.tokens)[None]).logits[0].double()
        for answer in sample.answers:
            places = range(answer.start - 1, answer.stop - 1)
            wanted = [int(sample.tokens[place + 1]) for place in places]
            losses += [
                -logits[place].log_softmax(-1)[token].item()
                for place, token in zip(places, wanted, strict=True)
            ]
            told = [logits[p].argmax().item() == t for p, t in zip(places, wanted, strict=True)]
            right += told
            found.append(all(told))
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.token_accuracy == pytest.approx(sum(right) / len(right))
    assert score.accuracy == sum(found) / len(found) and score.answers == len(found)


def test_tasks_in_the_tool(loaded, tool, tmp_path, capsys, monkeypatch):
    """Numbers, table and plot of tasks alone, for a model that says what stands in the sample."""
    arguments = "x --model y --tasks mqar copy mqar --task-lengths 400 500 --task-samples 2"

    def asked(more=""):
        monkeypatch.setattr(sys, "argv", f"{arguments} --output {tmp_path} {more}".split())
        return tool.parse_arguments()

    class Repeats(torch.nn.Module):
        """Says of every token but the last what comes next."""

        device = torch.device("cpu")

        def base_model(self, ids, use_cache):
            said = torch.nn.functional.one_hot(self.tokens[1 : ids.shape[1] + 1], 257) * 50.0
            return type("Outputs", (), {"last_hidden_state": said[None]})

        def get_output_embeddings(self):
            return torch.nn.Identity()

    model, sample = Repeats(), Trials.sample

    def shown(self, i):
        found = sample(self, i)
        model.tokens = torch.from_numpy(found.tokens)
        return found

    monkeypatch.setattr(Trials, "sample", shown)
    results = tool.evaluate(dataclasses.replace(loaded, model=model), [], asked())
    tasks = [(r["task"], r["length"], r["accuracy"], r["style"]) for r in results["tasks"]]
    assert tasks == [(task, n, 1.0, "text") for task in ("mqar", "copy") for n in (400, 500)]
    assert "copy of 500: 100.0% of 2 answers right" in capsys.readouterr().out
    table = tool.tables(results)
    assert "| copy | text | 500 | 2 | 100.0% | 100.0% | 0.000 |" in table
    tool.plot(results, tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match=r"--tasks mqra: no such task; did you mean mqar\?"):
        asked("--tasks mqra")
    with pytest.raises(UserError, match="--task-samples must be at least 1"):
        asked("--task-samples 0")
    with pytest.raises(UserError, match="--task-lengths 9: mqar needs at least"):
        tool.evaluate(loaded, [], asked("--task-lengths 9"))
    with pytest.raises(UserError, match="--task-style ids: a vocabulary of 0 ids is too small"):
        tool.evaluate(dataclasses.replace(loaded, ids=()), [], asked("--task-style ids"))


@pytest.mark.parametrize("attention, chunk", [("dense", 8192), ("dilated", 8192), ("dilated", 32)])
def test_samples_of_ids_are_one_document_and_texts_are_not(tmp_path, attention, chunk, monkeypatch):
    """Of a model that keeps documents apart: bare ids see the token that they begin with, as they
    do in the training on such samples, and text does not."""
    monkeypatch.setattr("megalong.hf.evaluation.CHUNK", chunk)
    scores = {}
    for kept in ("isolated", "mixed"):
        folder = tmp_path / kept
        random_checkpoint(folder, attention=attention, document_attention=kept)
        model = load_model(folder, "cpu", torch.float32)
        for style in ("ids", "text"):
            language = language_of(style, model.encode, model.ids, model.first)
            trials = Trials("mqar", language, 100, 2)
            scores[style, kept] = task_score(model, trials).loss
    assert scores["ids", "isolated"] == pytest.approx(scores["ids", "mixed"], abs=1e-6)
    assert scores["text", "isolated"] != pytest.approx(scores["text", "mixed"], abs=1e-4)
