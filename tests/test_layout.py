"""Layouts: those that cannot work are refused before anything starts, and the error names the flags
and a layout that works. Every suggestion is tried."""

import re
import socket

import pytest

from megalong.config.arguments import parse_arguments
from megalong.utils.errors import UserError
from megalong.utils.machine import check_master_port, free_port

SMALL = (
    "--data-path data --tokenizer-type ByteTokenizer --num-layers 6 --hidden-size 96"
    " --num-attention-heads 6 --num-query-groups 3 --seq-length 96 --ffn-hidden-size 240"
    " --make-vocab-size-divisible-by 60 --segment-lengths 24 96 --dilation-rates 1 4"
)


def resolve(flags: str, ranks: int):
    return parse_arguments(f"{SMALL} {flags}".split()).resolve(ranks)


REFUSED = [
    # flags, ranks, flags that the error names, what it suggests
    ("--sequence-parallel-size 4", 6, "--sequence-parallel-size", "--sequence-parallel-size 3"),
    (
        "--tensor-model-parallel-size 3 --sequence-parallel-size 8",
        12,
        "--tensor-model-parallel-size --sequence-parallel-size --pipeline-model-parallel-size",
        "--sequence-parallel-size 4",
    ),
    ("--pipeline-model-parallel-size 0", 4, "--pipeline-model-parallel-size 0", None),
    ("--sequence-parallel-size 5", 5, "--seq-length 96", "--sequence-parallel-size 4"),
    ("--sequence-parallel-size 5", 5, "--sequence-parallel-size 5", "--seq-length 100"),
    ("--tensor-model-parallel-size 2", 2, "--num-query-groups 3", "--tensor-model-parallel-size 1"),
    ("--tensor-model-parallel-size 6", 6, "--num-query-groups 3", "--num-query-groups 6"),
    (
        "--tensor-model-parallel-size 4 --num-query-groups 6",
        4,
        "--num-attention-heads 6",
        "--tensor-model-parallel-size 2",
    ),
    (
        "--tensor-model-parallel-size 3 --ffn-hidden-size 250",
        3,
        "--ffn-hidden-size 250",
        "--ffn-hidden-size 252",
    ),
    (
        "--tensor-model-parallel-size 3 --make-vocab-size-divisible-by 128",
        3,
        "--make-vocab-size-divisible-by 128",
        "--make-vocab-size-divisible-by 129",
    ),
    (
        "--tensor-model-parallel-size 3 --sequence-parallel-size 2 --seq-length 100",
        6,
        "--sequence-parallel",
        "--no-sequence-parallel",
    ),
    (
        "--pipeline-model-parallel-size 4",
        4,
        "--num-layers 6",
        "--pipeline-model-parallel-size 3",
    ),
    ("--pipeline-model-parallel-size 2 --zero-stage 2", 2, "--zero-stage 2", "--zero-stage 1"),
    ("--pipeline-model-parallel-size 3 --zero-stage 3", 3, "--zero-stage 3", "--zero-stage 1"),
    (
        "--num-layers-per-virtual-pipeline-stage 1 --global-batch-size 2",
        1,
        "--num-layers-per-virtual-pipeline-stage",
        "--pipeline-model-parallel-size 2",
    ),
    (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"
        " --global-batch-size 4",
        2,
        "--num-layers-per-virtual-pipeline-stage 2",
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
    (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
        " --global-batch-size 3",
        2,
        "--pipeline-model-parallel-size 2",
        "--global-batch-size 4",
    ),
    (
        "--recompute-granularity full --recompute-num-layers 4 --pipeline-model-parallel-size 2",
        2,
        "--recompute-num-layers 4",
        "--recompute-num-layers 3",
    ),
    (
        "--recompute-granularity full --recompute-num-layers 4",
        1,
        "--recompute-num-layers 4",
        "--recompute-num-layers 3",
    ),
    (
        "--recompute-granularity selective --recompute-num-layers 2",
        1,
        "--recompute-num-layers 2",
        "--recompute-granularity full",
    ),
    (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3"
        " --global-batch-size 4",
        2,
        "--num-layers-per-virtual-pipeline-stage 3",
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
]


@pytest.mark.parametrize("flags, ranks, named, suggested", REFUSED)
def test_refusals_name_the_flags_and_a_layout_that_works(flags, ranks, named, suggested):
    with pytest.raises(UserError) as error:
        resolve(flags, ranks)
    message = str(error.value)
    for name in re.findall(r"--\S+", named):
        assert name in message
    assert "\n" not in message
    if suggested is None:
        return
    assert suggested in message
    # the suggestion wins over the flag it corrects; it works, on as many ranks as it needs
    other = parse_arguments(f"{SMALL} {flags} {suggested}".split())
    needed = other.parallel.ranks_per_replica
    other.resolve(ranks if ranks % needed == 0 else needed)


@pytest.mark.parametrize("ranks, data", [(1, 1), (2, 2), (6, 6)])
def test_data_parallelism_is_what_is_left(ranks, data):
    assert resolve("", ranks).parallel.data_parallel_size(ranks) == data
    config = resolve("--sequence-parallel-size 2 --tensor-model-parallel-size 3", 6 * ranks)
    assert config.parallel.data_parallel_size(6 * ranks) == data


def test_a_port_that_is_taken(monkeypatch):
    """Found before anything slow is imported, by the rank that would listen there, unless that is
    torchrun."""
    port = free_port()
    with socket.create_server(("", port)):
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="--master_port"):
            check_master_port()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        check_master_port()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    check_master_port()
    for no_port in ("http", "70000"):
        monkeypatch.setenv("MASTER_PORT", no_port)
        with pytest.raises(UserError, match=f"MASTER_PORT is '{no_port}'"):
            check_master_port()
