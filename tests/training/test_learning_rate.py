"""The schedules at the points where they can be told by hand."""

import dataclasses

import pytest

from megalong.config import TrainingConfig
from megalong.training.learning_rate import learning_rate

TRAINING = TrainingConfig(lr=1.0, min_lr=0.2, lr_warmup_iters=10, lr_decay_iters=110)


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
    ],
)
def test_learning_rate(changes, iteration, expected):
    training = dataclasses.replace(TRAINING, **changes)
    assert learning_rate(iteration, training) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("style", ["polynomial", "cosine", "constant"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_every_step_of_a_short_run_trains(style, iterations):
    """Without warm-up the first is at the peak, and the last, with --min-lr 0, not at zero."""
    training = TrainingConfig(lr=1.0, lr_decay_style=style, lr_decay_iters=iterations)
    rates = [learning_rate(i, training) for i in range(1, iterations + 1)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and rates[-1] > 0.2
