"""Models of the Llama family of Transformers become checkpoints that compute the same."""

import shutil

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megalong.checkpoint.reading import StoredModel
from megalong.hf.exporting import export
from megalong.hf.importing import SafetensorsReader, import_model
from megalong.hf.loaded_model import load_model
from megalong.utils.errors import UserError
from tests.hf.models import (
    VOCAB_SIZE,
    random_checkpoint,
    stored_tensors,
)

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
BYTES = {"tokenizer_type": "ByteTokenizer"}


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
MSCALE = {"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 4.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
LLAMA = LlamaForCausalLM, LlamaConfig
QWEN2 = Qwen2ForCausalLM, Qwen2Config
MISTRAL = MistralForCausalLM, MistralConfig
KINDS = {
    "untied": (LLAMA, {"rms_norm_eps": 1e-4}),
    "tied-head_dim": (LLAMA, {"tie_word_embeddings": True, "head_dim": 32}),
    "biases-rope": (LLAMA, {"attention_bias": True, "mlp_bias": True, **rope("default")}),
    "llama3": (LLAMA, rope("llama3", **LLAMA3)),
    "mistral": (MISTRAL, {"sliding_window": None}),
    "qwen2": (QWEN2, {"tie_word_embeddings": True}),
    "qwen3": ((Qwen3ForCausalLM, Qwen3Config), {"head_dim": 32}),
    "window": (MISTRAL, {"sliding_window": 40}),
    "windows": (QWEN2, WINDOWS),
    "linear": (LLAMA, rope("linear", factor=2.0)),
    "yarn": (LLAMA, rope("yarn", **YARN)),
    "yarn mscale": (LLAMA, rope("yarn", **YARN, **MSCALE)),
    "yarn attention": (LLAMA, rope("yarn", **YARN, attention_factor=1.5, beta_slow=0.5)),
    # Qwen2.5's way for long inputs, of an older file.
    "yarn qwen2": (QWEN2, {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **YARN}}),
}


def model_of(name):
    (kind, config), fields = KINDS[name]
    return kind(config(**SMALL, **fields))


@pytest.mark.parametrize("name", KINDS)
def test_a_llama_computes_the_same_here(name, tmp_path):
    from megalong.model.build import build_model
    from megalong.model.stage import named_parameters
    from megalong.parallel import launch

    torch.manual_seed(0)
    llama = model_of(name).eval()
    for parameter in llama.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    llama.save_pretrained(tmp_path / "llama")
    checkpoint, config = import_model(tmp_path / "llama", tmp_path / "run", BYTES)
    tokens = torch.randint(300, (2, 128))
    with torch.no_grad():
        expected = llama(tokens).logits
    with launch(config) as mesh:
        model = build_model(config, VOCAB_SIZE, mesh)
        stored = StoredModel(checkpoint)
        with torch.no_grad():
            for name, parameter in named_parameters(model):
                parameter.copy_(stored.read(name))
            found = model(
                input_ids=tokens, position_ids=torch.arange(128), attention_mask=None
            )[..., :300]  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_scaling_that_is_given_takes_the_place_of_the_models_own(tmp_path):
    model_of("yarn mscale").save_pretrained(tmp_path / "llama")
    changes = BYTES | {"attention": "dense", "rotary_seq_len_interpolation_factor": 2.0}
    _, config = import_model(tmp_path / "llama", tmp_path / "run", changes)
    assert config.model.rope_parameters == {"rope_type": "linear", "rope_theta": 500.0, "factor": 2}
    # Of the same kind, what is not given stays the model's.
    changes = BYTES | {"attention": "dense", "yarn_rotary_scaling_factor": 8.0}
    _, config = import_model(tmp_path / "llama", tmp_path / "more", changes)
    assert config.model.yarn_rotary_scaling_factor == 8 and config.model.yarn_mscale == 2
    two = {"rotary_ntk_factor": 2.0, "rope_scaling_factor": 2.0}
    with pytest.raises(UserError, match=r"different scalings .* the file of --config"):
        import_model(tmp_path / "llama", tmp_path / "two", BYTES | two)


@pytest.mark.parametrize(
    "kind, fields, reason",
    [
        (Qwen3ForCausalLM, Qwen3Config(**SMALL, attention_bias=True), "only one of"),
        (LlamaForCausalLM, LlamaConfig(**SMALL, attention_bias=True), "only one of"),
        (LlamaForCausalLM, LlamaConfig(**SMALL, hidden_act="gelu"), "not silu"),
    ],
    ids=["qwen3 biases", "biases", "activation"],
)
def test_what_our_model_has_not_is_refused(kind, fields, reason, tmp_path):
    kind(fields).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=reason):
        import_model(tmp_path / "model", tmp_path / "run", {"attention": "dense"} | BYTES)
    assert not (tmp_path / "run").exists()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        import_model(tmp_path, tmp_path / "run", {})
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="model type 'gpt2'; megalong reads longnet"):
        import_model(tmp_path, tmp_path / "run", {})
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        SafetensorsReader(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 2}')
    with pytest.raises(UserError, match="is not complete"):
        import_model(tmp_path, tmp_path / "run", {})
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--tokenizer-model x is given without --tokenizer-type"):
        import_model(tmp_path, tmp_path / "run", {"tokenizer_model": "x"})


def test_a_tokenizer_of_transformers_comes_along(tmp_path):
    _, _ = random_checkpoint(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    llama = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 258}))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.eos_token = "<eod>"
    tokenizer.backend_tokenizer.add_tokens(["\n\n"])  # not ours any more
    tokenizer.save_pretrained(tmp_path / "llama")
    _, config = import_model(tmp_path / "llama", tmp_path / "imported", {"attention": "dense"})
    assert config.data.tokenizer_type == "HuggingFaceTokenizer"
    shutil.rmtree(tmp_path / "llama")
    ids = AutoTokenizer.from_pretrained(config.data.tokenizer_model).encode("a\n\nb")
    # A checkpoint alone has it too.
    (tmp_path / "imported" / "iter_0000000").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "imported")
    export(tmp_path / "moved", tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert again.encode("a\n\nb") == ids and len(ids) == 3
    loaded = load_model(tmp_path / "moved", "cpu", torch.float32)
    assert loaded.encode("a\n\nb") == ids


@pytest.mark.parametrize("multiple, rows", [(None, 300), (128, 384)])
def test_rows_without_an_id_stay(multiple, rows, tmp_path):
    """257 ids, 300 rows: there and back with all of them, and with more where that is asked for."""
    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    llama.save_pretrained(tmp_path / "llama")
    changes = BYTES | {"attention": "dense"}
    changes |= {} if multiple is None else {"make_vocab_size_divisible_by": multiple}
    _, config = import_model(tmp_path / "llama", tmp_path / "run", changes)
    assert config.model.padded_vocab_size == rows
    export(tmp_path / "run", tmp_path / "out")
    back = stored_tensors(tmp_path / "out")
    for name, tensor in llama.state_dict().items():
        height = len(tensor)
        assert torch.equal(back[name][:height], tensor) and not back[name][height:].any()
    assert len(back["lm_head.weight"]) == rows


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    config = LlamaConfig(**SMALL | {"vocab_size": 200})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="200 rows in its vocabulary, and the tokenizer 257 ids"):
        import_model(tmp_path / "llama", tmp_path / "run", BYTES | {"attention": "dense"})
    assert not (tmp_path / "run").exists()
