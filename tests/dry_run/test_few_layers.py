"""Few layers of a stage tell all that all of them would."""

import json
from pathlib import Path

import pytest

from megalong.dry_run import fake_device
from tests.dry_run.few_layers_cases import CASES, SHORT
from tests.forked import run_on_fake_gpu

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(
            [name for name in CASES if name not in SHORT], id="long", marks=pytest.mark.long
        ),
    ],
)
def test_few_layers_tell_of_all(names, tmp_path):
    output = tmp_path / "few_layers.json"
    script = Path(__file__).with_name("few_layers_cases.py")
    run_on_fake_gpu(str(script), output, *names, timeout=1800.0)
    results = json.loads(output.read_text())
    assert list(results) == names
    for name, found in results.items():
        assert found["few"] == found["whole"], name
        few, all_calls = found["calls"][:2]
        assert few < all_calls, name
        assert len(found["whole"]["memory"]) > 4, name
        assert found["rotary"] == 1, name
    first = results[names[0]]
    assert first["fallen"] == first["whole"]
    assert first["calls"][2] == first["calls"][0] + first["calls"][1]
