"""Dilated attention: the public function, the choice of backend, autograd and torch.compile.

A backend is a module with five functions:
    unsupported(q) -> str | None                                  why not, or None
    forward(q, k, v, pattern, *, causal, scale, document_starts) -> (out, lse)
    backward(grad_out, q, k, v, out, lse, pattern, *, causal, scale, document_starts,
             mix_gradient) -> (dq, dk, dv)
    attend_rows(q, k, v, *, scale) -> (out, lse)                  dense, queries beside other keys
    attend_rows_backward(grad_out, q, k, v, out, lse, *, scale) -> (dq, dk, dv)
It sees checked inputs only. To add one, name its module in BACKENDS and its place in AUTO.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType, ModuleType

import torch
from torch.autograd.function import once_differentiable

from megalong.attention.pattern import DilatedPattern, check_heads, document_bounds
from megalong.attention.strides import empty_rows, laid_out_like

BACKENDS = MappingProxyType(
    {
        "triton": "megalong.attention.triton",
        "sdpa": "megalong.attention.sdpa",
        "reference": "megalong.attention.reference",
    }
)
AUTO = ("triton", "sdpa")  # what "auto" tries, in this order
BACKEND_VARIABLE = "MEGALONG_ATTENTION_BACKEND"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
    document_starts=None,
    return_lse: bool = False,
    mix_gradient: str = "exact",
):
    """Dilated attention (LongNet, arXiv 2307.02486, eq. 2-15): linear in the sequence length.

    Every query takes ONE softmax over the multiset union of the keys that the branches of the
    pattern offer it: a key that m branches offer counts m times. This equals the paper's
    per-branch softmaxes mixed by their denominators (eq. 9-12). A query that takes part in no
    branch gets output 0 and log-sum-exp -inf.

    q: (batch, sequence, heads, head_dim); float64, float32, bfloat16 or float16, any strides.
    k, v: (batch, sequence, kv_heads, head_dim), heads a multiple of kv_heads; q head h
        reads kv head h // (heads / kv_heads).
    pattern: segment lengths, dilation rates and head offsets.
    causal: a query sees only keys at its own position and before.
    scale: factor on the scores, positive; None is head_dim ** -0.5.
    backend: "triton", "sdpa", "reference", or "auto", which the environment variable
        MEGALONG_ATTENTION_BACKEND overrides.
    document_starts: the first position of each document packed into the sequence, increasing from
        0, the same for every batch row; a sequence of integers or a 1-D tensor (one on a GPU is
        read back to the host). Segments and offsets restart at each document, as if each had been
        called alone. None is one document. Under torch.compile a tensor is an input of the graph,
        where other integers would compile once more.
    return_lse: also return the log-sum-exp.
    mix_gradient: "exact" is the gradient of the function above. "detached" treats the mixing
        weights of the branches as constants, as torchscale does; only for comparing with it.

    Returns out, like q in shape and dtype; with return_lse (out, lse), lse (batch, heads,
    sequence) in natural units and float32 (float64 for float64 inputs). lse is not
    differentiable, in any backend. Raises ValueError naming the argument to change.
    """
    if mix_gradient not in ("exact", "detached"):
        raise ValueError(f'mix_gradient must be "exact" or "detached", got {mix_gradient!r}')
    scale = checked_scale(q, k, v, pattern, scale)

    if torch.compiler.is_compiling() or q.is_meta or type(q) is not torch.Tensor:
        out_bshd, lse_bhs = _operator(
            q, k, v, pattern.segment_lengths, pattern.dilation_rates,
            [o for row in pattern.offsets(q.shape[2], k.shape[2]) for o in row],
            _document_tensor(document_starts),
            bool(causal), scale, backend, mix_gradient,
        )  # fmt: skip
    else:  # the operator would add some 50 microseconds
        document_starts = checked_documents(document_starts, q.shape[1])
        out_bshd, lse_bhs = _DilatedAttention.apply(
            q, k, v, pattern, choose_backend(backend, q), bool(causal), scale,
            document_starts, mix_gradient,
        )  # fmt: skip
    return (out_bshd, lse_bhs) if return_lse else out_bshd


class _DilatedAttention(torch.autograd.Function):
    """Keeps q, k, v, output and log-sum-exp; every backend recomputes the rest."""

    @staticmethod
    def forward(ctx, q, k, v, pattern, backend, causal, scale, document_starts, mix_gradient):
        ctx.backend, ctx.pattern, ctx.mix_gradient = backend, pattern, mix_gradient
        ctx.options = {"causal": causal, "scale": scale, "document_starts": document_starts}
        with torch.autocast(q.device.type, enabled=False):
            out, lse = backend.forward(q, k, v, pattern, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        with torch.autocast(grad_out.device.type, enabled=False):
            gradients = ctx.backend.backward(
                grad_out, *ctx.saved_tensors, ctx.pattern, **ctx.options,
                mix_gradient=ctx.mix_gradient,
            )  # fmt: skip
        return (*gradients, *[None] * 6)


# ------------------------------------------------------------------------ for torch.compile
#
# The same as one opaque operator and one for its gradients, so that no graph breaks inside, with
# any backend. Operators take numbers, strings, tensors and lists of integers: the pattern comes
# as its segment lengths, rates and (flattened, branches x heads) offsets, the documents as a
# tensor. What is registered as fake says how the results look before there are any.


@torch.library.custom_op("megalong::dilated_attention", mutates_args=())
def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment_lengths: list[int],
    dilation_rates: list[int], offsets: list[int], document_starts: torch.Tensor | None,
    causal: bool, scale: float, backend: str, mix_gradient: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out, laid out in memory as q is (empty_rows), and lse, contiguous."""
    pattern = _pattern(tuple(segment_lengths), tuple(dilation_rates), tuple(offsets))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = choose_backend(backend, q).forward(
            q, k, v, pattern, causal=causal, scale=scale,
            document_starts=_document_tuple(document_starts),
        )  # fmt: skip
    return laid_out_like(out, q), lse.contiguous()


