"""The kernels in Triton's interpreter, on the CPU. A pytest file of a process of its own.

TRITON_INTERPRET is read when the kernels are first imported, so test_interpreted.py runs this file
and interpret_documents.py in a fresh process with the variable set; the names keep them out of the
ordinary collection. To run it by hand:

    TRITON_INTERPRET=1 python -m pytest tests/attention/triton/interpret_kernels.py

The interpreter multiplies bfloat16 wrongly, so bfloat16 is left to the GPU tests.
"""

import dataclasses
import mmap
import os
import sys

import pytest
import torch
from attention_cases import assert_agree, corners, random_case, run_backend, run_reference
from band_cases import BandCase, run_band, run_definition

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention import triton as triton_backend
from megalong.attention.dilated import DilatedPasses
from megalong.attention.operators import choose_backend
from megalong.attention.patterns import ALL, Band
from megalong.attention.triton import attend_rows, attend_rows_backward, launch, tile_sizes

pytestmark = pytest.mark.usefixtures("quick", "poisoned")
CORNERS = {case.name: case for case in corners()}
RANDOM = int(os.environ.get("RANDOM_CASES", 15))
THINNED = {  # (heads, their keys' heads), and where that leaves no residue to speak of, offsets
    "grouped": (6, 3),
    "grouped-block": (6, 3),
    "one-kv-head": (3, 1),
    "paper-misalignment": (3, 3, ((0, 4, 5), (0, 5, 11))),
}


def small_case(seed: int):
    """A random case of a few tiles: the interpreter runs some fifty programs a second."""
    case = random_case(seed, longest=34, most_heads=2, most_batch=2)
    segments = sum(
        len(list(case.pattern.segments(branch, case.length)))
        for branch in range(len(case.pattern.branches))
    )
    if segments * case.heads * case.batch > 60:
        case = random_case(seed, longest=10, most_heads=2, most_batch=1)
    return case


def agree(case, dtype, tolerances):
    inputs = case.inputs(dtype)
    found = run_backend(case, inputs, "triton")
    expected = run_reference(case, [x.double() for x in inputs])
    assert found["out"].dtype == found["dk"].dtype == dtype
    assert found["lse"].dtype == launch.accumulator(dtype)
    for names, tolerance in tolerances.items():
        assert_agree(
            {name: found[name].double() for name in names.split()},
            {name: expected[name] for name in names.split()},
            tolerance,
        )


@pytest.mark.parametrize("name", CORNERS)
def test_corner_in_float64(name, monkeypatch):
    """Everything but rounding: an error here is a wrong row, mask or weight."""
    if CORNERS[name].length > 200:
        monkeypatch.setattr(tile_sizes, "INTERPRETED", tile_sizes.TileSizes(64, 32, 1, 1))
    agree(thinned(CORNERS[name]), torch.float64, {"out lse dq dk dv": 1e-11})


def rows_far_apart(x_bshd: torch.Tensor, row: int) -> torch.Tensor:
    """The same numbers in memory that is not there but where they are: rows so many numbers apart,
    heads in the first half of them."""
    *_, length, heads, head_dim = x_bshd.shape
    assert x_bshd.shape[0] == 1 and 2 * heads * head_dim <= row
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, length * row * x_bshd.itemsize, flags=flags)
    apart = torch.frombuffer(memory, dtype=x_bshd.dtype)
    strides = 0, row, row // (2 * heads), 1
    return apart.as_strided(x_bshd.shape, strides).copy_(x_bshd)


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is not there")
def test_rows_that_are_far_apart():
    """More than 2^31 numbers from the first row to the last, and to the middle of a segment: bit
    for bit what comes out of rows side by side."""
    pattern = DilatedPattern((16, 48), (1, 3))
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(1, 48, h, 16, generator=generator).half() for h in (4, 4, 2, 2)]
    far = [rows_far_apart(x, 2**26 + 64) for x in near]
    assert 47 * far[0].stride(1) > 2**31

    def run(grad, q, k, v):
        passes = DilatedPasses(pattern, backend="triton")
        out, lse, kept = passes.forward(q, k, v)
        found = [out, lse, *passes.backward(grad, q, k, v, out, lse, kept)]
        out, lse = attend_rows(q, k, v, ALL, scale=0.25)
        return [*found, out, lse, *attend_rows_backward(grad, q, k, v, out, lse, ALL, scale=0.25)]

    for one, other in zip(run(*near), run(*far), strict=True):
        assert torch.equal(one, other)


