"""Documents kept apart, on whole sequences: against the definition, to the last bit independent of
each other, and what is asked of the bounds. On sharded ones: `sharded_worker`, `kinds_worker`."""

import dataclasses
import gc
import weakref

import band_cases
import kind_cases
import numpy as np
import pytest
import torch
from attention_cases import assert_agree, corners, random_case, run_backend, run_reference
from document_cases import bounds, random_ids, same_document
from torch._subclasses import FakeTensorMode

from megalong.attention import (
    DilatedPattern,
    dilated_attention,
    reference,
    sdpa,
    sdpa_bands,
    sdpa_calls,
)
from megalong.attention.documents import Documents, RowRanges
from megalong.attention.reference import offered_keys, softmax_with_multiplicity
from megalong.attention.sdpa import blocks, calls_within
from megalong.attention.sdpa_calls import InPlace
from megalong.attention.tensors import kept_with_tensor

CASES = [
    dataclasses.replace(case, document_seed=seed, batch=max(case.batch, 2))
    for seed, case in enumerate([*corners()[:-1], *(random_case(s, 150) for s in range(70))])
]
LADDER = DilatedPattern((8, 16, 32), (1, 2, 4))


def run_definition(case, inputs) -> dict[str, torch.Tensor]:
    """As `run_reference`, by the ids of documents."""
    *qkv, grad = inputs
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    offered = offered_keys(case.pattern, case.length, case.heads, case.kv_heads, case.causal).sum(0)
    group = case.heads // case.kv_heads
    q_bhid, k_bhjd, v_bhjd = (
        x.repeat_interleave(times, 2).transpose(1, 2)
        for x, times in ((q, 1), (k, group), (v, group))
    )
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    times = offered * same_document(case.ids)[:, None]
    out, lse = softmax_with_multiplicity(q_bhid @ k_bhjd.mT * scale, v_bhjd, times)
    out = out.transpose(1, 2)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse.detach(), *gradients), strict=True))


