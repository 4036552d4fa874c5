"""A model of masked tokens in Transformers: it computes what Megatron-core's does, and padding
changes nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    pipeline,
)

from megalong.checkpoint.content import WEIGHTS, tensor_name
from megalong.checkpoint.manifest import DamagedCheckpoint
from megalong.checkpoint.reading import CheckpointReader
from megalong.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from megalong.data.tokenizers.tokenizer import ByteTokenizer, build_tokenizer
from megalong.hf.attention_longnet import bidirectional_attention, probabilities
from megalong.hf.configs import longnet_config
from megalong.hf.configuration_longnet import LongNetConfig
from megalong.hf.exporting import export
from megalong.hf.importing import import_model
from megalong.hf.loaded_model import load_model
from megalong.hf.modeling_longnet import LongNetForCausalLM, LongNetForMaskedLM
from megalong.hf.names import entries
from megalong.hf.parts_longnet import parts_of
from megalong.hf.tokenizer_files import export_tokenizer
from megalong.model.build import build_model
from megalong.model.parameters import EMBEDDING
from megalong.model.stage import named_parameters
from megalong.parallel import launch
from megalong.training.engine_state import load_checkpoint
from megalong.utils.errors import UserError
from tests.hf.models import (
    megatron_logits,
    megatron_model,
    random_checkpoint,
    random_tokens,
    resolved,
    stored_tensors,
)
from tests.hf.test_transformers import batch_of, sequences
from tests.launching import REPOSITORY, run_here

USER_DEFINED, CONTROL = ModelProto.SentencePiece.USER_DEFINED, ModelProto.SentencePiece.CONTROL

LADDERS = {"segment_lengths": "16 32 64", "dilation_rates": "1 2 3"}
SPARSE = {"sparse_block_size": 20, "sparse_columns": 3}
CASES = [
    {},
    LADDERS | {"num_query_groups": 1, "head_offsets": "block"},
    LADDERS | {"head_offsets": "[[0,0,0,0],[0,1,1,0],[2,1,0,2]]"},
    {"segment_lengths": "50 100", "dilation_rates": "3 7"},  # holes
    LADDERS | {"attention": "dense dilated", "untie_embeddings_and_output_weights": True},
    {"attention": "local sparse", "window_size": 30, **SPARSE},
]


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


def masked_model(mesh, **changes):
    """A bidirectional GPTModel and the same model for Transformers."""
    config = resolved(objective="mlm", **changes)
    ours = megatron_model(config, mesh)
    weights = {name: parameter.detach() for name, parameter in named_parameters(ours)}
    tokenizer = ByteTokenizer().with_mask()
    fields = longnet_config(config, tokenizer)
    theirs = LongNetForMaskedLM(LongNetConfig(**fields)).eval()
    state = {}
    for entry in entries(config.model, tokenizer.vocab_size):
        state |= entry.to_huggingface(weights[entry.name])
    theirs.load_state_dict(state, strict=False)
    return ours, theirs


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(map(str, changes.values())))
def test_logits_equal_megatrons_and_padding_changes_nothing(changes, mesh):
    ours, theirs = masked_model(mesh, **changes)
    rows = [random_tokens(1, length, seed=length)[0] for length in (128, 77, 3, 77)]
    tokens, mask = batch_of(rows, ["left", "right", "both", "left"])
    tokens = torch.where(mask.bool(), tokens, 65)
    with torch.no_grad():
        outputs = theirs(tokens, attention_mask=mask, output_attentions=True)
        for i, row in enumerate(rows):
            expected = megatron_logits(ours, row[None])[0]
            alone = theirs(row[None]).logits[0, :, :257]
            torch.testing.assert_close(alone, expected, rtol=0, atol=1e-4)
            padded = outputs.logits[i][mask[i].bool()][:, :257]
            torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
    assert expected.std() > 0.3 and outputs.logits.isfinite().all()
    for weights in outputs.attentions:  # none to or from the padding
        real = mask[:, None, :, None] * mask[:, None, None]
        assert (weights * (1 - real)).abs().max() == 0
        sums = weights.sum(-1)
        assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()


def test_attentions_are_what_the_output_is_made_of():
    for fields in (
        {"segment_lengths": [8, 20], "dilation_rates": [1, 3]},
        {"attention": "local", "window_size": 7},
        {"attention": "sparse", "sparse_block_size": 9, "sparse_columns": 2},
    ):
        config = LongNetConfig(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **fields
        )
        parts, counts = parts_of(config, 0), [31, 12, 0]
        q, k, v = (torch.randn(3, 31, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
        weights = probabilities(q, k, parts, False, counts)
        expected = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
        out = bidirectional_attention(q, k, v, parts, counts)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of random weights, and its export."""
    folder = tmp_path_factory.mktemp("masked")
    random_checkpoint(folder / "run", objective="mlm", **LADDERS)
    export(folder / "run", folder / "hf")
    return folder


