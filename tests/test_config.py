"""Configurations of flags, YAML and defaults; what is odd in one, or does nothing, is told."""

import dataclasses

import pytest
import yaml

from megalong.attention import DilatedPattern
from megalong.config import TasksConfig, unused
from megalong.config.arguments import build_parser, parse_arguments, to_yaml
from megalong.config.model import scaling_oddities
from tests.recipe_file import NEEDED, resolve

YARN = "--yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 4096"


def read_back(config, file):
    file.write_text(to_yaml(config))
    return parse_arguments(["--config", str(file)])


def test_help_shows_every_flag_with_its_default_as_it_is_typed():
    for action in build_parser()._actions:
        assert action.help and "(default: (" not in action.help, action.option_strings
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
    assert resolve().training.mask_rate is None
    assert resolve("--objective", "mlm").training.mask_rate == 0.15
    assert resolve("--eval-tasks", "copy").tasks == TasksConfig(
        ("copy",), "text", (8192,), 32, 1000
    )
    assert parse_arguments(["--optimizer", "adamw"]) == parse_arguments([])
    for ranks in (1, 6):
        layout = resolve("--sequence-parallel-size", 2, ranks=2 * ranks).parallel
        assert layout.data_parallel_size(2 * ranks) == ranks


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  num_layers: 3\n  hidden-size: 96\nlr: 6e-4\nsegment_lengths: [16, 64]\n"
        "dilation-rates: [1, 4]\nhead_offsets: [[0, 0], [0, 1]]\nswiglu: false\n"
        "eval_tasks: []\noptimizer: adamw\n"
    )
    config = resolve("--config", file, "--num-layers", 5, "--num-attention-heads", 2)
    assert (config.model.num_layers, config.model.hidden_size) == (5, 96)
    assert (config.training.lr, config.training.optimizer) == (6e-4, "adam")
    assert not config.model.swiglu and config.tasks.eval_tasks is None
    assert config.attention.head_offsets == ((0, 0), (0, 1))
    assert config.attention.segment_lengths == (16, 64)


