"""Forward and backward of an attention as functions, for groups of heads: on whole sequences here,
on sharded ones in `sharded_worker`."""

import dataclasses

import pytest
import torch
from attention_cases import assert_agree, corners, run_backend

from megalong.attention.dilated_passes import DilatedPasses


def run_passes(case, inputs, backend):
    """As `run_backend`."""
    *qkv, grad = inputs
    passes = DilatedPasses(case.pattern, backend=backend, **case.options)
    out, lse, kept = passes.forward(*qkv)
    assert kept == ()
    gradients = passes.backward(grad, *qkv, out, lse, kept)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))


def cut(case, inputs, group, groups):
    """One of so many groups of heads, as a case of its own."""
    heads, kv_heads = (
        slice(group * n // groups, (group + 1) * n // groups) for n in (case.heads, case.kv_heads)
    )
    pattern = case.pattern.for_heads(case.heads, case.kv_heads, heads.start, heads.stop)
    parts = (heads, kv_heads, kv_heads, heads)
    inputs = [x[:, :, part] for x, part in zip(inputs, parts, strict=True)]
    sizes = {"heads": case.heads // groups, "kv_heads": case.kv_heads // groups}
    return dataclasses.replace(case, pattern=pattern, **sizes), inputs


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("case", corners(), ids=lambda case: case.name)
def test_the_functions_find_what_the_public_one_finds_for_all_heads_and_by_groups(case, backend):
    inputs = case.inputs()
    whole = run_backend(case, inputs, backend)
    for groups in (n for n in range(1, case.kv_heads + 1) if case.kv_heads % n == 0):
        parts = []
        for group in range(groups):
            part, part_inputs = cut(case, inputs, group, groups)
            parts.append(run_passes(part, part_inputs, backend))
            public = run_backend(part, part_inputs, backend)
            assert all(torch.equal(parts[-1][name], public[name]) for name in public)
        axes = {name: 1 if name == "lse" else 2 for name in whole}
        together = {name: torch.cat([p[name] for p in parts], axes[name]) for name in whole}
        assert_agree(together, whole, 1e-12)


def test_nothing_is_recorded_and_bad_inputs_are_named():
    case = corners()[0]
    q, k, v, grad = (x.requires_grad_() for x in case.inputs())
    passes = DilatedPasses(case.pattern)
    out, lse, kept = passes.forward(q, k, v)
    gradients = passes.backward(grad, q, k, v, out, lse, kept)
    assert not any(x.requires_grad for x in (out, lse, *gradients))
    with pytest.raises(ValueError, match=r"k is torch\.float32"):
        passes.forward(q, k.float(), v)
