"""Of what pieces over tiles hold, only inputs, outputs and their gradients grow with the rows."""

import json

import pytest

from megalong.dry_run import fake_device
from tests.chunked.fake_memory import BATCH, CASES, CHUNK, HIDDEN, ROWS, VOCABULARY
from tests.forked import run_on_fake_gpu
from tests.launching import made_once

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)

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
def peaks(tmp_path_factory):
    def make(path):
        run_on_fake_gpu(__file__.replace("test_memory", "fake_memory"), path)

    return json.loads(made_once(tmp_path_factory, "tiling_memory.json", make).read_text())


@pytest.mark.parametrize("case", CASES)
def test_what_grows_with_the_rows(case, peaks):
    few, many = (peaks[case][str(rows)] for rows in ROWS)
    a_token, besides = LIMITS[case]
    assert many - few <= a_token * (ROWS[1] - ROWS[0]) * BATCH
    assert few <= a_token * ROWS[0] * BATCH + besides
