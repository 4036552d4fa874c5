"""What each optimizer says that it keeps is what PyTorch's keeps, and it starts from there."""

import dataclasses

import pytest
import torch

from megalong.config import TrainingConfig
from megalong.model.optimizers import OPTIMIZERS, optimizer_of, orthogonalized, update_scale

[CHOICES] = [
    field.metadata["choices"]
    for field in dataclasses.fields(TrainingConfig)
    if field.name == "optimizer"
]


def test_the_flag_has_all_there_are():
    assert set(OPTIMIZERS) == set(CHOICES)


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
    moments = component.moments_of(is_layer_matrix=False)
    assert state.keys() == made.keys() == {*moments} | ({"step"} & made.keys())
    for key, value in made.items():
        assert torch.equal(state[key], value) and state[key].dtype == torch.float32
    component.set_step(state, 7)
    assert state.get("step", 7) == 7


class OneMatrix:
    """A partition that is one whole matrix."""

    def __init__(self, shape):
        self.shape = shape

    def updates(self, direction, update_of):
        whole = direction(0, self.shape[0] * self.shape[1]).view(self.shape)
        yield 0, update_of(whole).flatten()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mode, theirs", [("spectral", "match_rms_adamw"), ("shape_scaling", None)])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_muon_is_that_of_pytorch(shape, mode, theirs, nesterov):
    """In bf16, in which PyTorch's computes."""
    training = TrainingConfig(
        optimizer="muon",
        muon_scale_mode=mode,
        muon_nesterov=nesterov,
        muon_extra_scale_factor=0.2 if theirs else 1.0,
        precision="bf16",
    )
    start, *gradients = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    parameter, partition = (
        torch.nn.Parameter(tensor.clone()) for tensor in (start, start.flatten())
    )
    reference = torch.optim.Muon(
        [parameter], lr=0.1, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=theirs
    )
    component = optimizer_of(training)
    group = {"params": [partition], "weight_decay": 0.3, "lr": 0.1, "layer_matrices": True}
    ours = component.build([group | {"whole_matrices": OneMatrix(shape)}], fused=False)
    ours.state[partition] = component.first_state(partition, False, of_layer_matrices=True)
    assert ours.state[partition].keys() == {*component.moments_of(is_layer_matrix=True)}
    for gradient in gradients:
        parameter.grad, partition.grad = gradient.clone(), gradient.flatten().clone()
        reference.step()
        ours.step()
    torch.testing.assert_close(partition.view(shape), parameter, rtol=1e-6, atol=1e-6)
    for key, value in reference.state[parameter].items():
        assert torch.equal(ours.state[partition][key].view(shape), value)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_an_orthogonalized_matrix_has_the_same_singular_vectors(shape):
    """And values between 0.6 and 1.3, in float32 too."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ orthogonalized(matrix, 5) @ vt.T
    assert values.dtype == torch.float32
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-4
    assert not orthogonalized(torch.zeros(shape), 5).any()


def test_the_scales_of_muon():
    """Those of Megatron."""
    for mode, scales in (
        ("spectral", (3.0, 3.0)),
        ("shape_scaling", (1.5, 1.0)),
        ("unit_rms_norm", (1.5, 2 / 3)),
    ):
        training = TrainingConfig(muon_scale_mode=mode, muon_extra_scale_factor=1.0)
        found = [update_scale(rows, columns, training) for rows, columns in ((9, 4), (4, 9))]
        assert found == pytest.approx(scales)
