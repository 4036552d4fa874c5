"""What a configuration refuses: each line names what is wrong and what to set."""

import re
from pathlib import Path

import pytest

from megalong.config import ModelConfig, world_size
from megalong.config.arguments import config_from_values, parse_arguments
from megalong.config.model import longest_xpos
from megalong.utils.errors import UserError
from tests.flags import resolve

OFFLOAD = Path(__file__).parent / "training" / "offload.json"

YARN = "--yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 4096"


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


def test_a_missing_yaml_is_named():
    with pytest.raises(UserError, match=r"--config no.yaml: No such file"):
        parse_arguments(["--config", "no.yaml"])


@pytest.mark.parametrize(
    "flags, ranks, message",
    [
        ("--hidden-size 100 --num-attention-heads 3", 1, "--hidden-size 100 does not divide"),
        ("--num-attention-heads 12 --num-query-groups 5", 1, "--num-query-groups 5"),
        ("--kv-channels 33", 1, "even --kv-channels"),
        (
            "--global-batch-size 6 --micro-batch-size 2",
            2,
            "set --micro-batch-size 1, or --global-batch-size 8, or change the layout",
        ),
        ("--global-batch-size 7 --micro-batch-size 2", 2, "ranks: set --global-batch-size 8"),
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
        ("--rope-low-freq-factor 2", 1, "--rope-scaling-factor turns on: set that too, or leave"),
        (
            "--rope-scaling-factor 2 --rope-high-freq-factor 1",
            1,
            "--rope-high-freq-factor 1.0 must be more than --rope-low-freq-factor 1.0: turns in",
        ),
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
            "--yarn-rotary-scaling-factor 1 --yarn-attention-factor 1.2",
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
