"""Presets: what they are, what may be set beside them, and how many parameters they have."""

import tomllib

import pytest
import yaml

from megalong.config.arguments import parse_arguments, read_yaml
from megalong.config.files import ARCHITECTURE, FOLDER, preset_file, preset_names
from megalong.model.parameters import count_parameters
from megalong.utils.errors import UserError
from tests.launching import REPOSITORY

NEEDED = ["--data-path", "data", "--tokenizer-type", "ByteTokenizer"]


def given(*flags):
    return parse_arguments([*NEEDED, *map(str, flags)])


def parameters(name: str, vocabulary: int) -> int:
    return count_parameters(given("--preset", name).resolve(1).model, vocabulary).used


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_whole_model_that_can_be_trained(name):
    values = read_yaml(str(preset_file(name)))
    config = given("--preset", name)
    resolved = config.resolve(16)
    for field, value in vars(resolved.model).items():
        if field in ARCHITECTURE:
            assert values[field] == value, field  # said, and not left to a default
    assert config.training.global_batch_size * config.model.seq_length in (2**19, 2**20, 2**22)
    # As a file it is the same, and a copy of it may be changed.
    assert given("--config", preset_file(name)) == config
    assert given("--config", preset_file(name), "--num-layers", 2).model.num_layers == 2


# The paper's names are those of GPT-3's models (arXiv 2005.14165, table 2.1), and so are the sizes:
# rounded numbers of parameters, with GPT-2's vocabulary and 2048 learned positions counted.
@pytest.mark.parametrize(
    "name, millions", [("125m", 125.2), ("350m", 355.9), ("760m", 760.3), ("2.7b", 2651)]
)
def test_the_papers_sizes_are_those_of_gpt_3(name, millions):
    hidden = given("--preset", f"longnet-{name}").model.hidden_size
    count = parameters(f"longnet-{name}", vocabulary=50257) + 2048 * hidden
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    assert count / 1e6 == pytest.approx(2700 if name == "2.7b" else int(name[:-1]), rel=0.02)


@pytest.mark.parametrize(
    "name, millions", [("125m", 125), ("350m", 350), ("760m", 760), ("1.3b", 1300), ("7b", 7000)]
)
def test_the_llamas_have_the_sizes_of_their_names(name, millions):
    """With a vocabulary of 32,000."""
    count = parameters(f"longnet-llama-{name}", vocabulary=32000)
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_papers_hyperparameters():
    config = given("--preset", "longnet-125m").resolve(1)
    model, training = config.model, config.training
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (12, 768, 12)
    assert model.ffn_hidden_size == 3072 and model.sub_layer_norm
    assert model.position_embedding_type == "xpos"
    assert (training.lr, training.lr_warmup_iters, training.clip_grad) == (6e-4, 750, 2.0)
    assert config.attention.pattern(0).branches == (
        (2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12)
    )  # fmt: skip
    assert given("--preset", "longnet-2.7b").training.lr == 2e-4


def test_a_preset_is_below_the_file_and_the_flags(tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("lr: 0.5\nclip_grad: 7.0\nnum_layers: 12\n")
    config = given("--preset", "longnet-125m", "--config", file, "--lr", 0.25, "--seq-length", 8192)
    assert (config.training.lr, config.training.clip_grad, config.model.seq_length) == (
        0.25,
        7,
        8192,
    )
    assert config.training.lr_warmup_iters == 750 and config.model.hidden_size == 768
    dense = given("--preset", "longnet-125m", "--attention", "dense", "--num-layers", 12)
    assert dense.attention.attention == ("dense",)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--num-layers", 24],
            "--num-layers is 24, and of --preset longnet-125m 12: leave it out,",
        ),
        (["--no-sub-layer-norm"], "--sub-layer-norm is off, and of --preset longnet-125m on: "),
        (["--position-embedding-type", "rope"], "is rope, and of --preset longnet-125m xpos: "),
        (
            ["--seq-length", 65536],
            "set --seq-length 35694, or --xpos-scale-base 941, or take a preset with RoPE, longnet",
        ),
        (["--objective", "mlm"], "125m has xPos, which is for causal attention: with --objective"),
        (["--objective", "mlm", "--position-embedding-type", "rope"], "xPos, which is for causal"),
        (
            ["--segment-lengths", 2048, 32768],
            "--segment-lengths is given without --dilation-rates, and the branches of --preset"
            " longnet-125m are pairs, 2048/1 4096/2 8192/4 16384/6 32768/12: give both, or neither",
        ),
        (["--dilation-rates", 1, 2, 4, 8, 16], "--dilation-rates is given without --segment-"),
    ],
)
def test_what_contradicts_a_preset_is_refused(flags, message, tmp_path):
    with pytest.raises(UserError) as error:
        given("--preset", "longnet-125m", *flags).resolve(1)
    assert message in str(error.value) and "\n" not in str(error.value)
    if "leave" in message:
        assert f"copy {FOLDER / 'longnet-125m.yaml'}, change it there" in str(error.value)
        file = tmp_path / "other.yaml"
        file.write_text(yaml.safe_dump({flags[0][2:]: flags[1]}))
        with pytest.raises(UserError, match="--num-layers is 24, and of --preset"):
            given("--preset", "longnet-125m", "--config", file)


def test_a_longer_sequence_has_branches_up_to_its_length():
    """Else no token would see one of another segment."""
    longer = ["--preset", "longnet-llama-125m", "--seq-length", 131072]
    ladder = ((2048, 1), (8192, 4), (32768, 16), (131072, 64))
    assert given(*longer).resolve(1).attention.pattern(0).branches == ladder
    own = given(*longer, "--segment-lengths", 4096, "--dilation-rates", 1)
    assert own.attention.segment_lengths == (4096,)
    shorter = given("--preset", "longnet-125m", "--seq-length", 16384)
    assert shorter.attention == given("--preset", "longnet-125m").attention


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(
        UserError, match=r"'longnet-760' is not one of .*did you mean longnet-760m\?"
    ):
        given("--preset", "longnet-760")


def test_presets_are_installed():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["megalong"]
    found = {path for pattern in patterns for path in (REPOSITORY / "megalong").glob(pattern)}
    assert {preset_file(name) for name in preset_names()} <= found
