"""Ranges of rows, turned round: on the device, whatever it is."""

import pytest
import torch
from band_cases import random_case, random_ranges
from document_cases import bounds, random_ids
from torch._subclasses.fake_tensor import FakeTensorMode

from megalong.attention.documents import Documents, RowRanges
from megalong.attention.reference import keys_in
from megalong.attention.triton.ranges import (
    keys_in_documents,
    keys_in_ranges,
    queries_in_documents,
    queries_in_ranges,
)


@pytest.mark.parametrize("seed", range(20))
def test_queries_that_see_a_key(seed):
    case = random_case(seed)
    ranges = random_ranges(case, seed)
    seen = keys_in(RowRanges(*keys_in_ranges(ranges)), case.keys)
    assert torch.equal(seen, keys_in(ranges, case.keys))
    turned = RowRanges(*queries_in_ranges(ranges, case.keys))
    assert torch.equal(keys_in(turned, case.queries), seen.mT)


@pytest.mark.parametrize("causal", [True, False])
def test_queries_in_the_document_of_a_key(causal):
    """Where documents stop follows from where they start."""
    start_bs, stop_bs = bounds(random_ids(2, 4, 50))
    for given in (Documents(start_bs, stop_bs), Documents(start_bs)):
        start, stop = queries_in_documents(given, causal)
        assert torch.equal(stop[:, 0], stop_bs)
        assert start is None if causal else torch.equal(start[:, 0], start_bs)


def test_nothing_comes_to_the_host():
    """Fake tensors have no numbers to ask for."""
    with FakeTensorMode():
        bound = torch.zeros(2, 30, dtype=torch.int32)
        rows = bound[:, None].expand(2, 3, 30)
        found = [
            keys_in_documents(Documents(bound, bound), causal=False),
            queries_in_documents(Documents(bound), causal=True),
            keys_in_ranges(RowRanges(rows, rows)),
            queries_in_ranges(RowRanges(rows, rows), 7),
        ]
    assert [ranges.heads for ranges in found] == [1, 1, 3, 3]
    for end in (x for ranges in found for x in ranges if x is not None):
        assert end.is_contiguous() and end.dtype == torch.int32
