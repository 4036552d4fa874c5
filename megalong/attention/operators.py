"""The four functions of a backend, as PyTorch operators: megalong::dilated_attention and so on.

A backend is a module with four functions, and one that says where they cannot run:

    forward(q, k, v, pattern, *, causal, scale, documents=None) -> (out, lse)
        Dilated attention. q (batch, sequence, heads, head_dim); k, v (batch, sequence, kv_heads,
        head_dim); out like q; lse (batch, heads, sequence). A query without keys gets output 0 and
        log-sum-exp -inf. documents (`documents.Documents`): places in this sequence; a query at t
        sees the keys start <= key < stop of its own document alone.
    backward(grad_out, q, k, v, out, lse, pattern, *, causal, scale, documents=None) -> (dq, dk, dv)
        The gradients that go through these keys, in the dtype of q, k and v.
    attend_rows(q, k, v, band, *, scale, ranges=None) -> (out, lse)
        Attention of queries (batch, m, heads, head_dim) to other rows (batch, n, kv_heads,
        head_dim), of which each sees what its band (`patterns.Band`) and its range of `ranges`
        (`documents.RowRanges`) have in common. out like q; lse (batch, heads, m).
    attend_rows_backward(grad_out, q, k, v, out, lse, band, *, scale, ranges=None) -> (dq, dk, dv)
        The gradients that go through these keys, in the dtype of lse: they are added to others.
    unsupported(device, dtype, head_dim) -> str | None
        Why it cannot run on such inputs; None where it can. Does not import what may be missing.

Both attentions are parts of one softmax that other keys may belong to. The parts merge by their
log-sum-exps (LongNet, arXiv 2307.02486, eq. 9-12), and in a backward function out and lse are those
of the whole softmax: P = exp(scores - lse), dS = P (dP - rowsum(dO O)), however many keys are
elsewhere. So gradients of the parts only add. Other finite numbers in keys that a query does not
see change nothing in its results, to the last bit.

Inputs are checked: one dtype and device, float64, float32, bfloat16 or float16; any strides; empty
ones too. lse is natural and in at least float32, as is all computation. Results may have any
strides, but share no memory with inputs. Nothing is differentiable, autocast is off. Nothing waits
for a GPU, except that "sdpa" reads the bounds of documents there, once for a batch.

To add a backend, name its module in BACKENDS of `megalong.attention` and its place in AUTO.

Everything that computes attention calls the operators below. torch.compile keeps them in its graph,
fake tensors get fake results and run no kernel, FlopCounterMode counts them: 4 head_dim for each
(query, key) pair of the pattern forward and 2.5 times as much backward, whatever the kernels do and
documents take away. Results are laid out as a fake result says: out, dq, dk and dv in the order of
axes of q, k and v (`empty_rows`), lse contiguous.

Shape suffixes: b batch, s sequence, m query rows, n key rows, h query heads, g kv heads, d
head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch.utils.flop_counter import register_flop_formula

from megalong.attention import AUTO, BACKENDS
from megalong.attention.documents import Documents, RowRanges, documents_of, ranges_of
from megalong.attention.pattern import DilatedPattern
from megalong.attention.patterns import ALL, Band
from megalong.attention.tensors import empty_rows, laid_out_like


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


# Not torch.library.custom_op: its wrappers in Python take 30 to 100 microseconds a call.
torch.library.define(
    "megalong::dilated_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? document_start, Tensor? document_stop, str pattern,"
    " bool causal, float scale, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "megalong::dilated_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? document_start,"
    " Tensor? document_stop, str pattern, bool causal, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "megalong::attend_rows",
    "(Tensor q, Tensor k, Tensor v, Tensor? row_start, Tensor? row_stop, str band, float scale,"
    " str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "megalong::attend_rows_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? row_start,"
    " Tensor? row_stop, str band, float scale, str backend) -> (Tensor, Tensor, Tensor)",
)
ops = torch.ops.megalong


def forward(
    q, k, v, pattern: DilatedPattern, *, causal: bool, scale: float, backend: str,
    documents: Documents | None = None,
):  # fmt: skip
    """Dilated attention: out like q, lse (batch, heads, sequence) in at least float32.

    q (batch, sequence, heads, head_dim); k, v (batch, sequence, kv_heads, head_dim). backend: as
    `choose_backend` takes it; ValueError where that cannot run.
    """
    bounds = (documents.start_bs, documents.stop_bs) if documents else (None, None)
    return ops.dilated_attention(q, k, v, *bounds, pattern.text, causal, scale, backend)


def backward(
    grad, q, k, v, out, lse, pattern: DilatedPattern, *, causal: bool, scale: float, backend: str,
    documents: Documents | None = None,
):  # fmt: skip
    """Gradients (dq, dk, dv) of `forward`, in its inputs' dtype.

    out and lse, like `forward`'s, may be those of a softmax over more keys.
    """
    bounds = (documents.start_bs, documents.stop_bs) if documents else (None, None)
    return ops.dilated_attention_backward(
        grad, q, k, v, out, lse, *bounds, pattern.text, causal, scale, backend
    )


def attend_rows(
    q, k, v, band: Band = ALL, *, scale: float, backend: str, ranges: RowRanges | None = None
):
    """Attention of rows to other rows: out like q, lse (batch, heads, m) in at least float32.

    q (batch, m, heads, head_dim); k, v (batch, n, kv_heads, head_dim). band, ranges: which of the
    key rows each query sees. backend as in `forward`.
    """
    bounds = (ranges.start_bhm, ranges.stop_bhm) if ranges else (None, None)
    return ops.attend_rows(q, k, v, *bounds, band.text, scale, backend)


def attend_rows_backward(
    grad, q, k, v, out, lse, band: Band = ALL, *, scale: float, backend: str,
    ranges: RowRanges | None = None,
):  # fmt: skip
    """Gradients (dq, dk, dv) of `attend_rows`, to be added to others: in the dtype of lse."""
    bounds = (ranges.start_bhm, ranges.stop_bhm) if ranges else (None, None)
    return ops.attend_rows_backward(grad, q, k, v, out, lse, *bounds, band.text, scale, backend)


# ---------------------------------------------------------------------------- with numbers


IMPLEMENTATIONS: dict[str, Callable] = {}  # by name of the operator


def implements(name: str):
    """Registers what an operator does on every device, below autograd."""

    def register(function: Callable) -> Callable:
        IMPLEMENTATIONS[name] = function
        torch.library.impl(f"megalong::{name}", "CompositeExplicitAutograd", function)
        return function

    return register


@implements("dilated_attention")
def _(q_bshd, k_bsgd, v_bsgd, start_bs, stop_bs, pattern, causal, scale, backend):
    with torch.autocast(q_bshd.device.type, enabled=False):
        out_bshd, lse_bhs = choose_backend(backend, q_bshd).forward(
            q_bshd, k_bsgd, v_bsgd, DilatedPattern.from_text(pattern),
            causal=causal, scale=scale, documents=documents_of(start_bs, stop_bs),
        )  # fmt: skip
    return laid_out_like(out_bshd, q_bshd), lse_bhs.contiguous()


@implements("dilated_attention_backward")
def _(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, start_bs, stop_bs, pattern, causal,
    scale, backend,
):  # fmt: skip
    inputs = (q_bshd, k_bsgd, v_bsgd)
    with torch.autocast(q_bshd.device.type, enabled=False):
        gradients = choose_backend(backend, q_bshd).backward(
            grad_bshd, *inputs, out_bshd, lse_bhs, DilatedPattern.from_text(pattern),
            causal=causal, scale=scale, documents=documents_of(start_bs, stop_bs),
        )  # fmt: skip
    return tuple(map(laid_out_like, gradients, inputs))


@implements("attend_rows")
def _(q_bmhd, k_bngd, v_bngd, start_bhm, stop_bhm, band, scale, backend):
    with torch.autocast(q_bmhd.device.type, enabled=False):
        out_bmhd, lse_bhm = choose_backend(backend, q_bmhd).attend_rows(
            q_bmhd, k_bngd, v_bngd, Band.from_text(band),
            scale=scale, ranges=ranges_of(start_bhm, stop_bhm),
        )  # fmt: skip
    return laid_out_like(out_bmhd, q_bmhd), lse_bhm.contiguous()


@implements("attend_rows_backward")
def _(
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, start_bhm, stop_bhm, band, scale, backend
):  # fmt: skip
    inputs = (q_bmhd, k_bngd, v_bngd)
    with torch.autocast(q_bmhd.device.type, enabled=False):
        gradients = choose_backend(backend, q_bmhd).attend_rows_backward(
            grad_bmhd, *inputs, out_bmhd, lse_bhm, Band.from_text(band),
            scale=scale, ranges=ranges_of(start_bhm, stop_bhm),
        )  # fmt: skip
    return tuple(map(laid_out_like, gradients, inputs))


# -------------------------------------------------------------------------- without numbers


@torch.library.register_fake("megalong::dilated_attention")
@torch.library.register_fake("megalong::attend_rows")
def _(q, k, v, *_):
    (batch, queries, heads, _), dtype = q.shape, torch.promote_types(q.dtype, torch.float32)
    return empty_rows(q), q.new_empty(batch, heads, queries, dtype=dtype)


@torch.library.register_fake("megalong::dilated_attention_backward")
def _(grad, q, k, v, *_):
    return empty_rows(q), empty_rows(k), empty_rows(v)


@torch.library.register_fake("megalong::attend_rows_backward")
def _(grad, q, k, v, out, lse, *_):
    return tuple(empty_rows(x, dtype=lse.dtype) for x in (q, k, v))


# ------------------------------------------------------------------------------- FLOPs


@register_flop_formula(ops.dilated_attention)
def _(q_shape, k_shape, v_shape, start, stop, pattern, causal, *_, **__) -> int:
    (batch, length, heads, head_dim), kv_heads = q_shape, k_shape[2]
    pattern = DilatedPattern.from_text(pattern)
    return batch * pattern.attention_flops(length, heads, kv_heads, head_dim, causal)


@register_flop_formula(ops.dilated_attention_backward)
def _(
    grad, q_shape, k_shape, v_shape, out, lse, start, stop, pattern, causal, *_, **__
) -> int:  # fmt: skip
    (batch, length, heads, head_dim), kv_heads = q_shape, k_shape[2]
    pattern = DilatedPattern.from_text(pattern)
    return batch * pattern.attention_flops(length, heads, kv_heads, head_dim, causal) * 5 // 2


@register_flop_formula(ops.attend_rows)
def _(q_shape, k_shape, v_shape, start, stop, band, *_, **__) -> int:
    batch, queries, heads, head_dim = q_shape
    return 4 * head_dim * batch * heads * Band.from_text(band).pairs(queries, k_shape[1])


@register_flop_formula(ops.attend_rows_backward)
def _(grad, q_shape, k_shape, v_shape, out, lse, start, stop, band, *_, **__) -> int:
    batch, queries, heads, head_dim = q_shape
    return 10 * head_dim * batch * heads * Band.from_text(band).pairs(queries, k_shape[1])
