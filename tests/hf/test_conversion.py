"""There and back: checkpoints to Transformers' folders, and those to checkpoints."""

import dataclasses
import inspect
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    pipeline,
)

import megalong.attention.pattern
from megalong.checkpoint import writing
from megalong.checkpoint.folder import checkpoint_folder, remove_old
from megalong.checkpoint.reading import StoredModel
from megalong.checkpoint.writing import write_first_checkpoint
from megalong.hf.exporting import export
from megalong.hf.importing import import_model
from megalong.hf.names import check_names, check_vocabulary, entries
from megalong.model.parameters import count_parameters
from megalong.utils.errors import UserError
from tests.hf.models import (
    VOCAB_SIZE,
    huggingface_model,
    random_checkpoint,
    random_tokens,
    resolved,
    stored_tensors,
)

VARIANTS = [
    {},
    {"num_query_groups": 4, "untie_embeddings_and_output_weights": True, "precision": "bf16"},
    {"normalization": "LayerNorm", "no_swiglu": True, "add_bias_linear": True},
    {"head_offsets": "[[0,0,0,0],[0,1,1,0],[2,1,0,2]]", "position_embedding_type": "none"},
    {"attention": "dense", "head_offsets": "layer", "kv_channels": 32},
    {"position_embedding_type": "xpos", "xpos_scale_base": 100},
    {
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "rope_scaling_factor": 4.0,
        "sub_layer_norm": True,
    },
    {
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 40,
        "yarn_mscale": 0.8,
        "yarn_mscale_all_dim": 0.5,
        "no_yarn_correction_range_round_to_int": True,
        "yarn_beta_fast": 3.0,
    },
    {"rotary_seq_len_interpolation_factor": 4.0, "rotary_base": 500.0},
]


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: " ".join(map(str, c)) or "defaults")
def test_there_and_back_every_tensor_is_the_same(changes, tmp_path):
    config, weights = random_checkpoint(tmp_path / "run", **changes)
    export(tmp_path / "run", tmp_path / "hf", max_shard_size="60KB")
    _, back = import_model(tmp_path / "hf", tmp_path / "imported", {})
    export(tmp_path / "imported", tmp_path / "again")
    assert_equal_tensors(stored_tensors(tmp_path / "hf"), stored_tensors(tmp_path / "again"))
    assert back.attention == config.attention
    assert back.model.rope_parameters == config.model.rope_parameters
    assert back.model.make_vocab_size_divisible_by == 1  # 257 ids: none can be added
    if config.training.precision == "fp32":
        reader = StoredModel(tmp_path / "imported")
        for name, weight in weights.items():
            height = reader.shapes[name][0]
            assert torch.equal(reader.read(name), weight[:height]), name


NO_POSITIONS = {"position_embedding_type": "none", "kv_channels": 15}  # no pairs to be turned


