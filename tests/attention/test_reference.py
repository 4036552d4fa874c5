"""The reference against a brute-force loop over positions, written straight from the definition."""

import math
from itertools import chain

import pytest
import torch
from attention_cases import Case, assert_agree, corners, random_case, run_reference

from megalong.attention import dilated_attention_reference
from megalong.attention.pattern import document_bounds


def keys_of(case: Case, branch: int, head: int, i: int) -> list[int]:
    """The positions that a branch offers to the query at position i."""
    segment_length, rate = case.pattern.branches[branch]
    offset = case.pattern.offsets(case.heads, case.kv_heads)[branch][head]

    def takes_part(t):
        return (t % segment_length) % rate == offset

    for start, stop in document_bounds(case.length, case.document_starts):
        if not start <= i < stop or not takes_part(i - start):
            continue
        return [
            j
            for j in range(start, stop)
            if (j - start) // segment_length == (i - start) // segment_length
            and takes_part(j - start)
            and (j <= i or not case.causal)
        ]
    return []


def brute_force(q, k, v, case: Case):
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = q * 0
    lse = q.new_full((case.batch, case.heads, case.length), -math.inf)
    for b in range(case.batch):
        for h in range(case.heads):
            kv = h // (case.heads // case.kv_heads)
            for i in range(case.length):
                offered = [keys_of(case, n, h, i) for n in range(len(case.pattern.branches))]
                keys = [*chain.from_iterable(offered)]  # a multiset: repeats stay
                if not keys:
                    continue
                scores = k[b, keys, kv] @ q[b, i, h] * scale
                lse[b, h, i] = scores.detach().logsumexp(0)
                if case.mix_gradient == "exact":
                    out[b, i, h] = scores.softmax(0) @ v[b, keys, kv]
                    continue
                for branch in filter(None, offered):
                    scores = k[b, branch, kv] @ q[b, i, h] * scale
                    weight = (scores.logsumexp(0) - lse[b, h, i]).exp().detach()
                    out[b, i, h] += weight * (scores.softmax(0) @ v[b, branch, kv])
    return out, lse


SMALL = [c for c in corners() if c.batch * c.heads * c.length <= 250]
SMALL += [c for s in range(60) if (c := random_case(s, 24)).batch * c.heads * c.length <= 250]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_brute_force(case):
    *qkv, grad = case.inputs()
    qkv = [x.detach().requires_grad_() for x in qkv]
    out, lse = brute_force(*qkv, case)
    gradients = torch.autograd.grad(out, qkv, grad, allow_unused=True, materialize_grads=True)
    expected = {
        "out": out.detach(),
        "lse": lse,
        **dict(zip(("dq", "dk", "dv"), gradients, strict=True)),
    }
    assert_agree(run_reference(case, case.inputs()), expected, 1e-12)


def test_mixing_branches_is_one_softmax():
    """The paper's claim under eq. 9-10; detaching the weights changes the gradient only."""
    for case in (corners()[1], corners()[6]):
        *qkv, grad = case.inputs()
        qkv = [x.detach().requires_grad_() for x in qkv]
        options = {**case.options, "mix_gradient": "exact"}
        exact, _ = dilated_attention_reference(*qkv, case.pattern, **options)
        options["mix_gradient"] = "detached"
        mixed, _ = dilated_attention_reference(*qkv, case.pattern, **options)
        torch.testing.assert_close(exact, mixed, rtol=0, atol=1e-13)
        for name, a, b in zip(
            "qkv",
            torch.autograd.grad(exact, qkv, grad),
            torch.autograd.grad(mixed, qkv, grad),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-12) == (name == "v")


def test_low_precision_is_computed_in_float32():
    case = corners()[1]
    q, k, v, _ = case.inputs(torch.bfloat16)
    out, lse = dilated_attention_reference(q, k, v, case.pattern)
    expected, _ = dilated_attention_reference(q.float(), k.float(), v.float(), case.pattern)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected.bfloat16())
