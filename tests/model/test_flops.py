"""FLOPs by part: by hand, by PyTorch's counter, by counting every score; the peak of a device."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalong.config.arguments import parse_arguments
from megalong.model.build import build_model
from megalong.model.flops import (
    PARTS,
    forward_flops,
    measured_flops,
    peak_flops,
    peak_of_name,
    step_flops,
)
from megalong.parallel import launch
from tests.launching import small_run_flags

VOCAB_SIZE, LENGTH, LAYERS, HEADS = 257, 128, 2, 4
MODULES = {
    "qkv": ("self_attention.linear_qkv",),
    "attention_output": ("self_attention.linear_proj",),
    "mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "logits": ("output_layer",),
}


def resolved(**changes):
    return parse_arguments(small_run_flags("unused", **changes)).resolve(1)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


def test_by_hand():
    """2 layers of width 64, 4 heads and 2 key/value heads of 16 channels, an MLP of 192, 384 rows
    of the vocabulary, 128 tokens; branches 32/1, 64/2 and 128/3."""
    forward = {
        "qkv": 2 * 2 * 128 * 64 * (64 + 32 + 32),
        # A head's scores: 4 segments of 32 rows, 2 of 32, 1 of 43 (offsets 0 and 1 alike).
        "attention": 2 * 4 * (4 * 528 + 2 * 528 + 946) * 4 * 16,
        "attention_output": 2 * 2 * 128 * 64 * 64,
        "mlp": 2 * 3 * 2 * 128 * 64 * 192,
        "logits": 2 * 128 * 64 * 384,
    }
    assert forward_flops(resolved(), VOCAB_SIZE) == forward
    dense = forward | {"attention": 2 * 4 * 8256 * 4 * 16}
    assert forward_flops(resolved(), VOCAB_SIZE, dense=True) == dense
    assert forward_flops(resolved(attention="dense"), VOCAB_SIZE) == dense
    # Looking both ways, all pairs of a segment's rows.
    both = {"objective": "mlm"}
    attention = 2 * 4 * (4 * 32**2 + 2 * 32**2 + 43**2) * 4 * 16
    assert forward_flops(resolved(**both), VOCAB_SIZE) == forward | {"attention": attention}
    dense = forward_flops(resolved(**both), VOCAB_SIZE, dense=True)
    assert dense == forward | {"attention": 2 * 4 * 128**2 * 4 * 16}
    assert step_flops(resolved(), VOCAB_SIZE) == {part: 24 * n for part, n in forward.items()}
    assert sum(step_flops(resolved(), VOCAB_SIZE).values()) == 805_527_552


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_swiglu": True, "add_bias_linear": True, "num_query_groups": 1, "kv_channels": 32},
        {"attention": "dense", "qk_layernorm": True, "recompute_granularity": "selective"},
    ],
    ids=lambda changes: " ".join(map(str, changes)) or "defaults",
)
def test_pytorch_counts_the_same_for_all_parts_but_attention(mesh, changes):
    """Forward and backward of a real model, module by module: three times the forward pass."""
    config = resolved(**changes)
    model = build_model(config, VOCAB_SIZE, mesh)
    tokens = torch.randint(VOCAB_SIZE, (2, LENGTH))
    with FlopCounterMode(display=False, depth=None) as counter:
        losses = model(tokens, torch.arange(LENGTH), attention_mask=None, labels=tokens)
        losses.sum().backward()
    counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    ours = forward_flops(config, VOCAB_SIZE)
    for part, modules in MODULES.items():
        theirs = sum(n for name, n in counted.items() if name.endswith(modules))
        assert theirs == 3 * 2 * ours[part], part
    assert {*MODULES, "attention"} == set(PARTS) == set(ours)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, torch.arange(LENGTH), attention_mask=None, labels=tokens)
    assert counter.get_total_flops() == 2 * sum(ours.values())


@pytest.mark.parametrize("rule", ["mod", "block", "layer"])
def test_attention_is_the_exact_number_of_scores(rule):
    """Every pair of positions of every head, branch and layer, looked at one by one."""
    branches = ((32, 1), (50, 2), (300, 7))
    config = resolved(
        head_offsets=rule,
        segment_lengths=" ".join(str(length) for length, _ in branches),
        dilation_rates=" ".join(str(rate) for _, rate in branches),
    )
    scores = 0
    for layer in range(LAYERS):
        for head in range(HEADS):
            for length, rate in branches:
                offset = {
                    "mod": head // 2 % rate,
                    "block": head // -(-HEADS // rate),
                    "layer": (head // 2 + 2 * layer) % rate,
                }[rule]
                taking_part = [t for t in range(LENGTH) if t % length % rate == offset]
                scores += sum(
                    key <= query and key // length == query // length
                    for query in taking_part
                    for key in taking_part
                )
    assert forward_flops(config, VOCAB_SIZE)["attention"] == scores * 4 * 16
    dense = forward_flops(config, VOCAB_SIZE, dense=True)["attention"]
    assert dense == LAYERS * HEADS * LENGTH * (LENGTH + 1) // 2 * 4 * 16


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
