"""Rotary positions of Transformers' files, of all versions, and those that are refused."""

import pytest

from megalong.config import ModelConfig
from megalong.hf.configs import rotary_values
from megalong.utils.errors import UserError

LENGTH = {"max_position_embeddings": 64}
FOUR = {"rope_type": "yarn", "factor": 4.0}
YARN = {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rotary_base": 5e5},
        {"rotary_seq_len_interpolation_factor": 2.5},
        {"rope_scaling_factor": 32.0, "rope_original_length": 4096},
        {"rope_scaling_factor": 4.0, "rope_low_freq_factor": 0.5, "rope_high_freq_factor": 8.0},
        YARN,
        YARN | {"yarn_attention_factor": 1.2, "yarn_correction_range_round_to_int": False},
        YARN | {"yarn_mscale": 0.7, "yarn_mscale_all_dim": 1.0, "yarn_beta_fast": 16.0},
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_there_and_back(fields):
    model = ModelConfig(kv_channels=64, **fields)
    values = rotary_values({"rope_parameters": model.rope_parameters}, "file")
    assert ModelConfig(kv_channels=64, **values) == model


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rotary_base": 5e5}),
        ({"rope_theta": None}, {"rotary_base": 10000.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rotary_base": 10000.0, "rotary_seq_len_interpolation_factor": 2.0},
        ),
        # No factor, but two lengths; and one mscale alone, which Transformers passes over.
        (
            {
                "max_position_embeddings": 8192,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": None,
                    "mscale": 0.7,
                    "beta_fast": None,
                    "original_max_position_embeddings": 4096,
                },
            },
            {"yarn_rotary_scaling_factor": 2.0, "yarn_beta_fast": 32.0},
        ),
        # The length before the scaling: beside the scaling, or that of the model.
        (
            {
                "max_position_embeddings": 8192,
                "original_max_position_embeddings": 1024,
                "rope_parameters": {"rope_type": "llama3", "factor": 2.0},
            },
            {"rope_scaling_factor": 2.0, "rope_original_length": 1024},
        ),
        (
            {
                "max_position_embeddings": 8192,
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
            },
            {"yarn_original_max_position_embeddings": 8192},
        ),
    ],
)
def test_files_of_all_versions(config, expected):
    values = rotary_values(config, "file")
    assert expected.items() <= values.items() and "yarn_mscale" not in values


@pytest.mark.parametrize(
    "rope, words",
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "set --rotary-ntk-factor for training beyond",
        ),
        ({"rope_type": "longrope"}, "other frequencies for inputs up to the original length"),
        (
            {"rope_type": "proportional"},
            "has those of plain RoPE, linear, llama3 and yarn",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"mrope_section": [8, 12, 12]}, "kind default have mrope_section"),
        ({"sliding_attention": {"rope_type": "default"}}, "layers of the kinds sliding_attention"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4},
            "high_freq_factor is 4, and has to be more than low_freq_factor, 4$",
        ),
        # Numbers that are none, or wrong, in the words of the file.
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', and has to be a number above 0$"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5, .* a number of at least 1$"),
        (FOUR | {"factor": True}, "factor is True, and has to be a number of at least 1$"),
        (FOUR | {"original_max_position_embeddings": -4}, "original_max_position_embeddings is -4"),
        (FOUR | {"beta_fast": 1}, "beta_fast is 1, and has to be more than beta_slow, 1$"),
        (FOUR | {"attention_factor": 0}, "attention_factor is 0, and has to be a number above 0$"),
        (FOUR | {"mscale": 1, "mscale_all_dim": "x"}, "mscale_all_dim is 'x', and has to be"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_others_are_refused(rope, words):
    with pytest.raises(UserError, match=words) as error:
        rotary_values({"rope_parameters": rope, **LENGTH}, "the file")
    assert str(error.value).startswith("the file: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_scaling_without_its_factor_is_an_error(kind):
    config = {"rope_parameters": {"rope_type": kind}, **LENGTH}
    with pytest.raises(
        UserError, match=f"^file: rotary positions of the kind {kind} have no fac"
    ) as e:
        rotary_values(config, "file")
    # Unless the flag that it names is set.
    flag = str(e.value).rpartition("or set --")[2].replace("-", "_")
    assert rotary_values(config, "file", [flag])[flag] == 1.0


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}, FOUR | {"unknown": 1}],
)
def test_a_scaling_may_take_the_place_of_any_other(rope):
    config = {"rope_scaling": rope, "rope_theta": 5e5, **LENGTH}
    with pytest.raises(UserError):
        rotary_values(config, "file")
    assert rotary_values(config, "file", ["rotary_ntk_factor"]) == {"rotary_base": 5e5}
    partial = config | {"partial_rotary_factor": 0.5}
    with pytest.raises(UserError, match=r"partial_rotary_factor is 0\.5"):
        rotary_values(partial, "file", ["rotary_ntk_factor"])
    # Of its own kind it takes the factor's place alone.
    values = rotary_values({"rope_scaling": FOUR, **LENGTH}, "file", ["yarn_rotary_scaling_factor"])
    assert values["yarn_original_max_position_embeddings"] == 64
