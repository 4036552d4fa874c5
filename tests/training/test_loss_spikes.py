"""A batch with a far higher loss than usual leaves no trace but in the log."""

import statistics

import pytest

from megalong.training.metrics import read_metrics
from megalong.training.training_loss import LossSpikes
from tests.forked import run_ranks
from tests.launching import PRETRAIN, small_run_flags

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


def test_a_loss_that_stays_high_is_the_usual_one_soon():
    spikes = LossSpikes(2.0, 5, [1.0] * 5)
    found = [spikes.usual_loss(3.0) for _ in range(6)]
    assert found == [1.0, 1.0, 1.0, None, None, None]


def test_a_resumed_run_goes_on_with_the_losses_before(tmp_path):
    whole, halves = LossSpikes(1.1, 6), LossSpikes(1.1, 6)
    losses = [3.0, 2.9, 3.4, 2.7, 2.9, 3.3, 2.2, 2.8, 2.5, 3.1]
    found = [whole.usual_loss(loss) for loss in losses]
    first = [halves.usual_loss(loss) for loss in losses[:4]]
    halves = LossSpikes(1.1, 6, halves.losses)
    assert [*first, *map(halves.usual_loss, losses[4:])] == found
    assert [i for i, usual in enumerate(found) if usual is not None] == [5, 9]


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
