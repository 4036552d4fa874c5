"""The reference against a brute-force loop over positions, written straight from the definition."""

import math
from itertools import chain

import pytest
import torch
from attention_cases import Case, assert_agree, corners, random_case, run_reference

from megalong.attention import dilated_attention_reference


def keys_of(case: Case, branch: int, head: int, i: int) -> list[int]:
    """The positions that a branch offers to the query at position i."""
    segment_length, rate = case.pattern.branches[branch]
    offset = case.pattern.offsets(case.heads, case.kv_heads)[branch][head]

    def takes_part(t):
        return (t % segment_length) % rate == offset

    if not takes_part(i):
        return []
    return [
        j
        for j in range(case.length)
        if j // segment_length == i // segment_length
        and takes_part(j)
        and (j <= i or not case.causal)
    ]


def brute_force(q, k, v, case: Case):
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = q * 0
    lse = q.new_full((case.batch, case.heads, case.length), -math.inf)
    for b in range(case.batch):
        for h in range(case.heads):
            kv = h // (case.heads // case.kv_heads)
            for i in range(case.length):
                branches = range(len(case.pattern.branches))
                # a multiset: repeats stay
                keys = [*chain.from_iterable(keys_of(case, n, h, i) for n in branches)]
                if not keys:
                    continue
                scores = k[b, keys, kv] @ q[b, i, h] * scale
                lse[b, h, i] = scores.detach().logsumexp(0)
                out[b, i, h] = scores.softmax(0) @ v[b, keys, kv]
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


def test_low_precision_is_computed_in_float32():
    case = corners()[1]
    q, k, v, _ = case.inputs(torch.bfloat16)
    out, lse = dilated_attention_reference(q, k, v, case.pattern)
    expected, _ = dilated_attention_reference(q.float(), k.float(), v.float(), case.pattern)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected.bfloat16())
