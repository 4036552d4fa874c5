"""Three tiles of a loop tell all that all of them would."""

import json
from pathlib import Path

import pytest

from megalong.dry_run import fake_device
from tests.forked import run_on_fake_gpu

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)


def test_three_tiles_tell_of_all(tmp_path):
    output = tmp_path / "few_tiles.json"
    run_on_fake_gpu(str(Path(__file__).with_name("few_tiles_cases.py")), output)
    results = json.loads(output.read_text())
    assert len(results) == 4
    for case, found in results.items():
        assert found["operations"] and found["collectives"], case
        few, whole = found["memory"]
        assert few == whole and len(few) > 4, case
        assert found["host"][0] == found["host"][1], case
        assert found["most of one"] > 5, case
