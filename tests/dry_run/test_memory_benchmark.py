"""The benchmark of memory runs end to end on a tiny model."""

import json
import sys

import pytest

from megalong.planning import fake_device
from tests.launching import REPOSITORY, run

SCRIPT = str(REPOSITORY / "tools" / "benchmarks" / "memory.py")


@pytest.mark.skipif(fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler")
def test_the_ladder_is_written(tmp_path):
    rungs = ["full recomputation", "+ offload: all on, one tensor a layer"]
    command = [sys.executable, SCRIPT, "ladder", "--tiny", "--output", str(tmp_path)]
    done = run([*command, "--rungs", *rungs])
    plain, on = json.loads((tmp_path / "ladder.json").read_text())
    for row in (plain, on):
        assert set(row["at"]) == {"512", "1024", "2048"}
        assert {"device", "forward", "backward", "host"} < set(row["bytes_per_token"])
        parts = {"attention", "projections", "mlp", "logits"}
        assert parts == set(row["flops_per_token"])
        longest = row["longest"]
        assert longest["tokens"] > 2048 and abs(longest["error"]) < 0.05
        assert f"{longest['tokens']:,}" in done.stdout
    # A matrix of logits is 3 products, and one more where it is made again.
    logits = [sum(row["flops_per_token"]["logits"].values()) for row in (plain, on)]
    assert logits == [3 * 2 * 64 * 512, 4 * 2 * 64 * 512]
    assert on["bytes_per_token"]["device"] < plain["bytes_per_token"]["device"] / 2
    assert (tmp_path / "ladder.png").stat().st_size > 0
