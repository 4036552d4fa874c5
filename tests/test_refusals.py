"""Refusals of a configuration: each is one line that names the flags and what to set instead."""

import re
from pathlib import Path

import pytest

from megalong.config import ModelConfig, world_size
from megalong.config.arguments import config_from_values, parse_arguments
from megalong.config.model import longest_xpos
from megalong.utils.errors import UserError
from tests.recipe_file import resolve

SHORT = {
    "OFFLOAD": str(Path(__file__).parent / "training" / "offload.json"),
    "YARN": "--yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 4096",
    "TP": "--tensor-model-parallel-size",
    "SP": "--sequence-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "CHUNK": "--num-layers-per-virtual-pipeline-stage",
    "VOCAB": "--make-vocab-size-divisible-by",
    "EACH": "--recompute-num-layers",
}


def whole(text: str) -> str:
    """Spell out what a table abbreviates."""
    return re.sub(r"\b(" + "|".join(SHORT) + r")\b", lambda match: SHORT[match[0]], text)


def refused(flags: str, ranks: int) -> str:
    with pytest.raises(UserError) as error:
        resolve(*whole(flags).split(), ranks=ranks)
    assert "\n" not in str(error.value)
    return str(error.value)


# flags [@ ranks] -> what the error names of them, and of what to set
REFUSED = """
--hidden-size 100 --num-attention-heads 3 -> --hidden-size 100
--num-attention-heads 12 --num-query-groups 5 -> --num-query-groups 5
--kv-channels 33 -> --kv-channels
--global-batch-size 6 --micro-batch-size 2 @ 2 -> --micro-batch-size 1 --global-batch-size 8
--global-batch-size 7 --micro-batch-size 2 @ 2 -> --global-batch-size 8
--micro-batch-size 0 -> --micro-batch-size 0
--eval-task-interval 5 -> --eval-task-interval --eval-tasks
--eval-tasks copy --eval-task-samples 0 -> --eval-task-samples 0
--eval-tasks copy --eval-task-lengths 9000 -> --eval-task-lengths 9000 --seq-length 8192
--eval-tasks copy --objective mlm -> --objective
--segment-lengths 8 16 --dilation-rates 1 -> --dilation-rates 1
--segment-lengths 8 16 -> --segment-lengths --dilation-rates
--dilation-rates 8 16 -> --dilation-rates --segment-lengths
--segment-lengths 8 --dilation-rates 0 -> --dilation-rates 0
--segment-lengths 8 64 --dilation-rates 1 65 -> --dilation-rates 65
--seq-length 32 --segment-lengths 64 --dilation-rates 64 -> --seq-length 32
--head-offsets [[0]] -> --head-offsets
--attention dilated local --num-layers 1 -> --attention --num-layers 1
--attention local --window-size 0 -> --window-size 0
--sparse-block-size 16 --sparse-columns 17 -> --sparse-columns 17 --sparse-block-size 16
--attention local --match-flops --segment-lengths 16 --dilation-rates 4 -> --match-flops
--attention sparse --match-flops --segment-lengths 16 --dilation-rates 4 -> --match-flops
--lr-warmup-iters 20 --train-iters 10 -> --lr-warmup-iters 20 --train-iters 10
--lr-warmup-iters 20 --train-iters 30 --lr-begin-iters 15 -> --train-iters 30 --lr-begin-iters 15
--lr-warmup-iters 20 --lr-decay-iters 10 -> --lr-warmup-iters 20 --lr-decay-iters 10
--lr-decay-style WSD -> --lr-wsd-decay-iters
--lr-wsd-decay-iters 10 -> --lr-wsd-decay-iters 10 --lr-decay-style WSD
--lr-decay-style WSD --lr-wsd-decay-iters 96 --lr-warmup-iters 5 --train-iters 100 -> 96
--min-lr 1.0 -> --min-lr 1.0
--adam-beta1 1.0 -> --adam-beta1
--skip-loss-spikes 1 -> --skip-loss-spikes 1
--skip-loss-spikes 2 --deepspeed-config OFFLOAD -> --skip-loss-spikes
--loss-spike-window 9 -> --loss-spike-window 9 --skip-loss-spikes
--skip-loss-spikes 2 --loss-spike-window 0 -> --loss-spike-window 0
--z-loss-coeff -1 -> --z-loss-coeff
--clip-grad -1 -> --clip-grad
--initial-loss-scale 3 -> --initial-loss-scale
--eval-iters -1 -> --eval-iters
--seed 99999999999 -> --seed 99999999999
--rotary-base 0 -> --rotary-base 0
--rope-original-length 64 -> --rope-scaling-factor
--rope-scaling-factor 2 --rope-high-freq-factor 1 -> --rope-low-freq-factor 1.0
--rope-scaling-factor 0.5 -> --rope-scaling-factor 0.5
--rotary-ntk-factor 2 --position-embedding-type none -> --position-embedding-type
--rope-scaling-factor 2 --rotary-seq-len-interpolation-factor 2 -> --rope-scaling-factor
--rotary-ntk-factor 2 --kv-channels 2 -> --kv-channels --rotary-seq-len-interpolation-factor
--yarn-rotary-scaling-factor 4 -> --yarn-original-max-position-embeddings
--yarn-rotary-scaling-factor 1 --yarn-attention-factor 2 -> --yarn-original-max-position
--yarn-original-max-position-embeddings 4096 -> --yarn-rotary-scaling-factor
YARN --yarn-beta-slow 40 -> --yarn-beta-slow 40.0
YARN --yarn-mscale 1 -> --yarn-mscale-all-dim
YARN --yarn-mscale 1 --yarn-mscale-all-dim 1 --yarn-attention-factor 1.2 -> --yarn-attention-factor
YARN --yarn-attention-factor 0 -> --yarn-attention-factor 0.0
YARN --rotary-base 1 -> --rotary-base 1.0
--position-embedding-type xpos --seq-length 65536 -> --seq-length 35694 --xpos-scale-base 941
--position-embedding-type xpos --seq-length 4096 --precision fp16 -> --xpos-scale-base 529
--loss-scale -5 -> --loss-scale
--lr 0 -> --lr 0
--tokenizer-type SentencePieceTokenizer -> --tokenizer-model
--loss-chunk-size 0 -> --loss-chunk-size 0
--attention-head-groups 5 -> --attention-head-groups 4
--attention-head-groups 6 --tensor-model-parallel-size 4 @ 4 -> --attention-head-groups 3
--no-load-optim -> --no-load-optim --load
--no-load-rng --save run -> --no-load-rng --load
--new-data -> --new-data --load
--load run --finetune --new-data -> --new-data
--load run --finetune --use-checkpoint-opt-param-scheduler -> --use-checkpoint-opt-param-scheduler
--objective mlm --eod-mask-loss -> --eod-mask-loss --objective
--exit-duration-in-mins 0 -> --exit-duration-in-mins 0.0
--optimizer muon --zero-stage 3 @ 2 -> --zero-stage 2
--muon-momentum 1 -> --muon-momentum
--keep-every 2 --save x -> --keep-every 2 --keep-last
--keep-last 1 --keep-every 3 --save-interval 2 --save x -> --keep-every 4
--keep-best -> --keep-best --save
--keep-best-by code -> --keep-best-by --keep-best
--finetune -> --finetune --load
--save x --keep-best --eval-interval 5 --save-interval 2 -> --save-interval 5
--save x --keep-best --full-validation -> --eval-iters 0
--wandb-exp-name x -> --wandb-exp-name --wandb-project
--hang-timeout-seconds 600 -> --hang-timeout-seconds 600 --distributed-timeout-minutes 10
--profile -> --profile --save
--profile --save x --profile-step-start 0 -> --profile-step-start 1 --profile-step-end 3
--profile --save x --profile-ranks 1 -> --profile-ranks 1
--sample-tokens 5 -> --sample-tokens 5 --sample-prompts
--sample-prompts a --sample-temperature -1 -> --sample-temperature -1
--sample-prompts a --objective mlm -> --sample-prompts --objective causal
--document-attention isolated --seq-length 2**31 -> --document-attention mixed
--optimizer muon --deepspeed-config OFFLOAD -> --optimizer adam
--match-flops -> --match-flops --attention local
--attention-backend fast -> --attention-backend
--objective mlm --mask-rate 1 -> --mask-rate 1
--mask-rate 0.3 -> --mask-rate 0.3 --objective mlm
--objective mlm --position-embedding-type xpos -> --position-embedding-type rope
""".strip().splitlines()


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_work_is_refused(row):
    flags, _, named = row.partition(" -> ")
    flags, _, ranks = flags.partition(" @ ")
    message = refused(flags, int(ranks or 1))
    for name in re.findall(r"--\S+(?: [^-]\S*)?", named):
        assert name in message


