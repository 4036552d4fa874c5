"""The random generators go on where they were; those that a checkpoint knows nothing of do not."""

import random
from types import SimpleNamespace

import numpy as np
import torch

from megalong.training.engine_state import _load_random_states, _random_states

MESH = SimpleNamespace(rank=3, device=torch.device("cpu"))


def draw():
    return [random.random(), torch.rand(1).item(), np.random.random()]


def test_each_generator_for_itself():
    states = _random_states(MESH)
    assert sorted(states) == ["random.3.numpy", "random.3.python", "random.3.torch"]
    first = draw()

    def load(*names):
        known = {f"random.3.{name}": states[f"random.3.{name}"] for name in names}
        _load_random_states(SimpleNamespace(tensors=known, read=known.__getitem__), MESH)
        return [a == b for a, b in zip(draw(), first, strict=True)]

    assert load("python", "torch", "numpy") == [True, True, True]
    assert load("torch", "numpy") == [False, True, True]
    assert load("python") == [True, False, False]
    assert load() == [False, False, False]