def test_the_folder_fills_masks(exported):
    fill = pipeline("fill-mask", str(exported / "hf"), trust_remote_code=True)
    assert fill.tokenizer.mask_token == "<mask>" and fill.tokenizer.mask_token_id == 257
    found = fill("def <mask>(x):", top_k=3)
    assert len(found) == 3 and all(0 <= guess["token"] < 258 for guess in found)
    model = AutoModelForMaskedLM.from_pretrained(exported / "hf", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(exported / "hf")
    with torch.no_grad():
        inputs = tokenizer("def <mask>(x):", return_tensors="pt")
        best = model(**inputs).logits[0, 4].softmax(-1).topk(3)
    assert [guess["token"] for guess in found] == best.indices.tolist()
    # What Transformers fine-tunes it with.
    batch = DataCollatorForLanguageModeling(tokenizer)([tokenizer("a text"), tokenizer("another")])
    assert model(**batch).loss.isfinite() or (batch["labels"] == -100).all()
    card = (exported / "hf" / "README.md").read_text()
    assert (
        "pipeline_tag: fill-mask" in card and 'f"Once upon a {fill.tokenizer.mask_token}"' in card
    )
    assert not (exported / "hf" / "generation_config.json").exists()


def test_it_comes_back(exported):
    _, config = import_model(exported / "hf", exported / "imported", {})
    assert config.training.objective == "mlm" and config.data.tokenizer_type == "ByteTokenizer"
    export(exported / "imported", exported / "again")
    one, other = (stored_tensors(exported / name) for name in ("hf", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_causal_model_gets_a_row_for_the_mask_token(mesh, tmp_path):
    """All rows of its vocabulary have an id."""
    random_checkpoint(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    masked = {"objective": "mlm", "make_vocab_size_divisible_by": 128}
    with pytest.raises(UserError, match=r"257 rows .* set --make-vocab-size-divisible-by 128"):
        import_model(tmp_path / "hf", tmp_path / "imported", {"objective": "mlm"})
    checkpoint, config = import_model(tmp_path / "hf", tmp_path / "imported", masked)
    larger, rows = CheckpointReader(checkpoint), tensor_name(WEIGHTS, EMBEDDING)
    assert config.model.vocabulary_rows(258) == 384 == larger.shape(rows)[0]
    there = stored_tensors(tmp_path / "hf")["model.embed_tokens.weight"]
    assert torch.equal(larger.read(rows)[:257], there)

    # And where it was imported without, it is said how.
    checkpoint, config = import_model(tmp_path / "hf", tmp_path / "same", {})
    config = resolved(objective="mlm", make_vocab_size_divisible_by=1)
    engine = SimpleNamespace(mesh=mesh, model=build_model(config, 258, mesh))
    engine.optimizer = SimpleNamespace(moments=())
    with pytest.raises(DamagedCheckpoint, match=r"\(257, 64\) there.*--objective mlm --make-vocab"):
        load_checkpoint(CheckpointReader(checkpoint), engine, config)


def test_what_needs_a_causal_model_refuses_it(exported):
    said = r"masked-language model.*AutoModelForMaskedLM.*fill-mask"
    for name in ("run", "hf"):
        with pytest.raises(UserError, match=said):
            load_model(exported / name, "cpu", torch.float32)
    tool, model = REPOSITORY / "tools" / "generate.py", exported / "run"
    done = run_here(tool, "--prompt", "x", "--model", model, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    # Of Transformers, or, where it knows the causal model from another folder, of ours.
    with pytest.raises(ValueError, match=r"AutoModelFor(CausalLM|MaskedLM)"):
        AutoModelForCausalLM.from_pretrained(exported / "hf", trust_remote_code=True)
    fields = json.loads((exported / "hf" / "config.json").read_text())
    with pytest.raises(ValueError, match="load it with AutoModelForMaskedLM"):
        LongNetForCausalLM(LongNetConfig(**fields))
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        LongNetForMaskedLM(LongNetConfig(**fields | {"causal": True}))
    model = LongNetForMaskedLM(LongNetConfig(**fields))
    with pytest.raises(ValueError, match="no cache"):
        model.model(sequences(5)[0][None], use_cache=True)


@pytest.mark.parametrize("kind", [USER_DEFINED, CONTROL])
def test_a_sentencepiece_models_own_mask_token(kind, tmp_path):
    """Is taken, and stands for no text."""
    proto = ModelProto()
    proto.ParseFromString(train_sentencepiece(["the quick brown fox jumps " * 20], 300))
    proto.pieces.add(piece="<mask>", score=0, type=kind)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    source, folder = str(tmp_path / "tokenizer.model"), tmp_path / "hf"
    folder.mkdir()
    ours = export_tokenizer("SentencePieceTokenizer", source, folder, 128, with_mask=True)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.mask == theirs.mask_token_id == 300 == ours.vocab_size - 1 == len(theirs) - 1
    assert ours.token_bytes()[300] == 0
    ids = theirs("the quick <mask> fox")["input_ids"]
    assert ids == [*ours.encode("the quick"), 300, *ours.encode(" fox")]
    # Without masks a user-defined piece is text.
    plain = build_tokenizer("SentencePieceTokenizer", source)
    assert plain.decode(plain.encode("x <mask> y")) == "x <mask> y"