@pytest.mark.parametrize(
    "changes",
    [*VARIANTS[:2], VARIANTS[-2], NO_POSITIONS],
    ids=["tied", "untied", "yarn", "no positions"],
)
def test_auto_classes_load_the_folder(changes, tmp_path):
    config, weights = random_checkpoint(tmp_path / "run", **changes)
    export(tmp_path / "run", tmp_path / "hf", dtype="float32", max_shard_size="60KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {p.name for p in (tmp_path / "hf").glob("*.safetensors")}
    for file in files:
        assert sum(x.nbytes for x in load_file(tmp_path / "hf" / file).values()) <= 66_000
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, attn_implementation="sdpa"
    )
    assert model.dtype == torch.float32 and type(model).__name__ == "LongNetForCausalLM"
    # All of its code is the folder's, the pattern's too, of which there is one file for both sides.
    pattern = inspect.getmodule(inspect.getmodule(type(model.config)).DilatedPattern)
    assert pattern.__name__.startswith("transformers_modules.")
    assert inspect.getsource(pattern) == inspect.getsource(megalong.attention.pattern)
    tokens = random_tokens(1, 150)
    with torch.no_grad():
        expected = huggingface_model(config, weights)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
    assert (model.config.rope_parameters is None) == (changes is NO_POSITIONS)
    model.save_pretrained(tmp_path / "saved")  # as after fine-tuning
    with pytest.raises(UserError, match="is no earlier export"):
        export(tmp_path / "run", tmp_path / "saved", overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    import_model(tmp_path / "saved", tmp_path / "imported", {"tokenizer_type": "ByteTokenizer"})


def test_pipeline_and_the_model_card(tmp_path):
    random_checkpoint(tmp_path / "run", precision="bf16")
    export(tmp_path / "run", tmp_path / "hf")
    generate = pipeline("text-generation", str(tmp_path / "hf"), trust_remote_code=True)
    assert generate.model.dtype == torch.bfloat16
    prompts = ["def f(x):", "a much longer prompt than the other one"]
    texts = generate(prompts, batch_size=2, max_new_tokens=6)
    for prompt, (text,) in zip(prompts, texts, strict=True):
        assert text["generated_text"].startswith(prompt)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "run/iter_0000000" in card and "32/1, 64/2, 128/3" in card
    assert "num_layers: 2" in card and "library_name: transformers" in card
    assert str(tmp_path) not in card
    weights = tmp_path / "hf" / "model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "hf" / "config.json").stat().st_mode
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["megalong"]["iteration"] == 0 and "torch" in config["megalong"]["versions"]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: " ".join(map(str, c)) or "defaults")
def test_the_export_counts_the_parameters_as_training_does(changes, tmp_path):
    config, _ = random_checkpoint(tmp_path / "run", **changes)
    said = export(tmp_path / "run", tmp_path / "hf")["parameters"]
    count = count_parameters(config.model, VOCAB_SIZE)
    assert said == str(count) and said in (tmp_path / "hf" / "README.md").read_text()
    assert count.used == sum(x.numel() for x in stored_tensors(tmp_path / "hf").values())
    tied = not changes.get("untie_embeddings_and_output_weights")
    assert ("counted once" in said) == tied and f"without {count.padding:,} that fill up" in said


