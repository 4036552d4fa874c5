"""Descriptions that are measured: the arithmetic by hand, and the command on this machine's CPU."""

import contextlib
import json
from unittest import mock

import pytest
import torch

from megalong.dry_run import calibration
from megalong.dry_run.calibration import link_shares, raw_description, write
from megalong.dry_run.cluster import load_cluster
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import REPOSITORY, ranks_command, run, run_here

TOOL = REPOSITORY / "tools" / "calibrate_device.py"


def test_shares_of_a_link():
    # 4 ranks: three quarters of an all_gather's bytes go through each.
    seconds = {"all_gather": [(400, 0.3 + 0.1), (4000, 3 + 0.1)], "send": [(1000, 0.5 + 0.05)]}
    through = {"all_gather": (0.75, 3), "send": (1.0, 1)}
    bandwidth, table = link_shares(seconds, through, {"all_gather": 0.1, "send": 0.05})
    assert bandwidth == 2000
    assert table["all_gather"] == [[400.0, 0.5], [4000.0, 0.5]] and table["send"] == [[1000.0, 1]]
    assert table["others"] == table["all_gather"]


def test_what_is_measured_of_links_is_what_the_cost_model_says(tmp_path):
    """Ranks, bytes and steps of `calibration.THROUGH` are those of `collectives`."""
    from megalong.dry_run.cluster import Cluster, Curve, Device, Link
    from megalong.dry_run.cost import collective_seconds
    from megalong.dry_run.work import Collective

    one = dict.fromkeys(calibration.THROUGH, Curve(((1.0, 1.0),)))
    nobody = Device("d", 1, {}, 1, {}, {}, {}, Curve(((1.0, 1.0),)), 0, 0, 0)
    cluster = Cluster("c", nobody, 8, Link("l", 1.0, 1e-3, one), None, 0.0, 1, 1, 0)
    for name, of in calibration.THROUGH.items():
        for n in (2, 3, 8) if name != "send" else (2,):
            share, steps = of(n)
            found = collective_seconds(Collective("data", "f", name, 1, tuple(range(n))), cluster)
            # Of few bytes to many ranks, an all_reduce goes along a tree, of 2 bytes a byte.
            tree = 2 + steps * 1e-3 if name == "all_reduce" else 0
            assert found == pytest.approx(share + steps * 1e-3) or found == pytest.approx(tree)


# Less to measure, and no training in this process.
SMALL = (
    mock.patch.object(calibration, "COLD", 2**20),
    mock.patch.object(calibration, "call_seconds", lambda clock: 2e-5),
    mock.patch.dict(calibration.PRODUCTS, cpu=(16, 32)),
    mock.patch.dict(calibration.LENGTHS, cpu=(16, 32)),
    mock.patch.dict(calibration.MEMORY, cpu=(1000, 10_000)),
    mock.patch.object(calibration, "FEWEST", 2),
)


def calibrated(output, *flags):
    """The command, on one core."""
    threads = torch.get_num_threads()
    try:
        with contextlib.ExitStack() as stack:
            for patch in SMALL:
                stack.enter_context(patch)
            one = "--output", output, "--device", "cpu", "--ranks", 1, "--seconds", 0.001
            return run_here(TOOL, *one, *flags)
    finally:
        torch.set_num_threads(threads)


def test_one_core_describes_itself(tmp_path):
    output = tmp_path / "new" / "core.yaml"
    done = calibrated(output)
    assert f"--cluster {output}" in done.stdout
    says = " ".join(line.lstrip("# ") for line in output.read_text().splitlines() if line[0] == "#")
    assert "Measured: device.peak_flops, device.memory_bandwidth, device.attainable," in says
    assert says.endswith(
        "Assumed, and yours to set: within_node, collective_seconds, device.overlap,"
        " host.bandwidth, price_per_gpu_hour."
    )
    cluster = load_cluster(str(output))
    assert cluster.gpus_per_node == 1 and cluster.between_nodes is None
    assert cluster.calibrated.endswith("1 rank at a time")
    found = cluster.device
    assert (found.kernel_seconds, found.launch_seconds) == (2e-5, 0)
    for curves in (found.product, found.attention_forward, found.attention_backward):
        assert set(curves) == {"float32", "bfloat16"}
        assert all(len(curve.points) == 2 for curve in curves.values())
    assert max(share for _, share in found.memory_share.points) == pytest.approx(1, abs=0.01)
    # A peak is the best of what was measured, so some call gets all of it.
    best = max(
        share
        for curves in (found.product, found.attention_forward, found.attention_backward)
        for _, share in curves["float32"].points
    )
    assert best == pytest.approx(1, abs=0.01)


def test_launches_are_counted_as_the_cost_model_uses_them(tmp_path):
    """Views, and operators that launch nothing, are in neither; attention's launches in both."""
    output = tmp_path / "launches.json"
    run_ranks(1, __file__.replace("test_calibration", "launches_worker"), output)
    found = json.loads(output.read_text())
    assert found["counted"] == found["dry"] > 100


@pytest.mark.long
def test_two_ranks_describe_their_link(tmp_path):
    output = tmp_path / "ranks.yaml"
    run([*ranks_command(2, str(TOOL), "--output", output, "--device", "cpu", "--seconds", 0.01)])
    cluster = load_cluster(str(output))
    assert cluster.gpus_per_node == 2 and cluster.calibrated.endswith("2 ranks at a time")
    assert cluster.within_node.latency > 0 and 1e-6 < cluster.device.kernel_seconds < 1e-2
    assert cluster.within_node.rate("all_reduce", 2**24) > 1e6


def test_what_is_not_measured_stays_as_it_is_in_the_given_file(tmp_path):
    given, output = tmp_path / "given.yaml", tmp_path / "measured.yaml"
    values = raw_description("cpu")
    values["price_per_gpu_hour"] = 7.0
    values["device"]["peak_flops"] = {"float32": values["device"]["peak_flops"]["float32"]}
    for curves in ("product", "attention_forward", "attention_backward"):
        values["device"]["attainable"][curves] = 0.5
    write(values, given, ["All of it made up."])
    calibrated(output, "--cluster", given)
    text, cluster = output.read_text(), load_cluster(str(output))
    assert f"# As in --cluster {given}: everything else." in " ".join(text.split("\n#   "))
    assert cluster.price == 7 and set(cluster.device.peak_flops) == {"float32"}
    assert cluster.device.peak_flops["float32"] == values["device"]["peak_flops"]["float32"]
    assert set(cluster.device.product) == {"float32"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cluster", "h100"], "--cluster h100 is not of a cpu device"),
        (["--ranks", "4096"], "--ranks 4096: this machine has"),
        (["--ranks", "-1"], "--ranks -1: this machine has"),
        (["--seconds", "0"], "--seconds 0 must be positive"),
        (["--cluster", "h10"], "--cluster h10: no such file, and no such cluster"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    done = run_here(TOOL, "--output", tmp_path / "x.yaml", "--device", "cpu", *flags, check=False)
    assert done.returncode == 2 and message in done.stderr
    with pytest.raises(UserError):
        load_cluster(str(tmp_path / "x.yaml"))
