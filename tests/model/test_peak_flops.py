"""The peak of a device, by its name or measured."""

import pytest
import torch

from megalong.model.flops import measured_flops, peak_flops, peak_of_name


@pytest.mark.parametrize(
    "name, bf16, tf32, fp32",
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA B200", 2250, 1125, 75),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 182.1, 91.1),
    ],
)
def test_known_devices(name, bf16, tf32, fp32):
    assert peak_of_name(name, torch.bfloat16) == peak_of_name(name, torch.float16) == bf16 * 1e12
    assert peak_of_name(name, torch.float32, tf32=True) == tf32 * 1e12
    assert peak_of_name(name, torch.float32) == fp32 * 1e12


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA X1000"],
)
def test_unknown_devices(name):
    assert peak_of_name(name, torch.bfloat16) is None


def test_a_cpu_is_measured():
    cpu = torch.device("cpu")
    peak, source = peak_flops(cpu, torch.float32)
    assert source == "measured" and 1e8 < peak < 1e14
    assert measured_flops(cpu, torch.bfloat16) > 1e7
