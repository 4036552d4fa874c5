"""Documents kept apart, and ranges of rows, in Triton's interpreter. See interpret_kernels.py."""

import dataclasses

import band_cases
import pytest
import torch
from attention_cases import Case, assert_agree, corners, run_backend, run_reference
from document_cases import bounds, same_document
from interpret_kernels import RANDOM, small_case
from triton.runtime import interpreter

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention import triton as triton_backend
from megalong.attention.reference import offered_keys
from megalong.attention.triton import launch, tile_sizes

pytestmark = pytest.mark.usefixtures("quick", "poisoned")
BLOCKS = ((16, 16), (32, 16), (16, 32))  # of equal and of unequal sides
P = DilatedPattern


def tiles_of(monkeypatch, blocks: tuple[int, int], split: bool = True) -> None:
    monkeypatch.setattr(tile_sizes, "INTERPRETED", tile_sizes.TileSizes(*blocks, 1, 1))
    monkeypatch.setattr(launch, "splits", lambda *_: split)


def agree(case: Case, dtype=torch.float64, tolerance=1e-11) -> None:
    """In float64 an error is a wrong row, mask or weight."""
    inputs = case.inputs(dtype)
    found = {name: x.double() for name, x in run_backend(case, inputs, "triton").items()}
    assert_agree(found, run_reference(case, [x.double() for x in inputs]), tolerance)


@pytest.mark.parametrize("seed", range(RANDOM // 3))
def test_random_documents(seed, monkeypatch):
    tiles_of(monkeypatch, BLOCKS[seed % 3], split=seed % 5 != 0)
    agree(dataclasses.replace(small_case(1000 + seed), document_seed=seed))


@pytest.mark.parametrize("name", ["one-token", "rows-in-no-branch", "offset-beyond-tail"])
def test_documents_in_corners(name):
    case = next(case for case in corners() if case.name == name)
    agree(dataclasses.replace(case, document_seed=3))


LONG = {
    "causal": Case("causal", 110, P((110, 60), (1, 3)), 1, 1, batch=2),
    "bidirectional": Case("bidirectional", 110, P((110,), (1,)), 1, 1, batch=2, causal=False),
    "sparse-alone": Case("sparse-alone", 150, P((150,), (2,)), 1, 1, batch=2, causal=False),
    "slots": Case("slots", 70, P((40, 70), (1, 2), "block"), 4, 2),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LONG)
def test_tiles_inside_documents_and_at_their_ends(name, seed):
    agree(dataclasses.replace(LONG[name], document_seed=seed))


def test_no_document_changes_another():
    """To the last bit, in tiles that they share as well."""
    for causal in (True, False):
        case = Case("bits", 36, P((20, 36), (1, 2)), 2, 1, causal=causal, document_seed=1)
        inputs = case.inputs(torch.float32)
        others = case.ids != case.ids[:, 20, None]
        assert others.any()
        changed = [torch.where(others[..., None, None], x, 10 * x + 1) for x in inputs]
        before, after = (run_backend(case, x, "triton") for x in (inputs, changed))
        for name in before:
            one, other = (x[name].mT if name == "lse" else x[name] for x in (before, after))
            assert torch.equal(one[others], other[others]), name
            assert not torch.equal(one[~others], other[~others]), name


@pytest.mark.parametrize(
    ("blocks", "causal"), [((16, 16), True), ((16, 16), False), ((32, 16), True), ((16, 32), False)]
)
def test_tiles_without_a_pair_are_not_visited(blocks, causal, monkeypatch):
    """The products of tiles are counted as they happen: as few as the definition has tiles."""
    tiles_of(monkeypatch, blocks)
    products = []
    create_dot = interpreter.InterpreterBuilder.create_dot

    def counting(*arguments):
        products.append(1)
        return create_dot(*arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counting)
    case = Case("count", 122, P((122, 100), (1, 4)), heads=1, kv_heads=1, causal=causal)
    q, k, v, grad = (x.requires_grad_() for x in case.inputs(torch.float32))
    counts = []
    for lengths in ([122], [12] * 10 + [2], [1] * 122):
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
        start, stop = bounds(ids)
        options = {"causal": causal, "document_start": start, "document_stop": stop}
        products.clear()
        out = dilated_attention(q, k, v, case.pattern, backend="triton", **options)
        torch.autograd.grad(out, (q, k, v), grad)
        counts.append(needed_tiles(case, ids, *blocks))
        # Two products in the forward kernel, three in that of dq, four in that of dk and dv.
        assert len(products) == 9 * counts[-1]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0] / 2


def needed_tiles(case: Case, ids: torch.Tensor, block_m: int, block_n: int) -> int:
    """The tiles of queries and keys, in the rows of segments, that have a pair that is seen: of one
    head."""
    needed = 0
    offered_nhij = offered_keys(case.pattern, case.length, 1, 1, case.causal) & same_document(ids)
    for branch, [offset] in enumerate(case.pattern.offsets(1, 1)):
        for segment in case.pattern.segments(branch, case.length):
            rows = list(case.pattern.sparse_rows(branch, segment, offset))
            seen = offered_nhij[branch, 0][rows][:, rows]
            needed += sum(
                bool(tile.any())
                for tiles in seen.split(block_m)
                for tile in tiles.split(block_n, dim=1)
            )
    return needed


@pytest.mark.parametrize("seed", range(RANDOM // 5))
def test_rows_in_random_ranges(seed, monkeypatch):
    """Of all heads together or of each, beside a band."""
    tiles_of(monkeypatch, BLOCKS[seed % 3], split=seed % 4 != 0)
    case = band_cases.random_case(seed)
    inputs, ranges = case.inputs(), band_cases.random_ranges(case, seed)
    for found, expected in zip(
        band_cases.run_band(case, triton_backend, inputs, ranges),
        band_cases.run_definition(case, inputs, ranges),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
