"""What a step is made with: the learning rate, skipped spikes, the loss scale of fp16."""

import dataclasses
import statistics
import sys
from types import SimpleNamespace

import pytest

from megalong.config import TrainingConfig
from megalong.training.learning_rate import learning_rate
from megalong.training.metrics import read_metrics
from megalong.training.training_loss import LossSpikes
from tests.forked import run_ranks
from tests.launching import PRETRAIN, small_run_flags

TRAINING = TrainingConfig(lr=1.0, min_lr=0.2, lr_warmup_iters=10, lr_decay_iters=110)
WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}


@pytest.mark.parametrize(
    "changes, iteration, expected",
    [
        ({}, 1, 0.1),
        ({}, 10, 1.0),
        ({}, 11, 1.0),
        ({}, 61, 0.6),
        ({}, 110, 0.2 + 0.8 / 100),
        ({}, 111, 0.2),
        ({}, 500, 0.2),
        ({"lr_decay_power": 2.0}, 61, 0.2 + 0.8 * 0.25),
        ({"lr_decay_style": "cosine"}, 61, 0.6),
        ({"lr_decay_style": "cosine"}, 36, 0.2 + 0.8 * 0.8535533905932737),
        ({"lr_decay_style": "cosine"}, 111, 0.2),
        ({"lr_decay_style": "constant"}, 5, 0.5),
        ({"lr_decay_style": "constant"}, 500, 1.0),
        ({"lr_warmup_iters": 110}, 110, 1.0),
        ({"lr_decay_style": "linear", "lr_decay_power": 3.0}, 61, 0.6),
        ({"lr_decay_style": "inverse-square-root"}, 41, 0.5),
        ({"lr_decay_style": "inverse-square-root"}, 111, (10 / 110) ** 0.5),
        ({"lr_decay_style": "inverse-square-root"}, 112, 0.2),
        ({"lr_decay_style": "inverse-square-root", "min_lr": 0.9}, 110, 0.9),  # before the end
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 0}, 5, 0.5),
        (WSD, 91, 1.0),
        (WSD | {"lr_wsd_decay_style": "linear"}, 101, 0.6),
        (WSD | {"lr_wsd_decay_style": "minus_sqrt"}, 96, 0.6),
        (WSD, 101, 0.2 + 0.8 * (2**0.5 - 1)),
        (WSD | {"lr_wsd_decay_style": "cosine"}, 101, 0.6),
        (WSD, 111, 0.2),
    ],
)
def test_learning_rate(changes, iteration, expected):
    training = dataclasses.replace(TRAINING, **changes)
    assert learning_rate(iteration, training) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    "style, of_wsd",
    [
        *((style, None) for style in ("linear", "cosine", "inverse-square-root", "constant")),
        *(("WSD", style) for style in ("exponential", "linear", "cosine", "minus_sqrt")),
    ],
)
def test_every_step_has_megatrons_rate(style, of_wsd, warmup):
    """That of the steps done before it; of the warm-up, which begins at zero there, of its own."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = SimpleNamespace(param_groups=[{}])
    theirs = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1.0, min_lr=0.2, lr_warmup_steps=warmup, lr_decay_steps=110,
        lr_decay_style=style, start_wd=0.0, end_wd=0.0, wd_incr_steps=1, wd_incr_style="constant",
        wsd_decay_steps=20, lr_wsd_decay_style=of_wsd,
    )  # fmt: skip
    rates = []
    for _ in range(131):
        rates.append(optimizer.param_groups[0]["lr"])
        theirs.step(1)
    training = dataclasses.replace(TRAINING, lr_warmup_iters=warmup, lr_decay_style=style)
    if of_wsd is not None:
        training = dataclasses.replace(
            training, lr_wsd_decay_style=of_wsd, lr_wsd_decay_iters=WSD["lr_wsd_decay_iters"]
        )
    ours = [learning_rate(i, training) for i in range(1, 131)]
    assert ours == pytest.approx(rates[1 : warmup + 1] + rates[warmup:130], abs=1e-12)


# So close to the median that some of these small batches are above it.
CLOSE = {"skip_loss_spikes": 1.0005, "loss_spike_window": 4}
RUN = {"train_iters": 16, "lr_decay_iters": 16, "save_interval": 8, "lr": 1e-5, "split": "1,0,0"}
RUN |= {"micro_batch_size": 1, "global_batch_size": 2}


def test_a_spike_is_measured_by_the_median_of_the_window():
    spikes = LossSpikes(2.0, 4)
    assert [spikes.usual_loss(loss) for loss in (1.0, 9.0)] == [None, None]  # too few yet
    assert spikes.usual_loss(10.0) is None and spikes.usual_loss(10.1) is None
    assert spikes.usual_loss(19.0) is None  # twice the median of 1, 9, 10, 10.1 is exactly that
    assert spikes.usual_loss(20.11) == pytest.approx((10.0 + 10.1) / 2)
    assert list(spikes.losses) == [10.0, 10.1, 19.0, 20.11]
    for loss in (float("inf"), float("nan")):
        assert spikes.usual_loss(loss) is None


def test_a_step_with_nothing_to_predict_says_nothing_of_the_usual_loss():
    spikes = LossSpikes(2.0, 4, [1.0, 1.0])
    assert [spikes.usual_loss(loss) for loss in (0.0, 0.0, 0.0, 1.1)] == [None] * 4
    assert spikes.usual_loss(3.0) == 1.0


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spikes") / "one"
    ended = run_ranks(1, PRETRAIN, *small_run_flags(corpus, **RUN, **CLOSE, save=folder))
    return read_metrics(folder / "metrics.jsonl"), ended.stdout


def test_skipped_batches_are_told(uninterrupted):
    records, said = uninterrupted
    counts = [record["skipped_spikes"] for record in records]
    assert 0 < counts[-1] < 14 and counts == sorted(counts)
    assert said.count("no update is made (--skip-loss-spikes)") == counts[-1]
    for before, record in zip([0, *counts], records, strict=False):
        assert (record["grad_norm"] is None) == (record["skipped_spikes"] > before)


def test_rounding_does_not_decide_which_batches_are_skipped(uninterrupted):
    """Losses of other layouts differ by less, or the next test would be a matter of luck."""
    records, _ = uninterrupted
    factor, window = CLOSE.values()
    losses, counts = ([record[name] for record in records] for name in ("loss", "skipped_spikes"))
    for i in range(window // 2, len(losses)):
        threshold = factor * statistics.median(losses[max(0, i - window) : i])
        assert abs(losses[i] - threshold) > 1e-5 * threshold
        assert (losses[i] > threshold) == (counts[i] > counts[i - 1])


@pytest.mark.parametrize(
    "first, then",
    [
        ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}),
        ({"zero_stage": 3}, {"sequence_parallel_size": 2, "zero_stage": 2}),
    ],
    ids=["tp2 pp2", "dp2-ZeRO3 sp2-ZeRO2"],
)
def test_every_layout_skips_the_same_and_so_does_a_resumed_run(
    corpus, uninterrupted, tmp_path, first, then
):
    half = RUN | {"train_iters": 5}
    run_ranks(
        2, PRETRAIN, *small_run_flags(corpus, **half, **CLOSE, **first, save=tmp_path / "run")
    )
    flags = {**RUN, **CLOSE, **then, "save": tmp_path / "run", "load": tmp_path / "run"}
    run_ranks(2, PRETRAIN, *small_run_flags(corpus, **flags))
    for one, other in zip(
        uninterrupted[0], read_metrics(tmp_path / "run" / "metrics.jsonl"), strict=True
    ):
        assert one["skipped_spikes"] == other["skipped_spikes"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


WORKER = __file__


def test_fp16_skips_overflows_lowers_the_scale_and_learns(corpus, tmp_path):
    """2^22 overflows at first: the steps are skipped until the scale fits. A resumed run goes on
    with the scale of the one before."""
    import json

    shorter = {"seq_length": 64, "segment_lengths": "16 32 64", "global_batch_size": 4}
    flags = small_run_flags(
        corpus, precision="fp16", initial_loss_scale=2**22, save_interval=4, **shorter
    )
    flags += ["--save", str(tmp_path), "--load", str(tmp_path)]
    run_ranks(2, WORKER, *flags, "--train-iters", 8, "--lr-decay-iters", 30)
    state = json.loads((tmp_path / "iter_0000008" / "progress.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    skipped = [r["grad_norm"] is None for r in records if "split" not in r]
    assert skipped[0] and not all(skipped)
    assert state["updates"] == skipped.count(False)
    assert state["loss_scaler"]["cur_scale"] < 2**22

    run_ranks(2, WORKER, *flags, "--train-iters", 30, "--lr-decay-iters", 30)
    whole = tmp_path / "whole"
    flags[flags.index("--save") + 1] = flags[flags.index("--load") + 1] = str(whole)
    run_ranks(2, WORKER, *flags, "--train-iters", 30, "--lr-decay-iters", 30)
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").open()]
        for folder in (tmp_path, whole)
    ]
    assert losses[0][-5:] == losses[1][-5:]
    assert losses[0][-3] < losses[0][0] - 0.5


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    import pretrain_longnet

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    supported = accelerator.supported_dtypes()
    accelerator.supported_dtypes = lambda: supported
    pretrain_longnet.main(sys.argv[1:])
