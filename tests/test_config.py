"""How flags, YAML and defaults make a configuration."""

import pytest
import yaml

from megalong.attention import DilatedPattern
from megalong.config import TasksConfig
from megalong.config.arguments import build_parser, parse_arguments, to_yaml
from megalong.utils.errors import UserError
from tests.flags import NEEDED, resolve


def test_every_flag_has_help():
    for action in build_parser()._actions:
        assert action.help, action.option_strings
        assert "(default: (" not in action.help  # values as one types them


def test_help_shows_defaults_as_they_are_typed():
    text = " ".join(build_parser().format_help().split())
    for default in ("GELU (default: on)", "linear layers (default: off)", "traced (default: 0)"):
        assert default in text


def test_defaults_that_depend_on_others():
    config = resolve("--hidden-size", 512, "--num-attention-heads", 8, "--seq-length", 32768)
    assert config.model.kv_channels == 64
    assert config.model.num_query_groups == 8
    assert config.model.ffn_hidden_size == 1408  # 8/3 x 512, a multiple of 64
    assert resolve("--no-swiglu", "--hidden-size", 768).model.ffn_hidden_size == 3072
    assert config.attention.pattern(0) == DilatedPattern.geometric(32768)
    assert config.training.lr_decay_iters == config.training.train_iters
    assert resolve("--micro-batch-size", 3, ranks=4).training.global_batch_size == 12
    assert resolve("--zero-stage", 0).parallel.zero_stage == 1


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  num_layers: 3\n  hidden-size: 96\nlr: 6e-4\nsegment_lengths: [16, 64]\n"
        "dilation-rates: [1, 4]\nhead_offsets: [[0, 0], [0, 1]]\nswiglu: false\n"
    )
    config = parse_arguments(["--config", str(file), "--num-layers", "5", *NEEDED])
    assert config.model.num_layers == 5
    assert config.model.hidden_size == 96
    assert config.training.lr == 6e-4
    assert not config.model.swiglu
    assert config.attention.head_offsets == ((0, 0), (0, 1))
    assert config.attention.segment_lengths == (16, 64)


