"""Flags, YAML, defaults, and the refusals: each names what is wrong and what to set."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from megalong.attention import DilatedPattern
from megalong.config import ModelConfig, TasksConfig, world_size
from megalong.config.arguments import build_parser, config_from_values, parse_arguments, to_yaml
from megalong.config.model import longest_xpos
from megalong.errors import UserError

OFFLOAD = Path(__file__).parent / "training" / "offload.json"

YARN = "--yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 4096"
NEEDED = ["--data-path", "data", "--tokenizer-type", "ByteTokenizer"]


def resolve(*flags: str, ranks: int = 1):
    return parse_arguments([*NEEDED, *map(str, flags)]).resolve(ranks)


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


@pytest.mark.parametrize(
    "text, message",
    [
        ("num_layer: 3", "num_layer: unknown key; did you mean num_layers?"),
        ("reset-attention-mask: true", "set --document-attention isolated"),
        ("training:\n  num_layers: 3", "belongs to the section model"),
        ("num_layers: 3\nmodel:\n  num-layers: 3", "given twice"),
        ("num_layers: many", "expected int, found 'many'"),
        ("num_layers: true", "expected int, found True"),
        ("num_layers:", "has no value"),
        ("swiglu: 1", "expected bool, found 1"),
        ("lr: fast", "expected float, found 'fast'"),
        ("precision: fp8", "'fp8' is not one of fp32, bf16, fp16"),
        ("segment_lengths: 2048", "expected a list of int"),
        ("model: 3", "model is a section"),
        ("just words", "expected `name: value` lines"),
        ("head_offsets: 5", "expected a word or a table"),
        ("a: [1, 2", "not YAML"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(file)])
    assert str(file) in str(error.value) and message in str(error.value)


def test_no_task_at_all_is_none(tmp_path):
    """An empty list in a file, say; otherwise defaults are filled in."""
    file = tmp_path / "run.yaml"
    file.write_text("eval_tasks: []")
    assert parse_arguments(["--config", str(file), *NEEDED]).resolve(1) == resolve()
    assert resolve("--eval-tasks", "copy").tasks == TasksConfig(
        ("copy",), "text", (8192,), 32, 1000
    )


def test_a_missing_yaml_is_named():
    with pytest.raises(UserError, match=r"--config no.yaml: No such file"):
        parse_arguments(["--config", "no.yaml"])


@pytest.mark.parametrize(
    "flags, ranks, message",
    [
        ("--hidden-size 100 --num-attention-heads 3", 1, "--hidden-size 100 does not divide"),
        ("--num-attention-heads 12 --num-query-groups 5", 1, "--num-query-groups 5"),
        ("--kv-channels 33", 1, "even --kv-channels"),
        ("--global-batch-size 6 --micro-batch-size 2", 2, "set --global-batch-size 8"),
        ("--micro-batch-size 0", 1, "--micro-batch-size 0 must be positive"),
        ("--eval-task-interval 5", 1, "--eval-task-interval is about tasks: set --eval-tasks"),
        ("--eval-task-lengths 64", 1, "--eval-task-lengths is about tasks: set --eval-tasks"),
        ("--eval-task-samples 8", 1, "--eval-task-samples is about tasks: set --eval-tasks"),
        ("--eval-task-style ids", 1, "--eval-task-style is about tasks: set --eval-tasks"),
        ("--eval-tasks copy --eval-task-samples 0", 1, "--eval-task-samples 0 must be positive"),
        ("--eval-tasks copy --eval-task-interval 0", 1, "--eval-task-interval 0 must be positive"),
        (
            "--eval-tasks copy --eval-task-lengths 9000",
            1,
            "--eval-task-lengths 9000 is longer than --seq-length 8192",
        ),
        ("--eval-tasks copy --objective mlm", 1, "with --objective mlm leave them out"),
        ("--num-layers -1", 1, "--num-layers -1 must be positive"),
        ("--segment-lengths 8 16 --dilation-rates 1", 1, "has 2 values and --dilation-rates 1"),
        ("--segment-lengths 8 16", 1, "--segment-lengths is given without --dilation-rates"),
        ("--dilation-rates 8 16", 1, "--dilation-rates is given without --segment-lengths"),
        (
            "--segment-lengths 8 --dilation-rates 0",
            1,
            "--dilation-rates 0: each must be at least 1",
        ),
        (
            "--segment-lengths 8 64 --dilation-rates 1 65",
            1,
            "--dilation-rates 65 is above its segment length 64, of which one position at most",
        ),
        (
            "--seq-length 32 --segment-lengths 64 --dilation-rates 64",
            1,
            "above its one segment, of --seq-length 32, of which one position at most would take"
            " part: set 32 or less",
        ),
        ("--head-offsets sideways", 1, "--head-offsets"),
        ("--head-offsets [[0]]", 1, "--head-offsets"),
        (
            "--attention dilated local --num-layers 1",
            1,
            "--attention has 2 kinds, more than --num-layers 1",
        ),
        ("--attention local --window-size 0", 1, "--window-size 0 must be positive"),
        ("--attention sparse --sparse-block-size 0", 1, "--sparse-block-size 0 must be positive"),
        ("--attention sparse --sparse-columns 0", 1, "--sparse-columns 0 must be positive"),
        (
            "--sparse-block-size 16 --sparse-columns 17",
            1,
            "--sparse-columns 17 is above --sparse-block-size 16",
        ),
        (
            "--attention local --match-flops --segment-lengths 16 --dilation-rates 4",
            1,
            "--match-flops: local attention comes no nearer to the dilated branches than 1.60",
        ),
        (
            "--attention sparse --match-flops --segment-lengths 16 --dilation-rates 4",
            1,
            "--match-flops: sparse attention comes no nearer to the dilated branches than",
        ),
        (
            "--lr-warmup-iters 20 --train-iters 10",
            1,
            "--lr-warmup-iters 20 must lie between 0 and --train-iters 10",
        ),
        (
            "--lr-warmup-iters 20 --train-iters 30 --lr-begin-iters 15",
            1,
            "between 0 and --train-iters 30 - --lr-begin-iters 15",
        ),
        (
            "--lr-warmup-iters 20 --lr-decay-iters 10",
            1,
            "--lr-warmup-iters 20 must lie between 0 and --lr-decay-iters 10",
        ),
        ("--lr-decay-style WSD", 1, "set --lr-wsd-decay-iters to the iterations of that"),
        (
            "--lr-wsd-decay-iters 10",
            1,
            "--lr-wsd-decay-iters 10 is about WSD: set --lr-decay-style WSD",
        ),
        ("--lr-wsd-decay-style linear", 1, "--lr-wsd-decay-style linear is about WSD"),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 96 --lr-warmup-iters 5 --train-iters 100",
            1,
            "--lr-wsd-decay-iters 96 must be at least 1, and at most 95",
        ),
        ("--min-lr 1.0", 1, "--min-lr 1.0 must lie between"),
        ("--adam-beta1 1.0", 1, "--adam-beta1"),
        ("--skip-loss-spikes 1", 1, "--skip-loss-spikes 1 must be more than 1"),
        (
            f"--skip-loss-spikes 2 --deepspeed-config {OFFLOAD}",
            1,
            "--skip-loss-spikes leaves out no update of an optimizer on the host",
        ),
        ("--loss-spike-window 9", 1, "--loss-spike-window 9 is about --skip-loss-spikes"),
        ("--skip-loss-spikes 2 --loss-spike-window 0", 1, "--loss-spike-window 0 must be positive"),
        ("--z-loss-coeff -1", 1, "--z-loss-coeff must be a number and not negative"),
        ("--clip-grad -1", 1, "--clip-grad must be a number"),
        ("--initial-loss-scale 3", 1, "power of two"),
        ("--eval-iters -1", 1, "--eval-iters -1"),
        ("--log-interval 0", 1, "--log-interval 0"),
        ("--seed 99999999999", 1, "--seed 99999999999"),
        ("--rotary-base 0", 1, "--rotary-base 0"),
        ("--rope-original-length 64", 1, "--rope-scaling-factor turns on: set that too, or leave"),
        ("--rope-scaling-factor 0.5", 1, "--rope-scaling-factor 0.5 must be at least 1"),
        (
            "--rotary-ntk-factor 2 --position-embedding-type none",
            1,
            "--rotary-ntk-factor 2.0 is about rotary positions: set --position-embedding-type rope",
        ),
        (
            "--rope-scaling-factor 2 --rotary-seq-len-interpolation-factor 2",
            1,
            "--rotary-seq-len-interpolation-factor and --rope-scaling-factor are different",
        ),
        (
            "--rotary-ntk-factor 2 --kv-channels 2",
            1,
            "set a larger --kv-channels, or --rotary-seq-len-interpolation-factor",
        ),
        (
            "--yarn-rotary-scaling-factor 4",
            1,
            "set --yarn-original-max-position-embeddings to that",
        ),
        (
            "--yarn-original-max-position-embeddings 4096",
            1,
            "which --yarn-rotary-scaling-factor turns on",
        ),
        (f"{YARN} --yarn-beta-slow 40", 1, "must be more than --yarn-beta-slow 40.0"),
        (f"{YARN} --yarn-mscale 1", 1, "--yarn-mscale-all-dim are two halves of a ratio"),
        (
            f"{YARN} --yarn-mscale 1 --yarn-mscale-all-dim 1 --yarn-attention-factor 1.2",
            1,
            "set it, or these two",
        ),
        (f"{YARN} --yarn-attention-factor 0", 1, "--yarn-attention-factor 0.0 must be positive"),
        (f"{YARN} --rotary-base 1", 1, "--rotary-base 1.0 must be more than 1 with YaRN"),
        (
            "--position-embedding-type xpos --seq-length 65536",
            1,
            "in bf16, of whose exponents it would take more than half: set --seq-length 35694, or"
            " --xpos-scale-base 941,",
        ),
        (
            "--position-embedding-type xpos --seq-length 4096 --precision fp16",
            1,
            "set --seq-length 3966, or --xpos-scale-base 529,",
        ),
        ("--norm-epsilon -1", 1, "--norm-epsilon -1"),
        ("--clip-grad nan", 1, "--clip-grad"),
        ("--loss-scale -5", 1, "--loss-scale -5"),
        ("--lr 0", 1, "--lr 0"),
        ("--tokenizer-type SentencePieceTokenizer", 1, "--tokenizer-model is missing"),
        ("--loss-chunk-size 0", 1, "--loss-chunk-size 0 must be positive"),
        ("--tile-size -1", 1, "--tile-size -1 must be positive"),
        ("--attention-head-groups 0", 1, "--attention-head-groups 0 must be positive"),
        ("--attention-head-groups 5", 1, "set --attention-head-groups 4"),
        (
            "--attention-head-groups 6 --tensor-model-parallel-size 4",
            4,
            "does not divide the 3 key/value heads of a tensor-parallel rank: set"
            " --attention-head-groups 3",
        ),
        ("--no-load-optim", 1, "--no-load-optim is about a run that goes on: set --load, or leave"),
        ("--no-load-rng --save run", 1, "--no-load-rng is about a run that goes on: set --load"),
        ("--new-data", 1, "--new-data is about a run that goes on: set --load"),
        ("--load run --finetune --new-data", 1, "begins a new one, on any data: leave --new-data"),
        (
            "--load run --finetune --use-checkpoint-opt-param-scheduler",
            1,
            "--use-checkpoint-opt-param-scheduler its schedule: leave one of the two out",
        ),
        (
            "--objective mlm --eod-mask-loss",
            1,
            "--eod-mask-loss is about predicting the next token: with --objective mlm leave it out",
        ),
        ("--exit-duration-in-mins 0", 1, "--exit-duration-in-mins 0.0 must be positive"),
        ("--optimizer muon --zero-stage 3", 2, "a part alone: set --zero-stage 2"),
        ("--muon-num-ns-steps 0", 1, "--muon-num-ns-steps 0 must be positive"),
        ("--muon-momentum 1", 1, "--muon-momentum must lie in [0, 1)"),
    ],
)
def test_what_cannot_work_is_refused(flags, ranks, message):
    with pytest.raises(UserError) as error:
        resolve(*flags.split(), ranks=ranks)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_lengths_that_a_refusal_of_xpos_names_work(precision):
    for base in (1, 7, 512):
        longest = int(longest_xpos(precision, base))
        ModelConfig(
            position_embedding_type="xpos", seq_length=longest, xpos_scale_base=base
        ).check_positions(precision, True)
        longer = ModelConfig(
            position_embedding_type="xpos", seq_length=3 * longest + 1, xpos_scale_base=base
        )
        with pytest.raises(UserError, match=f"set --seq-length {longest}, or") as error:
            longer.check_positions(precision, True)
        named = int(re.search(r"--xpos-scale-base (\d+)", str(error.value))[1])
        assert longest_xpos(precision, named - 1) < longer.seq_length
        assert longest_xpos(precision, named) >= longer.seq_length


def test_data_path_is_needed():
    with pytest.raises(UserError, match="--data-path is missing"):
        config_from_values({"tokenizer_type": "ByteTokenizer"}).resolve(1)


def test_adamw_is_another_word_for_adam(tmp_path):
    """On the command line and in a file; no configuration has it."""
    (tmp_path / "run.yaml").write_text("optimizer: adamw")
    for flags in (["--optimizer", "adamw"], ["--config", str(tmp_path / "run.yaml")]):
        config = parse_arguments(flags)
        assert config == parse_arguments([]) and config.training.optimizer == "adam"


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--num-layer", "3"], ["--num-layer; did you mean --num-layers?"]),
        (["--num_layers=3"], ["--num_layers; did you mean --num-layers?"]),
        (["--no-swiglo"], ["did you mean --no-swiglu?"]),
        (["--num-layers", "three"], ["--num-layers", "three"]),
        (["--seq-length", "2**"], ["--seq-length: '2**' is no whole number, such as 1048576"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--lr-decay-style", "wsd"], ["--lr-decay-style: 'wsd' is", "did you mean WSD?"]),
        (["--optimizer", "adamx"], ["is not one of adam, sgd, muon; did you mean adam?"]),
        (["--zero-stage", "4"], ["--zero-stage: invalid choice", "4", "0, 1, 2, 3"]),
        (["--head-offsets", "[[0,"], ["--head-offsets"]),
        (["--attention", "dilated", "locall"], ["--attention", "locall", "local"]),
        (["--attention", "dlated"], ["dlated", "did you mean dilated?"]),
        (["--reset-attention-mask"], ["set --document-attention isolated"]),
        (["--use-rope-scaling"], ["--rope-scaling-factor alone turns that scaling on"]),
        (["--rotary-scaling-factor", "4"], ["set --yarn-rotary-scaling-factor for YaRN, or"]),
        (["--reset-position-ids"], ["leave it out: positions count as distances here"]),
        (["--muon-no-split-qkv"], ["set --no-muon-split-qkv"]),
        (["--muon-use-nesterov"], ["--no-muon-nesterov turns it off"]),
        (["--muon-tp-mode", "blockwise"], ["orthogonalized whole"]),
    ],
)
def test_a_bad_flag_is_one_line(flags, names):
    with pytest.raises(UserError) as error:
        parse_arguments(flags)
    for name in names:
        assert name in str(error.value)
    assert "\n" not in str(error.value)


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


def test_segments_above_the_sequence_are_told():
    flags = ["--seq-length", 64, "--dilation-rates", 1, 4, 8, "--segment-lengths", 16, 64, 128]
    assert resolve(*flags).attention.oddities(64) == [
        "--segment-lengths 128: above --seq-length 64, and so one segment, the whole sequence"
    ]
    assert resolve(*flags, "--attention", "dense").attention.oddities(64) == []
    for flags, words in (
        (["--attention", "local", "--window-size", 64], "local attention is dense"),
        (
            ["--attention", "dense", "--window-size", 7],
            "--window-size is of local attention, which",
        ),
    ):
        [line] = resolve("--seq-length", 64, *flags).attention.oddities(64)
        assert words in line
    with pytest.raises(UserError, match="--match-flops is about local and sparse"):
        resolve("--match-flops")
    for length in (500, 10_000):
        assert resolve("--seq-length", length).attention.oddities(length) == []


def test_segments_that_do_not_reach_over_the_sequence_are_told():
    flags = ["--seq-length", 64, "--dilation-rates", 1, 4, "--segment-lengths", 16, 32]
    [line] = resolve(*flags).attention.oddities(64)
    assert line.endswith("and no token sees beyond its segment of 32")
    assert resolve(*flags, "--attention", "dilated", "dense").attention.oddities(64) == []


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_size() == 1
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(UserError, match="srun started 2 processes"):
        world_size()
    monkeypatch.setenv("RANK", "0")
    assert world_size() == 4


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


@pytest.mark.parametrize("block, told", [(2048, False), (16384, True)])
def test_a_block_that_matched_costs_change_is_told(block, told):
    flags = ["--attention", "sparse", "--match-flops", "--seq-length", 32768]
    config = resolve(*flags, "--sparse-block-size", block).attention
    given = dataclasses.replace(config, sparse_block_size=block)
    lines = given.changed_by_matching(config)
    assert bool(lines) == told == (config.sparse_block_size != block)
    for line in lines:
        assert line.startswith(
            f"--match-flops: sparse attention has blocks of {config.sparse_block_size}: "
        )
        assert f"with --sparse-block-size {block} no number of columns" in line


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


@pytest.mark.parametrize(
    "flags, unused",
    [
        ("--memory-path off", ["--tile-size", "--loss-chunk-size", "--attention-head-groups"]),
        ("--memory-path on --no-tiled-attention", ["--attention-head-groups"]),
        ("--memory-path on", []),
        (
            "--memory-path on --recompute-granularity selective",
            ["--recompute-granularity"],
        ),
        (
            "--memory-path on --no-tiled-attention --recompute-granularity selective",
            ["--attention-head-groups"],
        ),
    ],
)
def test_what_was_given_and_does_nothing_is_said(flags, unused):
    sizes = ["--tile-size", "512", "--loss-chunk-size", "512", "--attention-head-groups", "2"]
    given = parse_arguments([*NEEDED, *sizes, *flags.split()])
    settled = given.resolve(1)
    lines = given.memory.unused(settled.memory, settled.parallel)
    assert [line.split()[0] for line in lines] == unused


@pytest.mark.parametrize("flags", ["--offload-activations", "--memory-path on"])
def test_that_nothing_is_offloaded_on_a_cpu_is_said(flags):
    given = parse_arguments([*NEEDED, *flags.split()])
    memory = given.memory.with_pieces(True, (of := given.resolve(1)).model, of.parallel)
    on_cpu = dataclasses.replace(memory, offload_activations=False)
    [line] = given.memory.unused(on_cpu, of.parallel)
    assert line.startswith("--offload-activations is not used: on a CPU")
    assert not given.memory.unused(memory, of.parallel)


def test_paths_and_weights_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data_path: [0.7, code=a, 0.3, b]\nvalid_data_path: c\n")
    data = parse_arguments(["--config", str(file)]).data
    assert data.data_path == ("0.7", "code=a", "0.3", "b") and data.valid_data_path == ("c",)
    file.write_text("data_path: [true]\n")
    with pytest.raises(UserError, match="data_path: expected a list of str"):
        parse_arguments(["--config", str(file)])