def test_dilated_attention_equals_the_definition(poisoned):
    for case in CASES:
        inputs = case.inputs()
        expected = run_definition(case, inputs)
        assert_agree(run_reference(case, inputs), expected, 1e-12)
        for backend in ("sdpa", "reference"):
            assert_agree(run_backend(case, inputs, backend), expected, 1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_one_document_makes_the_same_calls(causal):
    pattern = DilatedPattern((64, 128, 512), (1, 2, 6))
    found = calls_within(torch.zeros(2, 500, dtype=torch.int32), pattern, 500, 4, 2, causal)
    assert found == tuple(InPlace(block, causal) for block in blocks(pattern, 500, 4, 2))


def test_few_bits_follow():
    """What is copied is computed in float32, what is not in bfloat16."""
    for name in ("grouped", "uneven-tail-bidirectional", "long-tail-tiles"):
        case = next(case for case in corners() if case.name == name)
        case = dataclasses.replace(case, document_seed=1, batch=2)
        inputs = case.inputs(torch.bfloat16)
        found = run_backend(case, inputs, "sdpa")
        assert found["out"].dtype == found["dq"].dtype == torch.bfloat16
        assert found["lse"].dtype == torch.float32
        for quantity, value in run_reference(case, [x.double() for x in inputs]).items():
            finite = value.isfinite()
            error = (found[quantity].double() - value)[finite].norm() / value[finite].norm()
            assert error < 6e-3, (name, quantity)


def losing(case, inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Which positions some documents have, in each row of the batch, and inputs without their
    numbers."""
    lost = case.ids % 3 == case.seed % 3
    without = [x.clone() for x in inputs]  # in the same order of axes, for the same last bits
    for x in without:
        x[lost] = torch.nan
    return lost, without


def test_no_document_changes_a_bit_of_another():
    """Not even where its numbers are none; outputs, log-sum-exps and gradients in float32."""
    for case in CASES[::2]:
        inputs = [x.clone() for x in case.inputs(torch.float32)]
        lost, without = losing(case, inputs)
        before, after = (run_backend(case, x, "sdpa") for x in (inputs, without))
        for name in before:
            one, other = (x[name].mT if name == "lse" else x[name] for x in (before, after))
            assert torch.equal(one[~lost], other[~lost]), (name, case)
    for case in (kind_cases.random_case(seed) for seed in range(1, 80, 2)):
        passes = case.passes(case.pattern, causal=case.causal, documents=case.documents())
        results = []
        lost, without = losing(case, case.inputs())
        for *qkv, grad in (case.inputs(), without):
            out, lse, kept = passes.forward(*qkv)
            gradients = passes.backward(grad, *qkv, out, lse, kept)
            results.append((out, lse.mT, *gradients))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one[~lost], other[~lost]), case


def ranges_of_any_kind(seed: int) -> tuple[band_cases.BandCase, RowRanges]:
    """A band, and ranges: heads with their own, one bound only, some empty."""
    case = band_cases.random_case(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, case.batch, (1, case.heads)[seed % 2], case.queries)
    draws = torch.randint(0, case.keys + 1, shape, generator=generator, dtype=torch.int32)
    start, stop = (draws // (1 + seed % 4 * 5) * (1 + seed % 4 * 5)).sort(-1).values
    return case, (RowRanges(start, stop), RowRanges(start), RowRanges(None, stop))[seed % 3]


def test_rows_of_any_range():
    """What sharded sequences ask of `attend_rows`: heads with ranges of their own, one bound only,
    and queries that see nothing."""
    for case, ranges in map(ranges_of_any_kind, range(150)):
        inputs = case.inputs()
        expected = band_cases.run_definition(case, inputs, ranges)
        for backend in (sdpa, reference):
            found = band_cases.run_band(case, backend, inputs, ranges)
            for mine, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-11, msg=str(case))


def test_calls_grow_with_the_lengths_and_not_with_the_documents():
    """Documents of about equal length are computed together, long ones where they are."""
    position, pattern = torch.arange(2**15, dtype=torch.int32)[None], DilatedPattern((2048,), (1,))

    def calls(start_bs):
        return calls_within(start_bs, pattern, 2**15, 4, 4, True)

    short = calls(position // 128 * 128)
    assert {call.queries.rows_pm.shape[1] for call in short} == {128}
    generator = torch.Generator().manual_seed(0)
    random = (torch.rand(1, 2**15, generator=generator) < 0.05).int() * position
    lengths = {call.queries.rows_pm.shape[1] for call in calls(random.cummax(1).values)}
    assert len(lengths) < 32 and max(lengths) < 256
    [one] = calls(position * 0)
    assert one.part.whole
    two = calls((position >= 5000) * 5000)
    assert [call.part.segments for call in two] == [2, 1, 1, 13]


@pytest.mark.parametrize("long", [1, 12])
def test_long_pieces_equal_the_definition(long, monkeypatch):
    """What is computed where it is, beside what is copied, a few rows at once."""
    for module in (sdpa, sdpa_bands):
        monkeypatch.setattr(module, "LONG", long)
    monkeypatch.setattr(sdpa_calls, "COPIED", 50)
    for case in CASES[::2]:
        inputs = case.inputs()
        assert_agree(run_backend(case, inputs, "sdpa"), run_definition(case, inputs), 1e-10)
    for case, ranges in map(ranges_of_any_kind, range(60)):
        inputs = case.inputs()
        expected = band_cases.run_definition(case, inputs, ranges)
        for mine, wanted in zip(
            band_cases.run_band(case, sdpa, inputs, ranges), expected, strict=True
        ):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-11, msg=str(case))


def test_a_buffer_that_numpy_writes_to():
    """Of which PyTorch does not know: what a caller gives is looked at in each call."""
    buffer = np.zeros((1, 40), np.int32)
    q = torch.randn(1, 40, 2, 4)
    pattern = DilatedPattern((16, 64), (1, 2))
    mixed = dilated_attention(q, q, q, pattern, document_start=torch.from_numpy(buffer))
    start = torch.from_numpy(buffer)
    dilated_attention(q, q, q, pattern, document_start=start)
    buffer[:, 21:] = 21
    found = dilated_attention(q, q, q, pattern, document_start=start)
    assert torch.equal(found, dilated_attention(q, q, q, pattern, document_start=start.clone()))
    assert not torch.equal(found, mixed)


def test_what_is_made_of_a_tensor_lives_with_it():
    made = []

    @kept_with_tensor
    def double(tensor, other, times):
        made.append(times)
        return tensor * times + other

    tensor, other = torch.ones(3), torch.ones(3)
    assert double(tensor, other, 2) is double(tensor, other, 2) and made == [2]
    assert double(tensor, other.clone(), 2) is not double(tensor, other, 2) and made == [2, 2]
    tensor.add_(1)  # the next batch, in the same memory
    assert double(tensor, other, 2).tolist() == [5, 5, 5]
    result = weakref.ref(double(tensor, other, 3))
    assert result() is not None
    del tensor
    gc.collect()
    assert result() is None
    with torch.inference_mode():
        assert double(torch.ones(1), 0, 2) == 2


def test_gradcheck_and_compiled():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 13, h, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (4, 2, 2)
    )
    start, stop = bounds(random_ids(3, 2, 13))
    pattern = DilatedPattern((4, 8), (1, 3))
    for causal in (True, False):
        options = {"causal": causal, "document_start": start, "document_stop": stop}

        def attend(q, k, v, options=options):
            return dilated_attention(q, k, v, pattern, backend="sdpa", **options)

        assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        results = [
            (out.detach(), *torch.autograd.grad(out.sum(), (q, k, v)))
            for out in (attend(q, k, v), compiled(q, k, v))
        ]
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_operators_keep_their_promises(backend):
    """Schema, no shared memory, fake results as the true ones: by PyTorch."""
    case = next(case for case in CASES if case.name == "grouped")
    q, k, v, grad = case.inputs()
    start, stop = bounds(case.ids)
    ops = torch.ops.megalong
    for causal in (True, False):
        options = (start, None if causal else stop, case.pattern.text, causal, 0.3, backend)
        results = ops.dilated_attention(q, k, v, *options)
        torch.library.opcheck(ops.dilated_attention.default, (q, k, v, *options))
        arguments = (grad, q, k, v, *results, *options)
        torch.library.opcheck(ops.dilated_attention_backward.default, arguments)
    rows = (start[:, None], stop[:, None], "[3, 9, 0, 1, 1]", 0.3, backend)
    results = ops.attend_rows(q, k, v, *rows)
    torch.library.opcheck(ops.attend_rows.default, (q, k, v, *rows))
    torch.library.opcheck(
        ops.attend_rows_backward.default, (grad, q, k, v, *results, *rows)
    )  # fmt: skip


def test_a_dry_run_has_no_numbers_to_ask_for():
    with FakeTensorMode():
        q = torch.empty(2, 40, 4, 8)
        start = torch.empty(2, 40, dtype=torch.int32)
        documents = Documents(start, start)
        out, _ = sdpa.forward(q, q, q, LADDER, causal=False, scale=0.1, documents=documents)
        assert out.shape == q.shape


def test_refuses():
    q = torch.randn(2, 40, 4, 8)
    start = torch.zeros(2, 40, dtype=torch.int32)

    def refuse(message, **options):
        with pytest.raises(ValueError, match=message):
            dilated_attention(q, q, q, LADDER, **options)

    refuse("document_start must be .* int32", document_start=start.long())
    refuse(r"document_start must be .*int32 \(2, 40\)", document_start=start[:, 1:])
    refuse("document_stop must be", document_start=start, document_stop=start[0])
    refuse("document_stop is missing", document_start=start, causal=False)
    refuse("without document_start", document_stop=start)
    case = kind_cases.random_case(1)
    passes = case.passes(case.pattern, documents=Documents(start))
    with pytest.raises(ValueError, match="document_start must be"):
        passes.forward(*case.inputs()[:3])
