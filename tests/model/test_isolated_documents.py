"""Documents that are kept apart: what stands in one changes nothing in another, to the last bit."""

from itertools import pairwise

import pytest
import torch

from megalong.config.arguments import parse_arguments
from megalong.model.build import build_model
from megalong.parallel import launch
from tests.launching import small_run_flags

VOCAB_SIZE = 257
KINDS = {
    "attention": "dilated local dense sparse",
    "num_layers": 4,
    "segment_lengths": "16 50 128",
    "dilation_rates": "1 3 5",
    "window_size": 40,
    "sparse_block_size": 20,
    "sparse_columns": 3,
}
BORDERS = [[0, 1, 30, 64, 100, 128], [0, 90, 91, 92, 120, 128]]  # of two rows


def resolved(**changes):
    return parse_arguments(small_run_flags("unused", **KINDS, **changes)).resolve(1)


@pytest.fixture(scope="module")
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


PATHS = {"plain": {}, "memory path": {"memory_path": "on", "tile_size": 100, "loss_chunk_size": 60}}


@pytest.mark.parametrize("objective", ["causal", "mlm"])
@pytest.mark.parametrize("path", PATHS)
def test_another_document_changes_no_loss(mesh, path, objective):
    config = resolved(objective=objective, **PATHS[path])
    model = build_model(config, VOCAB_SIZE, mesh).eval()
    starts, stops = torch.empty(2, 2, 128, dtype=torch.int32)
    for row, borders in enumerate(BORDERS):
        for first, stop in pairwise(borders):
            starts[row, first:stop], stops[row, first:stop] = first, stop
    bounds = {"document_start": starts}
    if objective == "mlm":
        bounds["document_stop"] = stops
    generator = torch.Generator().manual_seed(0)
    tokens, labels, others = torch.randint(VOCAB_SIZE, (3, 2, 128), generator=generator)

    @torch.no_grad()
    def losses(tokens, bounds):
        places = torch.arange(128)
        return model(
            input_ids=tokens, position_ids=places, attention_mask=None, labels=labels, **bounds
        )

    before, mixed = losses(tokens, bounds), losses(tokens, {})
    begins = (starts == 0) if objective == "causal" else (starts == 0) & (stops == 128)
    torch.testing.assert_close(before[begins], mixed[begins])  # nothing was before it
    assert (before != mixed)[~begins].float().mean() > 0.9
    for first, stop in ((1, 30), (64, 100), (90, 91)):
        inside = torch.zeros(2, 128, dtype=torch.bool)
        inside[:, first:stop] = True
        of_document = torch.zeros_like(inside)  # those that have a token inside
        for row in range(2):
            touched = starts[row][inside[row]].unique()
            of_document[row] = torch.isin(starts[row], touched)
        changed = losses(torch.where(inside, others, tokens), bounds)
        assert torch.equal(changed[~of_document], before[~of_document])
        assert (changed != before)[inside].float().mean() > 0.9