def test_whole_numbers_may_be_powers(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seq_length: 2**20\nsegment_lengths: [2048, 2**20]\ndilation_rates: [1, 512]\n")
    flags = ["--seq-length", "2**20", "--segment-lengths", "2Ki", "2**20"]
    typed = resolve(*flags, "--dilation-rates", 1, 512)
    assert typed.model.seq_length == 2**20 and typed.attention.segment_lengths == (2048, 2**20)
    assert resolve("--config", file) == typed


def test_the_resolved_configuration_reads_back(tmp_path):
    config = resolve("--head-offsets", "[[0,0],[0,1]]", "--num-attention-heads", 2,
                     "--segment-lengths", 8, 32, "--dilation-rates", 1, 2)  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse_arguments(["--config", str(file)]) == config
    assert parse_arguments(["--config", str(file)]).resolve(1) == config
    assert set(yaml.safe_load(file.read_text())) == set(vars(config))
    # Also once the memory path is settled.
    off = resolve("--memory-path", "off")
    file.write_text(to_yaml(off))
    assert parse_arguments(["--config", str(file)]).resolve(1) == off


def test_no_task_at_all_is_none(tmp_path):
    """An empty list in a file, say; otherwise defaults are filled in."""
    file = tmp_path / "run.yaml"
    file.write_text("eval_tasks: []")
    assert parse_arguments(["--config", str(file), *NEEDED]).resolve(1) == resolve()
    assert resolve("--eval-tasks", "copy").tasks == TasksConfig(
        ("copy",), "text", (8192,), 32, 1000
    )


def test_adamw_is_another_word_for_adam(tmp_path):
    """On the command line and in a file; no configuration has it."""
    (tmp_path / "run.yaml").write_text("optimizer: adamw")
    for flags in (["--optimizer", "adamw"], ["--config", str(tmp_path / "run.yaml")]):
        config = parse_arguments(flags)
        assert config == parse_arguments([]) and config.training.optimizer == "adam"


def test_what_starts_a_like_run_is_written_without_what_follows_from_it(tmp_path):
    given = parse_arguments(
        [*NEEDED, "--lr", "0.5", "--load", "old", "--segment-lengths", "8", "64", "--seed", "1234"]
    )
    file = tmp_path / "flags.yaml"
    file.write_text(to_yaml(given, leave_out="open"))
    like = parse_arguments(["--config", str(file), "--load", "old"])
    assert like == given and "global_batch_size" not in file.read_text()
    assert yaml.safe_load(file.read_text())["training"]["seed"] == 1234  # defaults may change
    assert yaml.safe_load(to_yaml(given, leave_out="defaults")) == {
        "attention": {"segment_lengths": [8, 64]},
        "training": {"lr": 0.5},
        "data": {"data_path": ["data"], "tokenizer_type": "ByteTokenizer"},
        "run": {"load": "old"},
    }


def test_matched_costs_are_within_two_percent_and_stay_when_they_are_read_again(tmp_path):
    config = resolve("--attention", "dilated", "local", "sparse", "--match-flops",
                     "--seq-length", 32768, "--num-layers", 3)  # fmt: skip
    heads = config.model.num_attention_heads
    pairs = [
        config.attention.pattern(layer).attention_pairs(32768, heads, heads, True)
        for layer in range(3)
    ]
    assert max(pairs) <= 1.02 * pairs[0] and min(pairs) >= 0.98 * pairs[0]
    assert config.attention.window_size != 2048
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse_arguments(["--config", str(file)]).resolve(1) == config


def test_the_objective():
    assert resolve().training.causal and resolve().training.mask_rate is None
    masked = resolve("--objective", "mlm").training
    with pytest.raises(UserError, match=r"xpos is for causal attention.*rope"):
        resolve("--objective", "mlm", "--position-embedding-type", "xpos")
    assert not masked.causal and masked.mask_rate == 0.15
    with pytest.raises(UserError, match=r"--mask-rate 0.3 .*set --objective mlm"):
        resolve("--mask-rate", 0.3)
    for rate in (0, 1, -0.1, 1.5):
        with pytest.raises(UserError, match=f"--mask-rate {rate} must lie between 0 and 1"):
            resolve("--objective", "mlm", "--mask-rate", rate)


def test_the_backend_of_the_attention():
    assert resolve().attention.attention_backend == "auto"
    assert resolve("--attention-backend", "sdpa").attention.attention_backend == "sdpa"
    with pytest.raises(UserError, match=r"--attention-backend: 'fast' is not one of .*reference"):
        resolve("--attention-backend", "fast")


def test_the_pieces_of_the_memory_path_follow_it_where_they_are_not_given():
    pieces = ("linear_cross_entropy", "tiled_mlp", "tiled_attention", "offload_activations")

    def given(*flags):
        memory = resolve(*flags).memory
        return [getattr(memory, name) for name in pieces]

    assert given() == [None] * 4  # decided when the memory is known
    assert given("--memory-path", "on") == [True] * 4
    assert given("--memory-path", "off") == [False] * 4
    assert given("--memory-path", "on", "--no-tiled-mlp") == [True, False, True, True]
    assert given("--memory-path", "off", "--tiled-attention") == [False, False, True, False]
    assert resolve("--memory-path", "on").memory.attention_head_groups == 4
    assert (
        resolve("--memory-path", "on", "--num-query-groups", "3").memory.attention_head_groups == 3
    )


def test_paths_and_weights_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data_path: [0.7, code=a, 0.3, b]\nvalid_data_path: c\n")
    data = parse_arguments(["--config", str(file)]).data
    assert data.data_path == ("0.7", "code=a", "0.3", "b") and data.valid_data_path == ("c",)
    file.write_text("data_path: [true]\n")
    with pytest.raises(UserError, match="data_path: expected a list of str"):
        parse_arguments(["--config", str(file)])