def thinned(case):
    """A corner with fewer batch rows and heads: its length and pattern are the point."""
    plain = case.heads == case.kv_heads == 4 and case.pattern.head_offsets == "mod"
    same = (case.heads, case.kv_heads)
    heads, kv_heads, *offsets = THINNED.get(case.name, (2, 2) if plain else same)
    pattern = case.pattern
    if offsets:
        pattern = DilatedPattern(pattern.segment_lengths, pattern.dilation_rates, *offsets)
    return dataclasses.replace(case, batch=1, heads=heads, kv_heads=kv_heads, pattern=pattern)


@pytest.mark.parametrize("seed", range(RANDOM))
def test_random_case_in_float32(seed, monkeypatch):
    if seed % 4 == 0:  # blocks of unequal sides, either way
        blocks = (32, 16) if seed % 8 else (16, 32)
        monkeypatch.setattr(tile_sizes, "INTERPRETED", tile_sizes.TileSizes(*blocks, 1, 1))
    if seed % 5 == 0:  # one loop over all tiles, as where registers are scarce
        monkeypatch.setattr(launch, "splits", lambda *_: False)
    agree(small_case(seed), torch.float32, {"out lse": 2e-6, "dq dk dv": 1e-5})


@pytest.mark.parametrize("seed", range(RANDOM, RANDOM + 6))
def test_random_case_in_float16(seed):
    """Inputs, partial outputs and probabilities carry 11 bits."""
    agree(small_case(seed), torch.float16, {"lse": 2e-6, "out": 4e-3, "dq dk dv": 2e-2})


@pytest.mark.parametrize(
    "name", ["grouped", "grouped-block", "tail", "no-dense-branch", "rows-in-no-branch"]
)
def test_gradcheck(name):
    case = CORNERS[name]
    heads = {"grouped": (2, 1), "grouped-block": (4, 2)}.get(name, (2, 2))
    sparse_only = name in ("no-dense-branch", "rows-in-no-branch")
    pattern = (
        DilatedPattern((8,), (5,))
        if sparse_only
        else DilatedPattern((4, 8), (1, 3), case.pattern.head_offsets)
    )
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(1, 9, h, 1, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (heads[0], heads[1], heads[1])
    ]
    assert torch.autograd.gradcheck(
        lambda q, k, v: dilated_attention(q, k, v, pattern, backend="triton", causal=case.causal),
        qkv,
        fast_mode=True,
    )


PATTERNS = [
    (DilatedPattern((8,), (1,)), (1, 3)),
    (DilatedPattern((8, 16), (1, 2)), (2, 5)),
    (DilatedPattern((8, 16, 24, 4, 16), (1, 2, 3, 1, 4)), (2, 5)),
    (DilatedPattern((8, 16), (2, 4)), (2, 5)),
    (DilatedPattern((8, 16, 24), (2, 4, 1)), (2, 5)),
    (DilatedPattern((8, 16, 24, 8), (2, 4, 1, 3)), (2, 5)),
]


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_launches_do_not_depend_on_the_number_of_branches(pattern, expected, monkeypatch):
    names = []
    original = launch.launch

    def counting(kernel, programs, *args, **kwargs):
        if programs:
            names.append(kernel.__name__)
        return original(kernel, programs, *args, **kwargs)

    monkeypatch.setattr(launch, "launch", counting)
    q = torch.randn(1, 24, 1, 16, requires_grad=True)
    out = dilated_attention(q, q, q, pattern, backend="triton")
    forward = len(names)
    out.sum().backward()
    assert (forward, len(names) - forward) == expected


