"""The PyTorch backend against the reference, its operators, precision and memory."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import assert_agree, corners, random_case, run_backend, run_reference

from megalong.attention import DilatedPattern, dilated_attention, sdpa, sdpa_operators

CORNERS = corners()


@pytest.mark.parametrize("case", CORNERS, ids=lambda case: case.name)
def test_corner_equals_reference(case):
    inputs = case.inputs()
    assert_agree(run_backend(case, inputs, "sdpa"), run_reference(case, inputs), 1e-10)


@pytest.mark.parametrize(
    "seed", [*range(120), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(120, 400))]
)
def test_random_case_equals_reference(seed):
    case = random_case(seed)
    inputs = case.inputs()
    assert_agree(run_backend(case, inputs, "sdpa"), run_reference(case, inputs), 1e-10)


@pytest.mark.parametrize(
    "case", [*CORNERS, *(random_case(s, 120) for s in range(30))], ids=lambda c: c.name
)
@pytest.mark.parametrize("tile", [2**22, 100])
def test_blockwise_operator_equals_reference(case, tile, monkeypatch):
    """The operator for devices and dtypes without a fused one, also in many small tiles."""
    if tile == 100 and case.length > 130:
        pytest.skip("too many tiles")
    monkeypatch.setattr(sdpa_operators, "operator_for", lambda q: sdpa_operators.BLOCKWISE)
    monkeypatch.setattr(sdpa_operators, "TILE_SCORES", tile)
    inputs = case.inputs()
    assert_agree(run_backend(case, inputs, "sdpa"), run_reference(case, inputs), 1e-10)


@pytest.mark.parametrize("operator", ["FLASH", "EFFICIENT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_operators_take_these_arguments(operator, dtype):
    """Shapes only, on the meta device: the numbers need a GPU."""
    operator = getattr(sdpa_operators, operator)
    q = torch.empty(2, 50, 4, 64, dtype=dtype, device="meta").transpose(1, 2)
    k = q[:, :1].expand(-1, 4, -1, -1)
    out, lse = operator.forward(q, k, k, True, 0.1)
    assert out.shape == q.shape and lse.shape == (2, 4, 50)
    gradients = operator.backward(out, q, k, k, out, lse, True, 0.1)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 4e-7), (torch.bfloat16, 6e-3), (torch.float16, 7e-4)],
)
@pytest.mark.parametrize("name", ["whole-segments", "tail", "grouped", "uneven-tail-bidirectional"])
def test_precision(name, dtype, bound):
    """Against float64 on the same rounded inputs, relative to the norm.

    Rounding a number to bfloat16 once costs 1.7e-3 in this measure, to float16 2e-4; the
    operators also round P, and bfloat16 gradients are rounded in each branch before they add.
    """
    case = next(case for case in CORNERS if case.name == name)
    inputs = case.inputs(dtype)
    found = run_backend(case, inputs, "sdpa")
    expected = run_reference(case, [x.double() for x in inputs])
    assert found["out"].dtype == found["dq"].dtype == dtype
    assert found["lse"].dtype == torch.float32
    for quantity, value in expected.items():
        assert relative_error(found[quantity], value) < bound, quantity


@pytest.mark.parametrize(
    "name", ["grouped", "rows-in-no-branch", "explicit-table", "grouped-block", "no-dense-branch"]
)
def test_gradcheck(name):
    case = next(case for case in CORNERS if case.name == name)
    heads, kv_heads = min(case.heads, 4), min(case.kv_heads, 2)
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(1, 13, h, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    offsets = case.pattern.head_offsets
    if name == "explicit-table":
        offsets = ((0,) * 4, (2, 0, 1, 1))
    pattern = DilatedPattern((4, 8), (1, 3), offsets)
    if name in ("rows-in-no-branch", "no-dense-branch"):
        pattern = DilatedPattern((8,), (5,))
    assert torch.autograd.gradcheck(
        lambda q, k, v: dilated_attention(q, k, v, pattern, backend="sdpa", causal=case.causal),
        qkv,
    )


def test_heads_of_the_mod_rule_share_calls():
    """Diagonals: min(r, heads / r) blocks for a branch, not one for each offset."""
    for rate, blocks in ((1, 1), (2, 2), (4, 3), (8, 2), (16, 1)):
        pattern = DilatedPattern((64,), (rate,))
        assert len(sdpa.blocks(pattern, 128, 12, 12)) == blocks
    pattern = DilatedPattern((32,), (4,))
    assert len(sdpa.blocks(pattern, 96, 4, 4)) == 1  # equal segments go together


def test_blocks_are_views():
    """Where a batch row holds whole segments nothing is copied, whatever the rate."""
    x = torch.randn(2, 64, 4, 8)
    for block in sdpa.blocks(DilatedPattern((16, 32, 64), (1, 2, 8)), 64, 4, 4):
        assert (
            block.fold(block.view_queries(x)).untyped_storage().data_ptr()
            == x.untyped_storage().data_ptr()
        )


MEASURE_PEAK = r"""
import re, sys, torch
from megalong.attention import DilatedPattern, dilated_attention

def forward_and_backward(length):
    q, k, v = (torch.randn(1, length, 2, 64, requires_grad=True) for _ in range(3))
    pattern = DilatedPattern.geometric(length, 256)
    dilated_attention(q, k, v, pattern, backend="sdpa").sum().backward()

def resident_kib(field):  # not ru_maxrss, which a process inherits from its parent
    return int(re.search(rf"{field}:\s*(\d+)", open("/proc/self/status").read())[1])

forward_and_backward(1024)
before = resident_kib("VmRSS")
forward_and_backward(int(sys.argv[1]))
print(1024 * (resident_kib("VmHWM") - before))
"""


def peak_bytes(length: int) -> int:
    """Peak resident memory of one forward and backward, above that of a small one (Linux)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", MEASURE_PEAK, str(length)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return int(result.stdout)


def test_memory_is_linear():
    at_32k, at_64k = peak_bytes(2**15), peak_bytes(2**16)
    assert at_64k <= 2.2 * at_32k
    # Nine tensors like q: q, k, v, the output and its gradient, three gradients and a little more.
    assert at_64k <= 10 * (2**16 * 2 * 64 * 4)
