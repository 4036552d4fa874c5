"""z-loss: the logsumexp of the logits, its square in what is minimised, and in a run's metrics."""

import pytest
import torch
import torch.nn.functional as F

from megalong.config.arguments import parse_arguments
from megalong.model.build import build_model
from megalong.parallel import launch
from megalong.training.training_loss import TrainingLoss
from tests.launching import small_run_flags

VOCAB_SIZE = 257
COEFFICIENT = 0.01


def resolved(**changes):
    flags = small_run_flags("unused", z_loss_coeff=COEFFICIENT, **changes)
    return parse_arguments(flags).resolve(1)


@pytest.fixture(scope="module")
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"untie_embeddings_and_output_weights": True},
        {"linear_cross_entropy": True, "loss_chunk_size": 50},
        {"linear_cross_entropy": True, "untie_embeddings_and_output_weights": True},
    ],
    ids=lambda changes: " ".join(changes) or "tied",
)
def test_what_is_minimised_is_that_of_whole_logits(changes, mesh):
    config = resolved(**changes)
    model = build_model(config, VOCAB_SIZE, mesh)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(VOCAB_SIZE, (2, 2, 128), generator=generator)
    mask = torch.rand(2, 128, generator=generator) < 0.8
    inputs = {"input_ids": tokens, "position_ids": torch.arange(128), "attention_mask": None}

    training_loss = TrainingLoss(0.1, 1, COEFFICIENT)
    losses = model(**inputs, labels=labels, beside=training_loss.beside)
    assert losses.shape == (2, 2, 128)
    loss, sums = training_loss(losses, mask, None)
    found = torch.autograd.grad(loss, list(model.parameters()))

    hidden = []
    model.chunks[0].decoder.register_forward_hook(lambda *call: hidden.append(call[-1]))
    model(**inputs, labels=labels)
    weight = dict(model.named_parameters()).get("chunks.0.output_layer.weight")
    if weight is None:
        weight = model.chunks[0].shared_embedding_or_output_weight()
    logits = F.linear(hidden[0].transpose(0, 1), weight)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    z = (logits.logsumexp(-1).square() * mask).sum()
    entropy = (entropy.view_as(labels) * mask).sum()
    expected = torch.autograd.grad(
        0.1 * (entropy + COEFFICIENT * z), list(model.parameters()), allow_unused=True
    )
    assert sums.shape == (3, 1) and sums[1] == 0
    assert sums[0].item() == pytest.approx(entropy.item(), rel=1e-6)
    assert sums[2].item() == pytest.approx(z.item(), rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("coefficient", [0.0, COEFFICIENT])
def test_the_sums_of_several_sources(coefficient):
    losses, source = torch.rand(2, 3, 5), torch.tensor([1, 0, 1])
    mask = torch.tensor([5, 2, 4])[:, None] > torch.arange(5)
    of_all = TrainingLoss(2.0, 2, coefficient)
    loss, sums = of_all(losses if coefficient else losses[0], mask, source)
    loss_sum, by_source, z_sum = of_all.parts(sums + of_all.nothing(sums.device))
    kept = (losses[0] * mask).double()
    expected = torch.stack((kept[1].sum(), kept[0].sum() + kept[2].sum()))
    torch.testing.assert_close(
        by_source, torch.stack((expected, torch.tensor([2.0, 9.0]).double()))
    )
    torch.testing.assert_close(loss_sum, kept.sum())
    z = (losses[1].square() * mask).sum().double()
    torch.testing.assert_close(loss.double(), 2 * (kept.sum() + coefficient * z))
    assert z_sum is None if not coefficient else z_sum == pytest.approx(z.item())
