"""The memory path in bfloat16 errs no more than the plain path does, measured from float32."""

import pytest
import torch

from megalong.config.arguments import parse_arguments
from megalong.model.build import build_model
from megalong.model.stage import named_parameters
from megalong.parallel import launch
from tests.launching import small_run_flags

VOCAB_SIZE = 257
SHAPE = {"hidden_size": 64, "micro_batch_size": 2, "seq_length": 512, "qk_layernorm": True}
SHAPE |= {"segment_lengths": "64 256", "dilation_rates": "1 3"}
ON = {"memory_path": "on", "tile_size": 100, "loss_chunk_size": 60}
PATHS = {
    "off": {"memory_path": "off"},
    "on": ON,
    "on, recomputed": {**ON, "recompute_granularity": "full"},
}


@pytest.fixture(scope="module")
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


def resolved(**changes):
    return parse_arguments(small_run_flags("unused", **SHAPE, **changes)).resolve(1)


def gradients(mesh, weights, seed, precision, **changes) -> dict[str, torch.Tensor]:
    """Of the mean loss, in float64. weights: copied into the model, where there are any."""
    model = build_model(resolved(precision=precision, seed=seed, **changes), VOCAB_SIZE, mesh)
    named = dict(named_parameters(model))
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB_SIZE, (2, SHAPE["seq_length"] + 1), generator=generator)
    losses = model(
        input_ids=tokens[:, :-1],
        position_ids=torch.arange(SHAPE["seq_length"]),
        attention_mask=None,
        labels=tokens[:, 1:],
    )
    losses.mean().backward()
    weights |= {name: parameter.detach() for name, parameter in named.items()}
    return {name: parameter.grad.double() for name, parameter in named.items()}


@pytest.mark.parametrize("how", ["on", "on, recomputed"])
def test_gradients_in_bfloat16_are_as_near_to_the_exact_ones(mesh, how):
    """Averaged over seeds and parameters; each parameter's own error is mostly the rounding of the
    same activations, and half of them are larger by chance."""
    ratios = []
    for seed in range(4):
        weights: dict[str, torch.Tensor] = {}
        plain = gradients(mesh, weights, seed, "bf16", **PATHS["off"])
        tiled = gradients(mesh, weights, seed, "bf16", **PATHS[how])
        exact = gradients(mesh, weights, seed, "fp32", **PATHS["off"])
        for name in exact:
            error = [(found[name] - exact[name]).norm() for found in (tiled, plain)]
            ratios.append(float(error[0] / error[1]))
    print(how, sum(ratios) / len(ratios), max(ratios))
    assert sum(ratios) / len(ratios) <= 1.0
    assert max(ratios) < 1.5
