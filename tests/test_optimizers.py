"""What each optimizer says that it keeps is what PyTorch's keeps, and it starts from there."""

import dataclasses
from pathlib import Path

import pytest
import torch

import megalong.optimizers
from megalong.config import TrainingConfig
from megalong.optimizers import OPTIMIZERS, optimizer_of

[CHOICES] = [
    field.metadata["choices"]
    for field in dataclasses.fields(TrainingConfig)
    if field.name == "optimizer"
]


def test_the_flag_has_all_there_are():
    assert set(OPTIMIZERS) == set(CHOICES)
    files = {path.stem for path in Path(megalong.optimizers.__file__).parent.glob("*.py")}
    assert files == {"__init__", "optimizer", *CHOICES}


@pytest.mark.parametrize("name", CHOICES)
def test_the_first_state_is_that_of_pytorch(name):
    """Its steps and its state are, bit for bit, those of one that makes its own."""
    component = optimizer_of(TrainingConfig(optimizer=name, lr=0.1))
    start, *gradients = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    results = []
    for given in (True, False):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = component.build([{"params": [parameter], "weight_decay": 0.1}], fused=False)
        if given:
            optimizer.state[parameter] = component.first_state(parameter, fused=False)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]))
    (ours, state), (theirs, made) = results
    assert torch.equal(ours, theirs) and not torch.equal(ours, start)
    assert state.keys() == made.keys() == {*component.moments} | ({"step"} & made.keys())
    for key, value in made.items():
        assert torch.equal(state[key], value) and state[key].dtype == torch.float32
    component.set_step(state, 7)
    assert state.get("step", 7) == 7