def test_an_export_overwrites_nothing_and_leaves_nothing_half_done(tmp_path):
    config, weights = random_checkpoint(tmp_path / "run")
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(UserError, match="--max-shard-size lots"):
        export(tmp_path / "run", tmp_path / "hf", max_shard_size="lots")
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    for output, text in (
        ("hf", None),
        ("hf", '{"model_type": "llama"}'),
        ("hf", '{"megalong": {}, "transformers_version": "5.0"}'),  # our export, fine-tuned
        ("link", '{"megalong": {}}'),
    ):
        if text is not None:
            (tmp_path / "hf" / "config.json").write_text(text)
        with pytest.raises(UserError, match="is no earlier export"):
            export(tmp_path / "run", tmp_path / output, overwrite=True)
    (tmp_path / "hf" / "checkpoint-500").mkdir()
    with pytest.raises(UserError, match="there is more in it"):
        export(tmp_path / "run", tmp_path / "hf", overwrite=True)
    gone = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "gone.model"}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **gone))
    (tmp_path / "other").mkdir()
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    write_first_checkpoint(tmp_path / "other", config, shapes, weights.__getitem__)
    with pytest.raises(UserError, match=r"--tokenizer-model"):
        export(tmp_path / "other", tmp_path / "hf2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "link", "other", "run"]


def test_values_that_a_dtype_does_not_hold_are_refused(tmp_path):
    config, weights = random_checkpoint(tmp_path / "run")
    weights["decoder.final_layernorm.weight"][3] = 1e6
    (tmp_path / "large").mkdir()
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    write_first_checkpoint(tmp_path / "large", config, shapes, weights.__getitem__)
    with pytest.raises(UserError, match=r"model\.norm\.weight has values .* another --dtype"):
        export(tmp_path / "large", tmp_path / "hf", dtype="float16")
    export(tmp_path / "large", tmp_path / "hf", dtype="bfloat16")
    with pytest.raises(UserError, match=r"has values"):
        export(tmp_path / "large", tmp_path / "hf", dtype="float16", overwrite=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    killed = tmp_path / "hf.replaced" / "left"  # by one that was ended while it removed this
    killed.mkdir(parents=True)
    export(tmp_path / "large", tmp_path / "hf", dtype="float32", overwrite=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "large", "run"]


# The name table's errors.


def test_unknown_missing_and_misshaped_tensors_are_named():
    with pytest.raises(UserError, match="x has no tensor b:"):
        check_names("x", ["a", "b"], ["a"])
    with pytest.raises(UserError, match="x has an unknown tensor c, d, e and 1 more:"):
        check_names("x", ["a"], "acdef")
    table = entries(resolved().model, VOCAB_SIZE)
    with pytest.raises(UserError, match=r"of 257 ids is not that of run, whose .* 640 rows"):
        check_vocabulary("run", table, VOCAB_SIZE, {table[0].name: (640, 64)})
    check_vocabulary("run", table, VOCAB_SIZE, {table[0].name: table[0].shape})
    entry = table[0]
    with pytest.raises(UserError, match=r"embedding.*\(3, 4\).*\(384, 64\)"):
        entry.to_huggingface(torch.zeros(3, 4))
    with pytest.raises(UserError, match=r"model.embed_tokens.*\(3, 4\).*\(257, 64\)"):
        entry.to_megalong({"model.embed_tokens.weight": torch.zeros(3, 4)})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "has an unknown tensor extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"model.norm.weight has shape \(7,\)",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(257, 64)}), "differs from"),
    ],
    ids=["missing", "unknown", "misshaped", "tied"],
)
def test_a_folder_that_is_not_right_is_refused(damage, message, tmp_path):
    random_checkpoint(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "hf", tmp_path / "imported", {})
    assert not (tmp_path / "imported" / "latest").exists()


def test_a_checkpoint_that_is_not_right_is_refused(tmp_path):
    config, weights = random_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        StoredModel(tmp_path)
    weights["decoder.layers.0.mlp.router.weight"] = torch.zeros(1)
    (tmp_path / "other").mkdir()
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    write_first_checkpoint(tmp_path / "other", config, shapes, weights.__getitem__)
    with pytest.raises(UserError, match=r"unknown tensor decoder\.layers\.0\.mlp\.router"):
        export(tmp_path / "other", tmp_path / "hf")


def test_a_flipped_byte_is_found_before_anything_is_written(tmp_path):
    random_checkpoint(tmp_path / "run")
    [path] = (tmp_path / "run" / "iter_0000000").glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not what was written"):
        export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_what_is_read_is_not_removed_meanwhile(tmp_path):
    random_checkpoint(tmp_path / "run")
    stored = StoredModel(tmp_path / "run")
    newer = checkpoint_folder(tmp_path / "run", 5)
    shutil.copytree(stored.folder, newer)
    remove_old(newer, keep_last=1, keep_every=None)
    assert stored.folder.exists()
    del stored
    remove_old(newer, keep_last=1, keep_every=None)
    assert [path.name for path in (tmp_path / "run").glob("iter_*")] == ["iter_0000005"]


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """An import is written without holding on to what is written already."""
    made, original = [], writing._MakeWhenWritten.resolve_data

    def watched(self, item):
        tensor = original(self, item)
        assert all(earlier.untyped_storage().nbytes() == 0 for earlier in made)
        made.append(tensor)
        return tensor

    monkeypatch.setattr(writing._MakeWhenWritten, "resolve_data", watched)
    _, weights = random_checkpoint(tmp_path / "run")
    assert len(made) == len(weights)
    stored = StoredModel(tmp_path / "run")
    assert all(torch.equal(stored.read(name), weight) for name, weight in weights.items())
