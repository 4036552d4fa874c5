"""The benchmark of memory runs end to end; and dry runs say what real steps take."""

import json
import sys

import pytest

from megalong.dry_run import fake_device
from megalong.dry_run.work import MEMORY
from tests.launching import REPOSITORY, run

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)
SCRIPT = str(REPOSITORY / "tools" / "benchmarks" / "memory.py")


@pytest.mark.long
def test_the_ladder_is_written(tmp_path):
    rung = "+ offload: all on, one tensor a layer"
    command = [sys.executable, SCRIPT, "ladder", "--tiny", "--output", str(tmp_path)]
    done = run([*command, "--rungs", rung], timeout=600)
    [row] = json.loads((tmp_path / "ladder.json").read_text())
    assert row["rung"] == rung and set(row["at"]) == {"1024", "2048", "4096"}
    per_token, flops, longest = (
        row[name] for name in ("bytes_per_token", "flops_per_token", "longest")
    )
    assert {"device", *MEMORY, "host"} == set(per_token)
    assert {"attention", "projections", "mlp", "logits"} == set(flops)
    # The logits' product and two for its gradients, and once more where they are made again.
    assert sum(flops["logits"].values()) == 4 * 2 * 64 * 500
    # Of 4 layers, in both directions; the forward pass has gate, rest, and the product back.
    assert flops["mlp"]["forward"] == 4 * 3 * 2 * 64 * 128
    # Of 16 MiB: 1.6 MiB, as nearly nothing but what grows with the sequence is in it.
    assert longest["tokens"] > 4096 and abs(longest["error"]) < 0.1
    assert f"{longest['tokens']:,}" in done.stdout and "longest in 16 MiB" in done.stdout
    assert (tmp_path / "ladder.png").stat().st_size > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        ("ladder --shapes 1.2B", ["--shapes 1.2B: ", '"125M"', "; did you mean 1.3B?"]),
        ("ladder --rungs plane", ["--rungs plane: ", '"all on but tiled MLP"', "mean plain?"]),
        ("measured --rungs plain", ["--rungs plain: ", '"all on, two tensors a layer"']),
    ],
)
def test_a_name_that_is_not_known_is_one_line(tmp_path, flags, words):
    command = [sys.executable, SCRIPT, *flags.split(), "--output", str(tmp_path)]
    done = run(command, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in ["error: ", *words]), done.stderr


@pytest.mark.long
def test_a_real_steps_peak_is_that_of_its_dry_run(tmp_path):
    command = [sys.executable, SCRIPT, "measured", "--lengths", "8192", "--output", str(tmp_path)]
    run([*command, "--rungs", "all on, one tensor a layer"], timeout=600)  # at most 5% apart
    [row] = json.loads((tmp_path / "measured.json").read_text())
    assert row["length"] == 8192 and row["measured"] > 2**27
    assert (tmp_path / "measured.md").exists() and (tmp_path / "measured.png").exists()
