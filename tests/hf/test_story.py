"""A trained model goes to Transformers, is evaluated there, comes back, and is trained further."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megalong.hf.evaluation import evaluate_texts, load_subject
from megalong.hf.exporting import export
from megalong.hf.importing import import_model
from megalong.hf.tokenizer_files import export_tokenizer
from megalong.training.metrics import read_metrics
from tests.launching import PRETRAIN, REPOSITORY, run, small_run_flags

TOOLS = REPOSITORY / "tools"


def tool(name, *arguments, **options):
    return run([sys.executable, str(TOOLS / name), *map(str, arguments)], **options)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run folder: 40 steps on source code."""
    folder = tmp_path_factory.mktemp("story") / "run"
    flags = small_run_flags(corpus, train_iters=40, save=folder, lr=1e-2, head_offsets="layer")
    run([sys.executable, PRETRAIN, *flags])
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.py"
    path.write_text(Path(json.__file__).read_text()[:3000])
    return path


def losses(folder):
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "split" not in r]


def test_the_whole_way(trained, text_file, corpus, tmp_path):
    said = tool("convert_to_hf.py", "--load", trained, "--output", tmp_path / "hf").stdout
    assert "iteration 40" in said
    again = tool("convert_to_hf.py", "--load", trained, "--output", tmp_path / "hf", check=False)
    assert again.returncode == 1 and "is there already" in again.stderr

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    inputs = tokenizer("def main(", return_tensors="pt")
    cached, full = (
        model.generate(**inputs, max_new_tokens=150, min_new_tokens=150, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, full) and tokenizer.decode(cached[0]).startswith("def main(")

    results = []
    for model_folder in (trained, tmp_path / "hf"):
        flags = ["--input", text_file, "--context-lengths", 32, 128, "--output", tmp_path / "e"]
        flags += ["--passkey-lengths", 200, "--passkey-depths", 0, 0.5, "--passkey-trials", 2]
        tool("evaluate.py", "--model", model_folder, *flags)
        results.append(json.loads((tmp_path / "e" / "evaluation.json").read_text()))
        assert (tmp_path / "e" / "evaluation.png").stat().st_size > 10_000
    ours, theirs = results
    assert ours["texts"] == theirs["texts"] and len(ours["passkey"]) == 2
    assert ours["texts"][1]["bytes"] == 3000 and ours["texts"][1]["tokens"] == 3000
    assert 1.5 < ours["texts"][1]["bits_per_byte"] < 6

    said = tool("convert_from_hf.py", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    assert "go on with: pretrain_longnet.py --config" in said.stdout
    flags = ["--config", tmp_path / "back" / "flags.yaml", "--load", tmp_path / "back"]
    flags += ["--save", tmp_path / "more", "--data-path", corpus, "--train-iters", 4]
    flags += ["--global-batch-size", 8, "--split", "80,15,5", "--eval-iters", 1, "--lr", 1e-3]
    run([sys.executable, PRETRAIN, *map(str, flags)])
    before, after = losses(trained), losses(tmp_path / "more")
    assert before[0] > 5 and after[0] < before[-1] + 0.3
    export(tmp_path / "more", tmp_path / "more-hf")  # and out again


def test_a_llama_under_dilated_attention(text_file, tmp_path):
    """The same weights, dense and dilated: dense is Transformers' own perplexity."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    export_tokenizer("ByteTokenizer", None, tmp_path / "llama")
    pattern = ["--segment-lengths", 32, 256, "--dilation-rates", 1, 8]
    llama, dense, dilated = (tmp_path / name for name in ("llama", "dense", "dilated"))
    import_model(llama, dense, {"attention": "dense"})
    said = tool("convert_from_hf.py", "--input", llama, "--output", dilated, *pattern).stdout
    assert "dilated ((32, 1), (256, 8)) attention, 256 tokens" in said
    perplexity = {}
    for folder in (llama, dense, dilated):
        subject = load_subject(folder, "cpu", torch.float32)
        result = evaluate_texts(subject, [text_file.read_text()], 256, [0, 128, 256])
        perplexity[folder.name] = result["perplexity"]
    assert perplexity["dense"] == pytest.approx(perplexity["llama"], rel=1e-5)
    assert perplexity["dilated"] != pytest.approx(perplexity["llama"], rel=1e-5)


def test_lm_eval_runs_the_exported_model(trained, text_file, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    export(trained, tmp_path / "hf")
    documents = tmp_path / "documents.jsonl"
    lines = [{"text": text_file.read_text()[i : i + 700]} for i in range(0, 2100, 700)]
    documents.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny_code
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    model = HFLM(
        str(tmp_path / "hf"), trust_remote_code=True, device="cpu", batch_size=2, max_length=256
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=["tiny_code"], task_manager=tasks, bootstrap_iters=0
    )
    assert 1.5 < results["results"]["tiny_code"]["bits_per_byte,none"] < 6