SMALL = (
    "--num-layers 6 --hidden-size 96 --num-attention-heads 6 --num-query-groups 3 --seq-length 96"
    " --ffn-hidden-size 240 VOCAB 60 --segment-lengths 24 96 --dilation-rates 1 4"
)
# flags @ ranks -> what the error names => a suggestion of it, which works
LAYOUTS = """
SP 4 @ 6 -> SP => SP 3
TP 3 SP 8 @ 12 -> TP SP PP => SP 4
PP 0 @ 4 -> PP 0 => -
SP 5 @ 5 -> --seq-length 96 => SP 4
SP 5 @ 5 -> SP 5 => --seq-length 100
TP 2 @ 2 -> --num-query-groups 3 => TP 1
TP 6 @ 6 -> --num-query-groups 3 => --num-query-groups 6
TP 4 --num-query-groups 6 @ 4 -> --num-attention-heads 6 => TP 2
TP 3 --ffn-hidden-size 250 @ 3 -> --ffn-hidden-size 250 => --ffn-hidden-size 252
TP 3 VOCAB 128 @ 3 -> VOCAB 128 => VOCAB 129
TP 3 SP 2 --seq-length 100 @ 6 -> --sequence-parallel => --no-sequence-parallel
PP 4 @ 4 -> --num-layers 6 => PP 3
PP 2 --zero-stage 2 @ 2 -> --zero-stage 2 => --zero-stage 1
PP 3 --zero-stage 3 @ 3 -> --zero-stage 3 => --zero-stage 1
CHUNK 1 --global-batch-size 2 @ 1 -> CHUNK => PP 2
PP 2 CHUNK 2 --global-batch-size 4 @ 2 -> CHUNK 2 => CHUNK 1
PP 2 CHUNK 1 --global-batch-size 3 @ 2 -> PP 2 => --global-batch-size 4
--recompute-granularity full EACH 4 PP 2 @ 2 -> EACH 4 => EACH 3
--recompute-granularity full EACH 4 @ 1 -> EACH 4 => EACH 3
--recompute-granularity selective EACH 2 @ 1 -> EACH 2 => --recompute-granularity full
PP 2 CHUNK 3 --global-batch-size 4 @ 2 -> CHUNK 3 => CHUNK 1
""".strip().splitlines()