def test_words_that_yaml_takes_for_other_types(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seq_length: 2**20\nsegment_lengths: [2048, 2**20]\ndilation_rates: [1, 512]\n")
    flags = ["--seq-length", "2**20", "--segment-lengths", "2Ki", "2**20"]
    typed = resolve(*flags, "--dilation-rates", 1, 512)
    assert typed.model.seq_length == 2**20 and typed.attention.segment_lengths == (2048, 2**20)
    assert resolve("--config", file) == typed
    file.write_text("data_path: [0.7, code=a, 0.3, b]\nvalid_data_path: c\n")
    data = parse_arguments(["--config", str(file)]).data
    assert data.data_path == ("0.7", "code=a", "0.3", "b") and data.valid_data_path == ("c",)


def test_the_resolved_configuration_reads_back(tmp_path):
    config = resolve("--head-offsets", "[[0,0],[0,1]]", "--num-attention-heads", 2,
                     "--segment-lengths", 8, 32, "--dilation-rates", 1, 2)  # fmt: skip
    again = read_back(config, tmp_path / "config.yaml")
    assert again == config and again.resolve(1) == config
    assert set(yaml.safe_load(to_yaml(config))) == set(vars(config))
    off = resolve("--memory-path", "off")  # once the memory path is settled, too
    assert read_back(off, tmp_path / "config.yaml").resolve(1) == off


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
    assert read_back(config, tmp_path / "config.yaml").resolve(1) == config


@pytest.mark.parametrize("block, told", [(2048, False), (16384, True)])
def test_a_block_that_matched_costs_change_is_told(block, told):
    flags = ["--attention", "sparse", "--match-flops", "--seq-length", 32768]
    config = resolve(*flags, "--sparse-block-size", block).attention
    given = dataclasses.replace(config, sparse_block_size=block)
    lines = given.changed_by_matching(config)
    assert bool(lines) == told == (config.sparse_block_size != block)
    assert all(f"--sparse-block-size {block}" in line for line in lines)


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
    for heads, groups in ((12, 4), (3, 3)):
        memory = resolve("--memory-path", "on", "--num-query-groups", heads).memory
        assert memory.attention_head_groups == groups


@pytest.mark.parametrize(
    "flags, told",
    [
        ("", None),
        ("--rope-scaling-factor 4", "--rope-original-length 8192: --seq-length 512 is not beyond"),
        ("--rope-scaling-factor 4 --rope-original-length 128", None),
        (f"{YARN} --seq-length 16384", None),
        (f"{YARN} --seq-length 16385", "--seq-length 16385 is beyond 16384, as far as that"),
        ("--yarn-rotary-scaling-factor 1", None),
    ],
)
def test_scalings_that_fit_badly_are_told(flags, told):
    lines = scaling_oddities(resolve("--seq-length", 512, *flags.split()).model)
    assert len(lines) == (told is not None)
    assert not lines or told in lines[0]


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--segment-lengths 16 64 128 --dilation-rates 1 4 8", "--segment-lengths 128"),
        ("--segment-lengths 16 64 128 --dilation-rates 1 4 8 --attention dense", None),
        ("--segment-lengths 16 32 --dilation-rates 1 4", "beyond its segment of 32"),
        ("--segment-lengths 16 32 --dilation-rates 1 4 --attention dilated dense", None),
        ("--attention local --window-size 64", "local attention is dense"),
        ("--attention dense --window-size 7", "--window-size is of local attention, which"),
        ("", None),
    ],
)
def test_patterns_that_are_hardly_meant_are_told(flags, told):
    lines = resolve("--seq-length", 64, *flags.split()).attention.oddities(64)
    assert len(lines) == (told is not None)
    assert not lines or told in lines[0]


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--memory-path off", ["--tile-size", "--loss-chunk-size", "--attention-head-groups"]),
        ("--memory-path on --no-tiled-attention", ["--attention-head-groups"]),
        ("--memory-path on", []),
        ("--memory-path on --recompute-granularity selective", ["--recompute-granularity"]),
    ],
)
def test_settings_of_memory_that_do_nothing_are_told(flags, told):
    sizes = ["--tile-size", "512", "--loss-chunk-size", "512", "--attention-head-groups", "2"]
    given = parse_arguments([*NEEDED, *sizes, *flags.split()])
    settled = given.resolve(1)
    lines = given.memory.unused(settled.memory, settled.parallel)
    assert [line.split()[0] for line in lines] == told


@pytest.mark.parametrize("flags", ["--offload-activations", "--memory-path on"])
def test_that_nothing_is_offloaded_on_a_cpu_is_said(flags):
    given = parse_arguments([*NEEDED, *flags.split()])
    memory = given.memory.with_pieces(True, (of := given.resolve(1)).model, of.parallel)
    on_cpu = dataclasses.replace(memory, offload_activations=False)
    [line] = given.memory.unused(on_cpu, of.parallel)
    assert line.startswith("--offload-activations is not used: on a CPU")
    assert not given.memory.unused(memory, of.parallel)


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--optimizer muon --muon-momentum 0.5 --adam-beta2 0.9", []),
        (
            "--muon-momentum 0.5 --no-muon-nesterov --sgd-momentum 0.1",
            ["--sgd-momentum 0.1", "--muon-momentum 0.5", "--muon-nesterov off"],
        ),
        (
            "--lr-decay-style constant --min-lr 1e-5 --lr-decay-iters 5 --lr-decay-power 2",
            ["--min-lr 1e-05", "--lr-decay-iters 5", "--lr-decay-power 2.0"],
        ),
        ("--loss-scale 8", ["--loss-scale 8.0"]),
        ("--loss-scale 8 --precision fp16", []),
        ("--xpos-scale-base 9", ["--xpos-scale-base 9"]),
        ("--position-embedding-type none --rotary-base 7", ["--rotary-base 7.0"]),
        ("--use-checkpoint-opt-param-scheduler", ["--use-checkpoint-opt-param-scheduler"]),
        ("--use-checkpoint-opt-param-scheduler --load-fallback --load run", []),
    ],
)
def test_settings_that_do_nothing_are_told(flags, told):
    found = unused(parse_arguments([*NEEDED, *flags.split()]))
    assert [line.partition(" is not used: ")[0] for line in found] == told
