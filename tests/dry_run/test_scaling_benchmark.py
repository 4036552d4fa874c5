"""tools/benchmarks/scaling.py: a tiny case of each part, and what its tables say."""

import json
import sys

import pytest

from megalong.dry_run import fake_device
from megalong.dry_run.calibration.description import raw_description
from tests.launching import REPOSITORY, run, run_here

SCRIPT = REPOSITORY / "tools" / "benchmarks" / "scaling.py"
sys.path.insert(0, str(SCRIPT.parent))
import limited_link  # noqa: E402
import scaling_link  # noqa: E402
import scaling_report as report  # noqa: E402

REASON = limited_link.why_not()


def scaling(part: str, output, *flags: object, check: bool = True):
    command = [sys.executable, str(SCRIPT), part, "--output", str(output), *map(str, flags)]
    return run(command, timeout=600, check=check)


def plotted(output, *names: str) -> bool:
    return all((output / name).stat().st_size > 10_000 for name in names)


def a_share(tokens: int, seconds: float, nbytes: int = 64, peak: int = 2**20) -> dict:
    """A row of billion.json."""
    spent = {"step": seconds, "processor": 2 * seconds}
    row = {"tokens": tokens, "ranks": tokens // 1024, "peak": peak, "seconds": spent, "runs": []}
    per_layer = {"all_gather": {"calls": 1, "bytes": nbytes}}
    return {**row, "per_layer": per_layer, "first": {"seconds": spent, "parts": {}}}


def test_flat_is_within_a_tenth_and_bytes_alike():
    first = a_share(2048, 1.0)
    assert report.is_flat([first, a_share(4096, 1.09)])
    assert not report.is_flat([first, a_share(4096, 1.11)])
    assert not report.is_flat([first, a_share(4096, 1.0, peak=2**20 * 9 // 8)])
    assert not report.is_flat([first, a_share(4096, 1.0, nbytes=65)])


def test_what_there_is_is_not_measured_again(tmp_path):
    for part, longer in (("attention", 1.5), ("step", 1.0)):
        folder = tmp_path / "share" / part
        folder.mkdir(parents=True)
        rows = [a_share(2048, 1.0), a_share(4096, longer)]
        (folder / "billion.json").write_text(json.dumps({part: rows}))
    done = run_here(SCRIPT, "share", "--output", tmp_path, check=False)
    assert done.returncode == 1  # the attention is not flat
    assert "time 1.500, processor's time 1.500, memory 1.000, bytes a layer 1.000" in done.stdout
    assert "NOT FLAT" in done.stdout and "bytes alike: flat" in done.stdout
    assert plotted(tmp_path, "length.png")


def test_a_limited_link_in_the_description_of_a_machine():
    calibrated = raw_description("cpu")
    free = scaling_link.with_link(calibrated, 2, None)
    assert free == calibrated
    limited = scaling_link.with_link(calibrated, 2, 1e8)["within_node"]
    assert limited["bandwidth"] == pytest.approx(1e8 / 8 * 1448 / 1514)
    # A link so slow gives a collective all that it has; gloo's reduce-scatter sends twice.
    assert limited["attainable"]["all_gather"][-1] == [2.0**24, 1.0]
    assert limited["attainable"]["reduce_scatter"][-1] == [2.0**24, 0.5]
    fast = scaling_link.with_link(calibrated, 2, 1e12)["within_node"]
    for name, curve in calibrated["within_node"]["attainable"].items():
        for (size, part), (_, now) in zip(curve, fast["attainable"][name], strict=True):
            rate = part * calibrated["within_node"]["bandwidth"]  # what it gets without a limit
            assert now * fast["bandwidth"] == pytest.approx(rate), (name, size)


def test_ranks_that_share_a_core_have_half_of_it():
    calibrated = raw_description("cpu")
    four = scaling_link.with_link(calibrated, 4, None)
    for what, factor in (("memory_bandwidth", 0.5), ("kernel_seconds", 2)):
        assert four["device"][what] == pytest.approx(factor * calibrated["device"][what])
    peak = calibrated["device"]["peak_flops"]["float32"]
    assert four["device"]["peak_flops"]["float32"] == peak / 2 and four["gpus_per_node"] == 4


def test_a_cluster_that_was_not_measured_is_one_line(tmp_path):
    done = scaling("link", tmp_path, "--cluster", "h100", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "tools/calibrate_device.py" in done.stderr


@pytest.mark.long
def test_lengths_of_one_process(tmp_path):
    scaling("length", tmp_path, "--lengths", 1024, 2048, "--longest-dense", 1024, "--repeats", 1)
    rows = json.loads((tmp_path / "length.json").read_text())
    assert [row["tokens"] for row in rows] == [1024, 2048]
    assert [len(row["attention"]) for row in rows] == [2, 1]
    for row in rows:
        for found in [*row["attention"].values(), row["step"]]:
            assert found["seconds"] > 0 and found["peak"] > 0
    assert "| 2,048 |" in (tmp_path / "length.md").read_text() and plotted(tmp_path, "length.png")


@pytest.mark.long
def test_shares_of_longer_sequences(tmp_path):
    flags = ["--tokens", 2**15, 2**16, "--shard-length", 2**13, "--spanning-rows", 32]
    scaling("share", tmp_path, *flags, "--repeats", 1, "--step-repeats", 1, check=False)
    found = json.loads((tmp_path / "share.json").read_text())
    for rows in found.values():
        assert [row["ranks"] for row in rows] == [4, 8]
        assert report.flatness(rows)["bytes a layer"] == 1


@pytest.mark.long
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_launch_over_limited_links(tmp_path):
    flags = ["--cluster", "cpu", "--ranks", 2, "--shard-length", 256, "--megabits", 50]
    scaling("link", tmp_path, *flags, "--turns", 1, "--steps", 1)
    free, limited = json.loads((tmp_path / "link.json").read_text())
    assert free["rate"] is None and limited["rate"] == 50e6
    assert limited["carried"] < 50e6 < free["carried"]
    assert limited["inside"] > free["inside"]
    assert limited["sent"] == pytest.approx(limited["predicted"]["sent"], rel=0.15)  # headers
    # What is sent cannot take less; all but nothing else takes part.
    assert limited["seconds"] > 8 * limited["predicted"]["sent"] / 50e6
    assert limited["predicted"]["seconds"] > free["predicted"]["seconds"]
    assert "50 Mbit/s" in (tmp_path / "link.md").read_text() and plotted(tmp_path, "link.png")


@pytest.mark.long
@pytest.mark.skipif(fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler")
def test_weak_scaling_by_dry_run(tmp_path):
    scaling("weak", tmp_path, "--layers", 2, "--ranks", 2, 4, "--shard-length", 2**14)
    rows = json.loads((tmp_path / "weak.json").read_text())
    assert [(row["pattern"], row["ranks"]) for row in rows] == [
        ("three", 2), ("three", 4), ("ladder", 2), ("ladder", 4),
    ]  # fmt: skip
    # Of 2,048 rows of a segment each of 2 ranks, then of 4, has its part.
    assert rows[0]["bytes"]["sequence"] == rows[1]["bytes"]["sequence"] > 0
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in rows)
    assert plotted(tmp_path, "weak.png")
