"""Descriptions of devices and clusters: those that we have, and mistakes in those of users."""

import pytest
import torch
import yaml

from megalong.dry_run.cluster import (
    CLUSTERS,
    DEVICES,
    Curve,
    cluster_names,
    load_cluster,
    load_device,
)
from megalong.model.flops import peak_of_name
from megalong.utils.errors import UserError

GPUS = ("a100-80gb", "h100-sxm", "h200", "b200")


@pytest.mark.parametrize("name", cluster_names())
def test_ours_load(name):
    cluster = load_cluster(name)
    assert cluster.gpus_per_node >= 1 and cluster.device.peak("bfloat16") > 0
    assert load_cluster(str(CLUSTERS / f"{name}.yaml")) == cluster


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_those_of_the_training_log(name):
    device = load_device(name)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert device.peak(str(dtype).removeprefix("torch.")) == peak_of_name(device.name, dtype)


def test_shares_are_interpolated_over_the_logarithm_of_the_size():
    curve = Curve(((100.0, 0.2), (10_000.0, 0.6)))
    assert [curve.at(size) for size in (1, 100, 1_000, 10_000, 1e9)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.6]
    )
    assert Curve(((1.0, 0.5),)).at(123) == 0.5


def described(tmp_path, change):
    """A user's file: ours of the H100, with its device in it, changed."""
    values = yaml.safe_load((CLUSTERS / "h100.yaml").read_text())
    values["device"] = yaml.safe_load((DEVICES / "h100-sxm.yaml").read_text())
    change(values)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def test_a_users_file(tmp_path):
    def change(values):
        values["device"]["attainable"]["product"] = {
            "bfloat16": [[1e9, 0.1], [1e12, 0.7]],
            "float16": 0.7,
            "float32": 0.9,
        }
        values["within_node"]["attainable"] = {"all_reduce": 0.5, "others": 0.75}
        values["device"]["calibrated"] = "2026-11-28, NVIDIA H100 80GB HBM3"
        del values["between_nodes"]

    cluster = load_cluster(described(tmp_path, change))
    assert cluster.device.product["bfloat16"].at(1e12) == 0.7
    assert cluster.within_node.rate("all_reduce", 1) == 225e9
    assert cluster.within_node.rate("send", 1) == 337.5e9
    assert cluster.calibrated == "2026-11-28, NVIDIA H100 80GB HBM3"
    cluster.check_gpus(8)
    with pytest.raises(UserError, match="--gpus 9 is more than the 8 of the one node"):
        cluster.check_gpus(9)


def at(*keys, value=None):
    """A change of a file: the value of a key, or that there is none."""

    def change(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value
        if value is None:
            del values[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("gpus_per_node"), "gpus_per_node is missing"),
        (at("host", "memory_attainable"), "host.memory_attainable is missing"),
        (
            lambda values: values.update(gpus_per_nodes=values.pop("gpus_per_node")),
            "gpus_per_nodes is not a key of it; did you mean gpus_per_node",
        ),
        (at("within_node", "adapters", value=2), "within_node.adapters is not a key of it"),
        (at("within_node", "bandwidth", value=1e20), "within_node.bandwidth is 1e.20, and must be"),
        (at("device", "overlap", value=1.2), "device.overlap is 1.2, and must be from 0 to 1"),
        (at("within_node", "attainable", value="most"), "within_node.attainable is most, and must"),
        (
            at("within_node", "attainable", value={"all_reduce": 0.5}),
            "within_node.attainable.all_gather is missing",
        ),
        (
            at("within_node", "attainable", value={"allreduce": 0.5, "others": 0.9}),
            "attainable.allreduce is not a key of it; did you mean all_reduce",
        ),
        (
            at("device", "attainable", "product", value=[[1e9, 0.5], [1e8, 0.6]]),
            "attainable.product has size 1e.08 after 1e.09",
        ),
        (at("device", "attainable", "product", value=[]), "attainable.product is an empty list"),
        (at("device", "attainable", "product", value=[0.5]), "product has the row 0.5"),
        (at("gpus_per_node", value=2.5), "gpus_per_node is 2.5, and must be a whole number"),
        (at("gpus_per_node", value=True), "gpus_per_node is True, and must be"),
        (
            at("device", value="h100"),
            "device cannot be had: no device is called h100; did you mean",
        ),
        (at("device", value=3), "device is 3, and must hold keys of its own"),
        (at("name", value=7), "name is 7, and must be text"),
        (at("price_per_gpu_hour", value=float("nan")), "price_per_gpu_hour is nan, and must be"),
        (at("device", "peak_flops", value={}), "device.peak_flops.bfloat16 is missing"),
    ],
)
def test_mistakes_are_one_line_with_file_and_key(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        load_cluster(described(tmp_path, change))
    assert "mine.yaml, line " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "line 1: not YAML: expected ',' or ']'"),
        ("name: a\ngpus_per_node 8\nhost: {}\n", "line 2: not YAML: a colon is missing"),
        ("- a\n- b\n", "expected keys with values"),
        ("name: a\nname: b\n", "a key stands twice"),
        ("name: a\ndevice: {memory: 1}\n", r"line 2: device.peak_flops is missing"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_cluster(str(path))
    assert "\n" not in str(error.value)


def test_names_that_there_are_not():
    with pytest.raises(UserError, match="--cluster h10: no such file, and no such cluster; did"):
        load_cluster("h10")


def test_a_dtype_without_a_peak():
    with pytest.raises(UserError, match=r"has no peak_flops\.float64: add it"):
        load_device("h100-sxm").peak("float64")
