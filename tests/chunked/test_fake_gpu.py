"""Millions of rows on a GPU that is not there: no waits, and no memory but that of the results."""

import json
from pathlib import Path

import pytest

from megalong.dry_run import fake_device
from tests.chunked.fake_gpu import HEAD_DIM, HEADS, LENGTH, WIDTH
from tests.forked import run_on_fake_gpu

SLACK = 2**26  # bytes: what does not grow with the sequence


@pytest.mark.skipif(fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler")
def test_memory_of_four_million_rows():
    output = run_on_fake_gpu(str(Path(__file__).with_name("fake_gpu.py"))).stdout
    found = {name: peak / LENGTH for name, peak in json.loads(output.splitlines()[-1]).items()}
    expected = {
        "rotation": 2 * HEADS * HEAD_DIM + 2 * HEAD_DIM,  # x and the angles
        "swiglu": 2 * 3 * WIDTH,  # x and y
        "losses": (4 + 2) * WIDTH + 8 + 2 * 4,  # logits, gradient; label, logsumexp, its logit
        "angles": 4 * HEAD_DIM,
        "angles, one per pair": 2 * HEAD_DIM,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value <= found[name] <= value + SLACK / LENGTH, name