def test_strides_of_zero_and_last_strides():
    """What expand and transpose leave: repeated heads, gradients of a sum, rows with gaps."""
    pattern = DilatedPattern((8, 16), (1, 2))
    q = torch.randn(1, 20, 2, 8, dtype=torch.float64)
    k = torch.randn(1, 20, 1, 8, dtype=torch.float64).expand(1, 20, 2, 8)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, k)]
    gradients = []
    for backend, tensors in (("triton", (q, k, k)), ("triton", turned), ("sdpa", (q, k, k))):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = dilated_attention(*tensors, pattern, backend=backend)
        gradients.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for found in gradients[:2]:
        torch.testing.assert_close(found, gradients[2], rtol=0, atol=1e-12)


BANDS = {
    "more keys than queries": BandCase(ALL, 33, 70),
    "fewer keys than a tile": BandCase(ALL, 17, 5),
    "one query and one key": BandCase(ALL, 1, 1),
    "window": BandCase(Band(19, 1), 50, 50),
    "window of one": BandCase(Band(0, 1), 20, 20),
    "window on both sides": BandCase(Band(5, 6), 40, 40, heads=1),
    "wide window": BandCase(Band(40, 1, first=3), 70, 70, heads=1),
    "rows of an earlier shard": BandCase(Band(before=19, first=33), 19, 33),
    "rows of a later shard": BandCase(Band(after=-9), 20, 25),
    "causal": BandCase(Band(after=1, first=17), 33, 50, heads=1),
    "columns of earlier blocks": BandCase(Band(None, 0, 7, 10, 3), 60, 20),
    "columns of later blocks": BandCase(Band(-1, None, 7, 10, 3), 50, 20),
    "columns as long as blocks": BandCase(Band(1, 1, 0, 16, 16), 64, 64, heads=1),
    "queries that see nothing": BandCase(Band(2, 1, first=30), 20, 16),
    "keys that nobody sees": BandCase(Band(2, 1), 17, 60, heads=1),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize(
    "blocks", [pytest.param((16, 16), marks=pytest.mark.long), (32, 16), (16, 32)]
)
def test_rows_in_a_band(name, blocks, monkeypatch):
    """With the gradients of a softmax over more keys than these, in tiles of equal and of unequal
    sides; the last ones in one loop over all tiles."""
    monkeypatch.setattr(tile_sizes, "INTERPRETED", tile_sizes.TileSizes(*blocks, 1, 1))
    if blocks[0] < blocks[1]:
        monkeypatch.setattr(launch, "splits", lambda *_: False)
    case = BANDS[name]
    inputs = case.inputs()
    for found, expected in zip(
        run_band(case, triton_backend, inputs), run_definition(case, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_shares_of_gradients_are_in_float32():
    q, k, v = (torch.randn(1, 20, 2, 8, dtype=torch.float16) for _ in range(3))
    out, lse = attend_rows(q, k, v, ALL, scale=0.3)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    for share in attend_rows_backward(out, q, k, v, out, lse, ALL, scale=0.3):
        assert share.dtype == torch.float32


def test_compiled_equals_eager():
    case = small_case(3)
    *qkv, grad = case.inputs(torch.float32)

    def attend(q, k, v):
        return dilated_attention(q, k, v, case.pattern, backend="triton", **case.options)

    results = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        inputs = [x.detach().requires_grad_() for x in qkv]
        out = function(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_auto_takes_the_interpreter_but_not_for_bfloat16():
    q = torch.randn(1, 4, 1, 16)
    assert choose_backend("auto", q).__name__.endswith(".triton")
    assert choose_backend("auto", q.bfloat16()).__name__.endswith(".sdpa")