@torch.library.custom_op("megalong::dilated_attention_backward", mutates_args=())
def _backward_operator(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, segment_lengths: list[int], dilation_rates: list[int],
    offsets: list[int], document_starts: torch.Tensor | None, causal: bool, scale: float,
    backend: str, mix_gradient: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v, each laid out as its input is."""
    pattern = _pattern(tuple(segment_lengths), tuple(dilation_rates), tuple(offsets))
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = choose_backend(backend, q).backward(
            grad_out, q, k, v, out, lse, pattern, causal=causal, scale=scale,
            document_starts=_document_tuple(document_starts), mix_gradient=mix_gradient,
        )  # fmt: skip
    return laid_out_like(dq, q), laid_out_like(dk, k), laid_out_like(dv, v)


@_operator.register_fake
def _(q, *_):
    (batch, length, heads, _), dtype = q.shape, torch.promote_types(q.dtype, torch.float32)
    return empty_rows(q), q.new_empty(batch, heads, length, dtype=dtype)


@_backward_operator.register_fake
def _(grad_out, q, k, v, *_):
    return empty_rows(q), empty_rows(k), empty_rows(v)


def _keep(ctx, inputs, output):
    q, k, v, *pattern, document_starts, causal, scale, backend, mix_gradient = inputs
    ctx.pattern, ctx.options = pattern, (causal, scale, backend, mix_gradient)
    ctx.save_for_backward(q, k, v, *output, document_starts)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_out, _):
    *tensors, document_starts = ctx.saved_tensors
    gradients = _backward_operator(grad_out, *tensors, *ctx.pattern, document_starts, *ctx.options)
    return (*gradients, *[None] * 8)


_operator.register_autograd(_gradients, setup_context=_keep)


@lru_cache(maxsize=256)
def _pattern(segment_lengths, dilation_rates, offsets) -> DilatedPattern:
    heads = len(offsets) // len(segment_lengths)
    table = [offsets[i : i + heads] for i in range(0, len(offsets), heads)]
    return DilatedPattern(segment_lengths, dilation_rates, table)


# ------------------------------------------------------------------------ choices and checks


def choose_backend(name: str, q: torch.Tensor) -> ModuleType:
    """The module of a backend by name; "auto" takes the first of AUTO that can run on q."""
    if name == "auto":
        name = os.environ.get(BACKEND_VARIABLE) or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"backend (or {BACKEND_VARIABLE}) must be auto, {', '.join(BACKENDS)}; got {name!r}"
        )
    reasons = []
    for candidate in AUTO if name == "auto" else (name,):
        module = import_module(BACKENDS[candidate])
        reason = module.unsupported(q)
        if reason is None:
            return module
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"no attention backend can run on these inputs ({'; '.join(reasons)})")


def checked_scale(q, k, v, pattern, scale) -> float:
    """The scale to compute with. Raises ValueError naming the argument to change."""
    _check_tensors(q, k, v)
    if not isinstance(pattern, DilatedPattern):
        raise ValueError(f"pattern must be a DilatedPattern, got {type(pattern).__name__}")
    pattern.offsets(q.shape[2], k.shape[2])  # a table must fit the heads
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:  # the kernels mask by -inf before they scale
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return scale


def checked_documents(document_starts, sequence_length: int) -> tuple[int, ...] | None:
    """document_starts as integers on the host. Raises ValueError where they do not fit."""
    if document_starts is None:
        return None
    document_starts = _document_tuple(document_starts)
    document_bounds(sequence_length, document_starts)
    return document_starts


def _check_tensors(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, sequence, heads, head_dim), got {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: cast it"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}: give q, k "
                "and v one dtype and one device"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    for axis, size in (("batch", 0), ("sequence", 1), ("head_dim", 3)):
        if q.shape[size] != k.shape[size]:
            raise ValueError(
                f"q and k must agree in {axis}, got {tuple(q.shape)} and {tuple(k.shape)}"
            )
    if q.shape[3] < 1:
        raise ValueError("head_dim must be at least 1")
    check_heads(q.shape[2], k.shape[2])


def _document_tensor(document_starts) -> torch.Tensor | None:
    """Documents as an operator takes them."""
    if document_starts is None or isinstance(document_starts, torch.Tensor):
        return document_starts
    return torch.tensor(document_starts)


def _document_tuple(document_starts) -> tuple[int, ...] | None:
    if document_starts is None:
        return None
    if isinstance(document_starts, torch.Tensor):
        if document_starts.ndim != 1:
            raise ValueError(
                f"document_starts must be 1-D, got shape {tuple(document_starts.shape)}"
            )
        document_starts = document_starts.tolist()
    return tuple(document_starts)