@pytest.mark.parametrize("row", LAYOUTS)
def test_refusals_of_layouts_suggest_one_that_works(row):
    flags, ranks, named, suggested = re.split(" @ | -> | => ", row)
    message = refused(f"{SMALL} {flags}", int(ranks))
    for name in re.findall(r"--\S+(?: \d+)?", whole(named)):
        assert name in message
    if suggested == "-":
        return
    assert whole(suggested) in message
    # The suggestion wins over the flag it corrects; it works, on as many ranks as it needs.
    flags = whole(f"{SMALL} {flags} {suggested}").split()
    needed = resolve(*flags, ranks=None).parallel.ranks_per_replica
    resolve(*flags, ranks=int(ranks) if int(ranks) % needed == 0 else needed)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_lengths_that_a_refusal_of_xpos_names_work(precision):
    for base in (1, 7, 512):
        longest = int(longest_xpos(precision, base))

        def model(length, base=base):
            return ModelConfig(
                position_embedding_type="xpos", seq_length=length, xpos_scale_base=base
            )

        model(longest).check_positions(precision, True)
        longer = model(3 * longest + 1)
        with pytest.raises(UserError, match=f"--seq-length {longest}, or") as error:
            longer.check_positions(precision, True)
        named = int(re.search(r"--xpos-scale-base (\d+)", str(error.value))[1])
        assert longest_xpos(precision, named - 1) < longer.seq_length
        assert longest_xpos(precision, named) >= longer.seq_length


def test_data_path_is_needed():
    with pytest.raises(UserError, match="--data-path"):
        config_from_values({"tokenizer_type": "ByteTokenizer"}).resolve(1)


@pytest.mark.parametrize(
    "text, words",
    [
        ("num_layer: 3", "num_layer: unknown key; did you mean num_layers?"),
        ("reset-attention-mask: true", "--document-attention isolated"),
        ("training:\n  num_layers: 3", "belongs to the section model"),
        ("num_layers: 3\nmodel:\n  num-layers: 3", "given twice"),
        ("num_layers: many", "'many'"),
        ("num_layers: true", "True"),
        ("num_layers:", "no value"),
        ("swiglu: 1", "bool"),
        ("lr: fast", "'fast'"),
        ("precision: fp8", "fp32, bf16, fp16"),
        ("segment_lengths: 2048", "list of int"),
        ("data_path: [true]", "data_path: expected a list of str"),
        ("model: 3", "model is a section"),
        ("just words", "`name: value`"),
        ("head_offsets: 5", "head_offsets"),
        ("a: [1, 2", "not YAML"),
        (None, "No such file"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(file)])
    assert str(file) in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-layer 3", "--num-layer; did you mean --num-layers?"),
        ("--num_layers=3", "--num_layers; did you mean --num-layers?"),
        ("--no-swiglo", "did you mean --no-swiglu?"),
        ("--num-layers three", "--num-layers: 'three'"),
        ("--seq-length 2**", "--seq-length: '2**'"),
        ("--precision fp8", "--precision: 'fp8' is not one of fp32, bf16, fp16"),
        ("--lr-decay-style wsd", "did you mean WSD?"),
        ("--optimizer adamx", "did you mean adam?"),
        ("--zero-stage 4", "--zero-stage: invalid choice"),
        ("--head-offsets [[0,", "--head-offsets"),
        ("--attention dilated locall", "did you mean local?"),
        ("--preset longnet-760", "did you mean longnet-760m?"),
        ("--reset-attention-mask", "--document-attention isolated"),
        ("--rotary-scaling-factor 4", "--yarn-rotary-scaling-factor"),
        ("--muon-no-split-qkv", "--no-muon-split-qkv"),
    ],
)
def test_a_bad_flag_is_one_line(flags, words):
    with pytest.raises(UserError) as error:
        parse_arguments(flags.split())
    assert words in str(error.value) and "\n" not in str(error.value)


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
