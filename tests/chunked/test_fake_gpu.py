"""On a GPU that is not there: passes over millions of rows take the memory of their results, and of
what pieces over tiles hold only inputs, outputs and their gradients grow with the rows."""

import json
from pathlib import Path

import pytest

from megalong.dry_run import fake_device
from tests.chunked.fake_gpu import (
    BATCH,
    CHUNK,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LENGTH,
    PIECES,
    ROWS,
    VOCABULARY,
    WIDTH,
)
from tests.forked import run_on_fake_gpu

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)

SLACK = 2**26  # bytes of a pass: what does not grow with the sequence
HIDDEN_STATES = 2 * HIDDEN  # bytes a token, in 16 bits

# Case -> bytes a token, and bytes besides.
LOGITS, WEIGHT = CHUNK * BATCH * VOCABULARY, VOCABULARY * HIDDEN
LOSSES = 8 + 5 * 4  # a label, and the loss, its gradient, the logsumexp and two on the way
OF_LOSSES = 4 * LOGITS + 2 * LOGITS + (2 + 4 + 4) * WEIGHT  # float32 and 16 bits
TILE = CHUNK * BATCH * HIDDEN * 4
LIMITS = {
    "losses": (2 * HIDDEN_STATES + LOSSES, OF_LOSSES),
    "losses of ranks": (2 * HIDDEN_STATES + LOSSES, OF_LOSSES),
    "losses of ranks that divide the rows": (HIDDEN_STATES + LOSSES, OF_LOSSES),
    "RMSNorm": (4 * HIDDEN_STATES, 10 * TILE),
    "LayerNorm": (4 * HIDDEN_STATES, 10 * TILE),
}


@pytest.fixture(scope="module")
def peaks():
    output = run_on_fake_gpu(str(Path(__file__).with_name("fake_gpu.py"))).stdout
    return json.loads(output.splitlines()[-1])


def test_memory_of_four_million_rows(peaks):
    found = {name: peak / LENGTH for name, peak in peaks["passes"].items()}
    expected = {
        "rotation": 2 * HEADS * HEAD_DIM + 2 * HEAD_DIM,  # x and the angles
        "swiglu": 2 * 3 * WIDTH,  # x and y
        "logits": (4 + 2) * WIDTH + 8 + 2 * 4,  # logits, gradient; label, logsumexp, its logit
        "angles": 4 * HEAD_DIM,
        "angles, one per pair": 2 * HEAD_DIM,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value <= found[name] <= value + SLACK / LENGTH, name


@pytest.mark.parametrize("case", PIECES)
def test_what_grows_with_the_rows(case, peaks):
    few, many = peaks["pieces"][case]
    a_token, besides = LIMITS[case]
    assert many - few <= a_token * (ROWS[1] - ROWS[0]) * BATCH
    assert few <= a_token * ROWS[0] * BATCH + besides
