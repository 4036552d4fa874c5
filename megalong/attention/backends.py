"""The backends of dilated attention: what they must do, their names, and the choice among them.

A backend is a module with four functions, and one that says where they cannot run:

    forward(q, k, v, pattern, *, causal, scale, documents=None) -> (out, lse)
        Dilated attention. q (batch, sequence, heads, head_dim); k, v (batch, sequence, kv_heads,
        head_dim); out like q; lse (batch, heads, sequence). A query without keys gets output 0 and
        log-sum-exp -inf. documents (`documents.Documents`): places in this sequence, and position t
        lies in its own, start <= t < stop; a query sees none of the keys before start, nor, where
        attention is not causal, from stop on.
    backward(grad_out, q, k, v, out, lse, pattern, *, causal, scale, documents=None) -> (dq, dk, dv)
        The gradients that go through these keys, in the dtype of q, k and v.
    attend_rows(q, k, v, band, *, scale, ranges=None) -> (out, lse)
        Attention of queries (batch, m, heads, head_dim) to other rows, of which each sees a range
        (`band.Band`), and of that what lies in its range of `ranges` (`documents.RowRanges`): k, v
        (batch, n, kv_heads, head_dim). out like q; lse (batch, heads, m).
    attend_rows_backward(grad_out, q, k, v, out, lse, band, *, scale, ranges=None) -> (dq, dk, dv)
        The gradients that go through these keys, in the dtype of lse, because they are to be added
        to others.
    unsupported(device, dtype, head_dim) -> str | None
        Why it cannot run on such inputs; None where it can. Does not import what may be missing.

Both attentions are parts of one softmax that other keys may belong to. The parts merge by their
log-sum-exps (LongNet, arXiv 2307.02486, eq. 9-12), and in a backward function out and lse are those
of the whole softmax: P = exp(scores - lse), dS = P (dP - rowsum(dO O)), however many keys are
elsewhere. So gradients of the parts only add.

What a query does not see has no part in its numbers: other finite numbers in one document change
nothing in another, to the last bit. ("triton" multiplies whole tiles and "reference" all rows, and
zero times NaN is NaN; "sdpa" keeps that out as well.)

Inputs are checked: one dtype and device, float64, float32, bfloat16 or float16; any strides; empty
ones too. lse is natural and in at least float32, as is all computation. Results may have any
strides, but share no memory with inputs. Nothing is differentiable, autocast is off. Nothing waits
for a GPU, except that "sdpa" reads the bounds of documents there, once for a batch.

To add a backend, name its module in BACKENDS and its place in AUTO.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BACKENDS = MappingProxyType(
    {
        "triton": "megalong.attention.triton",
        "sdpa": "megalong.attention.sdpa",
        "reference": "megalong.attention.reference",
    }
)
AUTO = ("triton", "sdpa")  # what "auto" tries, in this order


def choose_backend(name: str, q: torch.Tensor) -> ModuleType:
    """The module of a backend by name; "auto" takes the first of AUTO that can run on q.

    Raises ValueError where the name is none, or nothing can run.
    """
    return _choose(name, q.device, q.dtype, q.shape[-1])


@lru_cache(maxsize=256)
def _choose(name: str, device, dtype, head_dim: int) -> ModuleType:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}; got {name!r}")
    reasons = []
    for candidate in AUTO if name == "auto" else (name,):
        module = import_module(BACKENDS[candidate])
        reason = module.unsupported(device, dtype, head_dim)
        if reason is None:
            return module
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"no attention backend can run on these inputs ({'; '.join(reasons)})")
