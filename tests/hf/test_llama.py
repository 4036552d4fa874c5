"""A Llama goes on here: with its own beginning-of-text token, under dilated attention, on two
tensor-parallel ranks, and back to Transformers."""

import json
import shutil
import sys

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megalong.hf.evaluation import evaluate_texts
from megalong.hf.exporting import export
from megalong.hf.importing import import_model
from megalong.hf.loaded_model import load_model
from megalong.hf.tokenizer_files import export_tokenizer
from megalong.training.metrics import read_metrics
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import PRETRAIN, REPOSITORY, run, run_here

EOD, BOS, ROWS = 256, 257, 300
PATTERN = ["--segment-lengths", "32", "256", "--dilation-rates", "1", "8"]


def tool(name, *arguments):
    return run_here(REPOSITORY / "tools" / name, *arguments).stdout


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "code.jsonl"
    text = (REPOSITORY / "megalong" / "config" / "parallel.py").read_text()
    path.write_text("".join(json.dumps({"text": text[i : i + 700]}) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama with more rows than its tokenizer has ids: bytes, and a BOS that is put before
    every text."""
    folder = tmp_path_factory.mktemp("llama") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        eos_token_id=EOD, bos_token_id=BOS, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    export_tokenizer("ByteTokenizer", None, folder, 128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("a") == [BOS, ord("a")]
    return folder


@pytest.fixture(scope="module")
def dense(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "dense"
    _, config = import_model(llama, folder, {"attention": "dense"})
    assert config.data.prepend_bos and config.model.padded_vocab_size == ROWS
    return folder


def test_dense_is_the_same_and_dilated_is_not(llama, dense, tmp_path):
    said = tool("convert_from_hf.py", "--input", llama, "--output", tmp_path / "dilated", *PATTERN)
    assert "256 tokens; dilated attention, segment length/dilation rate: 32/1, 256/8" in said
    assert "--tokenizer-type HuggingFaceTokenizer --tokenizer-model" in said
    assert "--prepend-bos --append-eod" in said
    texts = [(REPOSITORY / "pretrain_longnet.py").read_text()[:3000]]
    perplexity = {}
    for folder in (llama, dense, tmp_path / "dilated"):
        loaded = load_model(folder, "cpu", torch.float32)
        assert loaded.first == BOS
        result = evaluate_texts(loaded, texts, 256, [0, 128, 256])
        perplexity[folder.name] = result["perplexity"]
    shutil.copytree(dense / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer: not the tokenizer that .* was trained with"):
        load_model(dense, "cpu", torch.float32, str(file.parent))
    load_model(dense, "cpu", torch.float32, str(dense / "tokenizer"))
    assert perplexity["dense"] == pytest.approx(perplexity["llama"], rel=1e-5)
    assert perplexity["dilated"] != pytest.approx(perplexity["llama"], rel=1e-5)


def test_training_goes_on_with_tensor_parallelism(dense, text_file, tmp_path):
    def data(*more):
        prefix = tmp_path / f"data{len(more)}"
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer"]
        tokenizer += ["--tokenizer-model", dense / "tokenizer", "--append-eod", *more]
        flags = ["--input", text_file, "--output-prefix", prefix, *tokenizer]
        script = REPOSITORY / "tools" / "preprocess_data.py"
        run([sys.executable, str(script), *map(str, flags)])  # it starts processes itself
        return f"{prefix}_text_document"

    def train(ranks, path, **options):
        save = tmp_path / f"run{ranks}"
        flags = ["--config", dense / "flags.yaml", "--load", dense, "--save", save]
        flags += ["--data-path", path, "--split", "80,20,0", "--eval-iters", 1, "--lr", 1e-3]
        flags += ["--train-iters", 3, "--global-batch-size", 2, "--micro-batch-size", 2]
        flags += ["--tensor-model-parallel-size", ranks]
        return save, run_ranks(ranks, PRETRAIN, *flags, **options)

    _, refused = train(1, data(), check=False)
    assert refused.returncode == 2
    assert "was made without --prepend-bos: set --no-prepend-bos, or" in refused.stdout
    path = data("--prepend-bos")
    losses = []
    for ranks in (1, 2):
        run_folder, _ = train(ranks, path)
        losses.append([r["loss"] for r in read_metrics(run_folder / "metrics.jsonl")])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert losses[0][2] < losses[0][0]

    export(run_folder, tmp_path / "out")
    loaded = load_model(tmp_path / "out", "cpu", torch.float32)
    assert loaded.first == BOS and loaded.model.config.eos_token_id == EOD
    shown = tool("generate.py", "--model", tmp_path / "out", "--prompt", "def", "--temperature", 0)
    assert shown.startswith("def") and len(shown) > 20


def test_rows_for_tensor_parallelism(llama, tmp_path):
    """What the layout needs can be said, and is asked for, at the import."""
    changes = {"attention": "dense", "tensor_model_parallel_size": 2}
    _, config = import_model(llama, tmp_path / "two", changes)
    assert config.parallel.tensor_model_parallel_size == 2
    changes = {"attention": "dense", "padded_vocab_size": 301, "tensor_model_parallel_size": 2}
    with pytest.raises(UserError, match="or --padded-vocab-size 302"):
        import_model(llama, tmp_path / "no", changes)
    _, config = import_model(llama, tmp_path / "yes", changes | {"padded_vocab_size": 302})
    assert config.model.padded_vocab_size == 302
