"""Presets: what they are, what may be set beside them, and how many parameters they have."""

import tomllib

import pytest
import yaml

from megalong.config.arguments import read_yaml
from megalong.config.files import ARCHITECTURE, FOLDER, preset_file, preset_names
from megalong.model.parameters import count_parameters
from megalong.utils.errors import UserError
from tests.launching import REPOSITORY
from tests.recipe_file import resolve


def given(*flags):
    return resolve(*flags, ranks=None)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_whole_model_that_can_be_trained(name):
    values = read_yaml(str(preset_file(name)))
    config = given("--preset", name)
    for field, value in vars(config.resolve(16).model).items():
        if field in ARCHITECTURE:
            assert values[field] == value, field  # said, and not left to a default
    assert config.training.global_batch_size * config.model.seq_length in (2**19, 2**20, 2**22)
    # As a file it is the same, and a copy of it may be changed.
    assert given("--config", preset_file(name)) == config
    assert given("--config", preset_file(name), "--num-layers", 2).model.num_layers == 2


# The paper's names are those of GPT-3's models (arXiv 2005.14165, table 2.1), and so are the sizes:
# rounded numbers of parameters, with GPT-2's vocabulary and 2048 learned positions counted. Those
# of the Llamas are with a vocabulary of 32,000.
@pytest.mark.parametrize(
    "name, vocabulary, positions, millions",
    [
        ("longnet-125m", 50257, 2048, 125.2), ("longnet-350m", 50257, 2048, 355.9),
        ("longnet-760m", 50257, 2048, 760.3), ("longnet-2.7b", 50257, 2048, 2651),
        ("longnet-llama-125m", 32000, 0, 125), ("longnet-llama-350m", 32000, 0, 350),
        ("longnet-llama-760m", 32000, 0, 760), ("longnet-llama-1.3b", 32000, 0, 1300),
        ("longnet-llama-7b", 32000, 0, 7000),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_names(name, vocabulary, positions, millions):
    model = resolve("--preset", name).model
    count = count_parameters(model, vocabulary).used + positions * model.hidden_size
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_papers_hyperparameters():
    config = resolve("--preset", "longnet-125m")
    model, training = config.model, config.training
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (12, 768, 12)
    assert model.ffn_hidden_size == 3072 and model.sub_layer_norm
    assert model.position_embedding_type == "xpos"
    assert (training.lr, training.lr_warmup_iters, training.clip_grad) == (6e-4, 750, 2.0)
    assert config.attention.pattern(0).branches == (
        (2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12)
    )  # fmt: skip


def test_a_preset_is_below_the_file_and_the_flags(tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("lr: 0.5\nclip_grad: 7.0\nnum_layers: 12\nattention: dense\n")
    config = given("--preset", "longnet-125m", "--config", file, "--lr", 0.25, "--seq-length", 8192)
    training, model = config.training, config.model
    assert (training.lr, training.clip_grad, training.lr_warmup_iters) == (0.25, 7, 750)
    assert (model.seq_length, model.hidden_size) == (8192, 768)
    assert config.attention.attention == ("dense",)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-layers 24", "--num-layers is 24, and of --preset longnet-125m 12: leave it out"),
        ("--no-sub-layer-norm", "--sub-layer-norm is off, and of --preset longnet-125m on"),
        ("--seq-length 65536", "--seq-length 35694, or --xpos-scale-base 941, or take a preset"),
        ("--objective mlm", "--preset longnet-125m has xPos"),
        ("--objective mlm --position-embedding-type rope", "--preset longnet-125m has xPos"),
        ("--segment-lengths 2048 32768", "--segment-lengths is given without --dilation-rates"),
        ("--dilation-rates 1 2 4 8 16", "--dilation-rates is given without --segment-lengths"),
    ],
)
def test_what_contradicts_a_preset_is_refused(flags, words, tmp_path):
    with pytest.raises(UserError) as error:
        resolve("--preset", "longnet-125m", *flags.split())
    assert words in str(error.value) and "\n" not in str(error.value)
    if flags == "--num-layers 24":
        assert f"copy {FOLDER / 'longnet-125m.yaml'}" in str(error.value)
        file = tmp_path / "other.yaml"
        file.write_text(yaml.safe_dump({"num-layers": 24}))
        with pytest.raises(UserError, match="--num-layers is 24, and of --preset"):
            given("--preset", "longnet-125m", "--config", file)


def test_a_longer_sequence_has_branches_up_to_its_length():
    """Else no token would see one of another segment."""
    longer = ["--preset", "longnet-llama-125m", "--seq-length", 131072]
    ladder = ((2048, 1), (8192, 4), (32768, 16), (131072, 64))
    assert resolve(*longer).attention.pattern(0).branches == ladder
    own = given(*longer, "--segment-lengths", 4096, "--dilation-rates", 1)
    assert own.attention.segment_lengths == (4096,)
    shorter = given("--preset", "longnet-125m", "--seq-length", 16384)
    assert shorter.attention == given("--preset", "longnet-125m").attention


def test_presets_are_installed():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["megalong"]
    found = {path for pattern in patterns for path in (REPOSITORY / "megalong").glob(pattern)}
    assert {preset_file(name) for name in preset_names()} <= found
