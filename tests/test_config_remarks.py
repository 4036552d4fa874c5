"""What a configuration can do, and is told of: what is odd, or does nothing."""

import dataclasses

import pytest

from megalong.config import unused
from megalong.config.arguments import parse_arguments
from megalong.config.model import scaling_oddities
from megalong.utils.errors import UserError
from tests.flags import NEEDED, resolve

YARN = "--yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 4096"


@pytest.mark.parametrize(
    "flags, told",
    [
        ("", None),
        ("--rope-scaling-factor 4", "--rope-original-length 8192: --seq-length 512 is not beyond"),
        ("--rope-scaling-factor 4 --rope-original-length 128", None),
        (f"{YARN} --seq-length 16384", None),
        (f"{YARN} --seq-length 4096", "embeddings 4096: --seq-length 4096 is not beyond that"),
        (f"{YARN} --seq-length 16385", "--seq-length 16385 is beyond 16384, as far as that"),
        ("--yarn-rotary-scaling-factor 1", None),
    ],
)
def test_scalings_that_fit_badly_are_told(flags, told):
    lines = scaling_oddities(resolve("--seq-length", 512, *flags.split()).model)
    assert len(lines) == (told is not None)
    assert not lines or told in lines[0]


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


@pytest.mark.parametrize(
    "flags, told",
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
def test_what_was_given_and_does_nothing_is_said(flags, told):
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
    "flags, lines",
    [
        ("", []),
        ("--optimizer muon --muon-momentum 0.5 --adam-beta2 0.9", []),
        (
            "--muon-momentum 0.5 --no-muon-nesterov --sgd-momentum 0.1",
            [
                "--sgd-momentum 0.1 is not used: --optimizer is adam",
                "--muon-momentum 0.5 is not used: --optimizer is adam",
                "--muon-nesterov off is not used: --optimizer is adam",
            ],
        ),
        (
            "--lr-decay-style constant --min-lr 1e-5 --lr-decay-iters 5 --lr-decay-power 2",
            [
                "--min-lr 1e-05 is not used: --lr-decay-style is constant",
                "--lr-decay-iters 5 is not used: --lr-decay-style is constant",
                "--lr-decay-power 2.0 is not used: --lr-decay-style is constant",
            ],
        ),
        ("--loss-scale 8", ["--loss-scale 8.0 is not used: --precision is bf16"]),
        ("--loss-scale 8 --precision fp16", []),
        ("--xpos-scale-base 9", ["--xpos-scale-base 9 is not used: --position-embedding-type is"]),
        ("--position-embedding-type none --rotary-base 7", ["--rotary-base 7.0 is not used: "]),
        (
            "--use-checkpoint-opt-param-scheduler --load-fallback",
            [
                "--use-checkpoint-opt-param-scheduler is not used: there is no --load",
                "--load-fallback is not used: there is no --load",
            ],
        ),
        ("--use-checkpoint-opt-param-scheduler --load-fallback --load run", []),
    ],
)
def test_settings_that_do_nothing_are_told(flags, lines):
    found = list(unused(parse_arguments([*NEEDED, *flags.split()])))
    assert len(found) == len(lines), found
    for line, words in zip(found, lines, strict=True):
        assert line.startswith(words)
