"""A checkpoint that the code of commit 109876a wrote goes on as that code would have gone on.

`written_by_109876a` holds its run folder as three of six iterations left it, the records of all six
(`metrics_of_all_six.jsonl`), and the text, one token a byte. It was trained by one process:

    python pretrain_longnet.py --num-layers 2 --hidden-size 16 --ffn-hidden-size 32
        --num-attention-heads 2 --padded-vocab-size 258 --seq-length 64 --segment-lengths 16 32 64
        --dilation-rates 1 2 4 --micro-batch-size 2 --global-batch-size 4 --train-iters 6 --lr 1e-2
        --lr-warmup-iters 2 --precision fp32 --data-path text --tokenizer-type ByteTokenizer
        --split 80,20,0 --eval-iters 1 --eval-interval 3 --save-interval 3 --save run
"""

import shutil
from pathlib import Path

import pytest

from megalong.training.metrics import read_metrics
from tests.forked import run_ranks
from tests.launching import PRETRAIN

WRITTEN = Path(__file__).with_name("written_by_109876a")
LAYOUTS = {
    "one process": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_older_checkpoint_goes_on(layout, tmp_path):
    ranks, changes = LAYOUTS[layout]
    run = shutil.copytree(WRITTEN / "run", tmp_path / "run")
    flags = ["--config", run / "flags.yaml", "--data-path", WRITTEN / "text"]
    # Its schedule was a step ahead of ours, and the last step's rate was zero.
    flags += ["--lr-warmup-iters", 1, "--lr-decay-iters", 5]
    run_ranks(ranks, PRETRAIN, *flags, "--save", run, "--load", run, *changes)

    expected = [
        record
        for record in read_metrics(WRITTEN / "metrics_of_all_six.jsonl")
        # The evaluation of iteration 3 comes after its checkpoint, and is made again.
        if record["iteration"] > 3 or ("split" in record and record["iteration"] == 3)
    ]
    found = read_metrics(run / "metrics.jsonl")
    assert [r["iteration"] for r in found] == [r["iteration"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.get("split") == theirs.get("split")
        for name in theirs.keys() - {"split", "tokens_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
