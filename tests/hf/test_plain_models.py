"""Dense models leave as model types that Transformers has itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalong.hf.exporting import export
from megalong.hf.importing import import_model
from megalong.hf.loaded_model import load_model
from megalong.utils.errors import UserError
from tests.hf.models import random_checkpoint, random_tokens
from tests.launching import REPOSITORY, run_here

DENSE = {"attention": "dense"}
LAYERS = {
    "llama": {"norm_epsilon": 1e-3, "untie_embeddings_and_output_weights": True},
    "qwen2": {"add_qkv_bias": True, "kv_channels": 8, "rotary_base": 500.0},
    "qwen3": {
        "qk_layernorm": True,
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("model_type", LAYERS)
def test_transformers_own_class_computes_the_same(model_type, tmp_path):
    random_checkpoint(tmp_path / "run", **DENSE, **LAYERS[model_type])
    # Transformers reads the tokenizer of every qwen2 as Qwen2's own.
    whole = {"model_type": model_type, "with_tokenizer": model_type != "qwen2"}
    export(tmp_path / "run", tmp_path / "hf", **whole)
    assert not [*(tmp_path / "hf").glob("*.py")]
    assert model_type in (tmp_path / "hf" / "README.md").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    ours = load_model(tmp_path / "run", "cpu", torch.float32).model
    tokens = random_tokens(2, 128)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-4)
    assert type(theirs).__name__.lower().startswith(model_type)
    if model_type != "qwen2":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=False)
        assert theirs.config.eos_token_id == tokenizer.eos_token_id
    _, config = import_model(
        tmp_path / "hf", tmp_path / "again", {"tokenizer_type": "ByteTokenizer"}
    )
    export(tmp_path / "again", tmp_path / "twice", **whole)
    once, twice = (tmp_path / name / "model.safetensors" for name in ("hf", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    assert config.attention.attention == ("dense",)


@pytest.mark.parametrize(
    "changes, model_type, reason",
    [
        ({}, "llama", "dense causal attention, and this model dilated attention"),
        (DENSE | LAYERS["qwen2"], "llama", "--add-qkv-bias .* set --model-type qwen2$"),
        (
            DENSE | LAYERS["qwen2"],
            "qwen2",
            r"reads the tokenizer .*\(--no-tokenizer\)\. What is other: --tokenizer-model: this"
            " tokenizer cannot be expressed .* is cut into other tokens",
        ),
        (DENSE | {"normalization": "LayerNorm"}, "llama", "--normalization .* leave the flag out$"),
        (DENSE | {"add_bias_linear": True}, "qwen3", "--add-bias-linear .* leave the flag out$"),
    ],
)
def test_what_is_of_no_such_type_is_refused(changes, model_type, reason, tmp_path, monkeypatch):
    """Before any weights are written."""
    monkeypatch.setattr("megalong.hf.exporting.save_file", lambda *_, **__: pytest.fail("too late"))
    random_checkpoint(tmp_path / "run", **changes)
    with pytest.raises(UserError, match=reason):
        export(tmp_path / "run", tmp_path / "hf", model_type=model_type)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kept, said", [("isolated", True), ("mixed", False)])
def test_the_tool_takes_the_type_and_the_card_says_that_documents_are_not_apart(
    kept, said, tmp_path
):
    random_checkpoint(tmp_path / "run", **DENSE, document_attention=kept)
    tool = REPOSITORY / "tools" / "convert_to_hf.py"
    flags = ["--load", tmp_path / "run", "--output", tmp_path / "hf", "--model-type", "llama"]
    run_here(tool, *flags)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("behind an end-of-document token sees what is before it" in card) == said
