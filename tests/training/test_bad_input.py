"""Whatever is wrong ends a run with one clear line, exit code 2, and no traceback."""

import json
import math
import shutil
import sys
from collections import deque
from types import SimpleNamespace

import pytest

from megalong.checkpoint.content import Progress
from megalong.training.loop import Trainer
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import PRETRAIN, ranks_command, run, small_run_flags


def refused(ranks: int, *flags: str, script: str = PRETRAIN) -> str:
    """The one line that a run ends with."""
    done = run_ranks(ranks, script, *flags, check=False)
    return the_error(done.returncode, done.stdout)


def the_error(code: int, printed: str) -> str:
    assert code == 2 and "Traceback (most recent call last)" not in printed, printed
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


def test_the_launchers_show_it(corpus):
    """With and without one, in new processes."""
    flags = small_run_flags(corpus, global_batch_size=7)
    for command in ([sys.executable, PRETRAIN, *flags], ranks_command(4, PRETRAIN, *flags)):
        done = run(command, check=False)
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "--global-batch-size 7" in lines[0]


def test_every_rank_finds_it_and_one_says_it(corpus, tmp_path):
    line = refused(2, *small_run_flags(corpus, global_batch_size=6))
    assert (
        "--global-batch-size 6" in line
        and "set --micro-batch-size 1, or --global-batch-size 8" in line
    )


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"data_path": "nowhere/data"}, ["--data-path", "nowhere/data"]),
        ({"split": "0,1,1"}, ["--split 0,1,1", "training"]),
        ({"split": "a,b"}, ["--split"]),
        (
            {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "no.model"},
            ["--tokenizer-model no.model"],
        ),
        ({"load": "nowhere"}, ["--load nowhere"]),
        ({"attention_backend": "triton"}, ["--attention-backend triton", "it needs an NVIDIA GPU"]),
        # Errors of the system, such as also root meets.
        ({"load": "n" * 300}, ["--load nnn", "File name too long"]),
        ({"save": f"{__file__}/run"}, [f"--save {__file__}/run: cannot be made: Not a"]),
        ({"save": "/proc/run"}, ["--save /proc/run: cannot be made: "]),
        ({"save": "/sys/kernel"}, ["--save /sys/kernel: no file can be made there: "]),
        (
            {"tensorboard_dir": "/sys/kernel"},
            ["--tensorboard-dir /sys/kernel: no file can be made there: "],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_flags(corpus, changes, names):
    line = refused(1, *small_run_flags(corpus, **changes))
    for name in names:
        assert name in line


def test_no_weights_to_begin_with(corpus, tmp_path):
    run = {"load": tmp_path / "new", "save": tmp_path / "new"}
    line = refused(1, *small_run_flags(corpus, pretrained_checkpoint="nowhere", **run))
    assert "--pretrained-checkpoint nowhere: no checkpoint there" in line


def test_an_index_cut_short(corpus, tmp_path):
    for ending in (".bin", ".idx"):
        shutil.copy(f"{corpus}{ending}", tmp_path / f"cut{ending}")
    index = tmp_path / "cut.idx"
    index.write_bytes(index.read_bytes()[:-20])
    line = refused(1, *small_run_flags(tmp_path / "cut"))
    assert str(index) in line


@pytest.mark.parametrize("with_description", [True, False])
def test_a_vocabulary_smaller_than_the_ids(corpus, tmp_path, with_description):
    """Known at once where the preprocessor left its description, else when the token is read."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "large.bin"), dtype=np.uint16)
    for _ in range(20):
        builder.add_document([5, 300, 7] * 100, [300])
    builder.finalize(str(tmp_path / "large.idx"))
    if with_description:
        description = json.loads((corpus.parent / f"{corpus.name}.json").read_text())
        description |= {"documents": 20, "tokens": 6000, "max_token_id": 300}
        (tmp_path / "large.json").write_text(json.dumps(description))
    line = refused(1, *small_run_flags(tmp_path / "large"))
    assert "300" in line and "--tokenizer-model" in line


def test_data_of_another_tokenizer(corpus, tmp_path):
    for ending in (".bin", ".idx"):
        shutil.copy(f"{corpus}{ending}", tmp_path / f"other{ending}")
    description = json.loads((corpus.parent / f"{corpus.name}.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(description | {"vocab_size": 500}))
    line = refused(1, *small_run_flags(tmp_path / "other"))
    assert "a tokenizer of 500 ids, and --tokenizer-type ByteTokenizer has 257" in line

    with_hash = description | {"tokenizer_sha256": "0" * 64, "tokenizer_model": "that.model"}
    (tmp_path / "other.json").write_text(json.dumps(with_hash))
    line = refused(1, *small_run_flags(tmp_path / "other"))
    assert "another tokenizer than --tokenizer-type ByteTokenizer: with that.model" in line


@pytest.fixture(scope="module")
def finished_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_ranks(1, PRETRAIN, *small_run_flags(corpus, train_iters=2, save=folder))
    return folder


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"num_layers": 3}, ["--num-layers is 3", "with 2"]),
        ({"rotary_base": 5e5}, ["--rotary-base is 500000.0", "set --finetune, to begin a new"]),
        ({"seed": 7}, ["--seed is 7", "--save into another folder"]),
        ({"objective": "mlm"}, ["--objective is mlm", "with causal", "--save into another folder"]),
        ({"split": "50,40,10"}, ["--split is 50,40,10"]),
        ({"dilation_rates": "1 2 4"}, ["--dilation-rates is 1 2 4", "with 1 2 3"]),
        ({"optimizer": "sgd"}, ["--optimizer is sgd", "with adam", "set --no-load-optim"]),
        ({"finetune": True}, ["--finetune begins a new run", "--save into another folder"]),
    ],
    ids=["model", "positions", "seed", "objective", "split", "pattern", "optimizer", "finetune"],
)
def test_resuming_another_run(corpus, finished_run, changes, names):
    line = refused(1, *small_run_flags(corpus, **changes, save=finished_run, load=finished_run))
    for name in names:
        assert name in line


def test_resuming_without_any_source_of_the_run(corpus, finished_run):
    """Shares may change, and sources come and go, but not all at once."""
    flags = small_run_flags(corpus, save=finished_run, load=finished_run)
    flags[flags.index("--data-path") + 1] = f"other={corpus}"
    line = refused(1, *flags)
    assert f"the training data is other, and the checkpoint {finished_run}/iter_0000002" in line
    assert f"has seen {corpus.name}: keep one of these" in line
    assert "or set --new-data where all is to be new" in line


def test_saving_over_another_run(corpus, finished_run):
    before = (finished_run / "metrics.jsonl").read_bytes()
    line = refused(1, *small_run_flags(corpus, save=finished_run))
    assert f"--load {finished_run} to go on" in line
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_two_runs_in_one_folder(corpus, finished_run):
    import fcntl

    with (finished_run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refused(1, *small_run_flags(corpus, save=finished_run, load=finished_run))
    assert "another run is writing there" in line


def test_gradients_that_are_not_finite(corpus, tmp_path):
    """Results are read late where nothing is due; what is not finite is not saved all the same."""
    lines = [
        refused(1, *small_run_flags(corpus, lr=1e30, lr_warmup_iters=0, **changes))
        for changes in ({}, {"log_interval": 5, "save": tmp_path, "save_interval": 1})
    ]
    assert "not finite at iteration" in lines[0] or "the loss is" in lines[0]
    assert lines[0] == lines[1]
    failed = int(lines[0].split("at iteration ")[1].split(":")[0])
    saved = [int(path.name.removeprefix("iter_")) for path in tmp_path.glob("iter_*")]
    assert sorted(saved) == list(range(1, failed))


@pytest.mark.parametrize("norm", [-1.0, math.inf, math.nan, None])
def test_a_norm_that_is_no_number_ends_the_run(norm):
    """DeepSpeed says -1 where it did not look at the gradients; None is a step that was skipped,
    which fp16 alone may do."""
    result = SimpleNamespace(loss=1.0, grad_norm=norm, usual_loss=None, by_source={})
    for precision in ("fp32", "bf16", "fp16"):
        config = SimpleNamespace(training=SimpleNamespace(precision=precision))
        trainer = SimpleNamespace(_unread=deque([(7, result)]), config=config, progress=Progress())
        if norm is None and precision == "fp16":
            Trainer._read_results(trainer)
            assert trainer.progress.losses == [1.0]
            continue
        with pytest.raises(UserError, match="the gradients are not finite at iteration 7: lower"):
            Trainer._read_results(trainer)
