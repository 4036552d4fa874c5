"""The schedules at the points where they can be told by hand, and beside Megatron-core's."""

import dataclasses
from types import SimpleNamespace

import pytest

from megalong.config import TrainingConfig
from megalong.training.learning_rate import learning_rate

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


@pytest.mark.parametrize("style", ["polynomial", "cosine", "constant", "inverse-square-root"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_every_step_of_a_short_run_trains(style, iterations):
    """Without warm-up the first is at the peak, and the last, with --min-lr 0, not at zero."""
    training = TrainingConfig(lr=1.0, lr_decay_style=style, lr_decay_iters=iterations)
    rates = [learning_rate(i, training) for i in range(1, iterations + 1)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and rates[-1] > 0.2


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
