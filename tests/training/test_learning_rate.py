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
        ({}, 60, 0.6),
        ({}, 110, 0.2),
        ({}, 500, 0.2),
        ({"lr_decay_power": 2.0}, 60, 0.2 + 0.8 * 0.25),
        ({"lr_decay_style": "cosine"}, 60, 0.6),
        ({"lr_decay_style": "cosine"}, 35, 0.2 + 0.8 * 0.8535533905932737),
        ({"lr_decay_style": "cosine"}, 110, 0.2),
        ({"lr_decay_style": "constant"}, 5, 0.5),
        ({"lr_decay_style": "constant"}, 500, 1.0),
        ({"lr_warmup_iters": 0}, 1, 0.2 + 0.8 * 109 / 110),
    ],
)
def test_learning_rate(changes, iteration, expected):
    training = dataclasses.replace(TRAINING, **changes)
    assert learning_rate(iteration, training) == pytest.approx(expected, abs=1e-12)
