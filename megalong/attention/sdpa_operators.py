"""Dense attention that also returns its log-sum-exp, and its backward: PyTorch's own operators.

Which of them runs depends on device, dtype and head_dim; where none does, a blockwise one of
PyTorch's elementary operations. PyTorch documents none of the fused ones. Their names, all of
`torch.ops.aten`, stand in this file and not in `megalong.utils.torch_private`, since the attention
imports nothing else of megalong.

Shape suffixes: f batch, h heads, n rows, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

aten = torch.ops.aten
TILE_SCORES = 2**22  # scores that the blockwise operator holds at once


class Operator(NamedTuple):
    """A dense attention that returns its log-sum-exp, and its backward."""

    forward: Callable
    backward: Callable


def attend(q_fhnd, k_fhnd, v_fhnd, causal: bool, scale: float, bias=None):
    """Dense attention: output like q, log-sum-exp (batch, heads, rows) in at least float32.

    q, k and v have equally many heads and may be any views whose last stride is 1. causal needs
    as many queries as keys; without it their numbers may differ. bias: added to the scores,
    (batch, 1, 1, keys) in the dtype of q; not with causal, and on a CPU only.
    """
    options = {} if bias is None else {"bias": bias}
    operator = ONE_KEY if k_fhnd.shape[2] == 1 else operator_for(q_fhnd)
    return operator.forward(q_fhnd, k_fhnd, v_fhnd, causal, scale, **options)


def attend_backward(grad_fhnd, q_fhnd, k_fhnd, v_fhnd, out_fhnd, lse_fhn, causal, scale, bias=None):
    """Gradients (dq, dk, dv) of attend; out and lse may be those of a softmax over more keys."""
    options = {} if bias is None else {"bias": bias}
    operator = ONE_KEY if k_fhnd.shape[2] == 1 else operator_for(q_fhnd)
    return operator.backward(
        grad_fhnd, q_fhnd, k_fhnd, v_fhnd, out_fhnd, lse_fhn, causal, scale, **options
    )


def operator_for(q_fhnd) -> Operator:
    """The fastest operator for the device, dtype and head_dim of q."""
    head_dim, dtype = q_fhnd.shape[-1], q_fhnd.dtype
    if q_fhnd.device.type == "cpu":
        return CPU
    if q_fhnd.device.type == "cuda":
        half = dtype in (torch.float16, torch.bfloat16)
        ampere = torch.cuda.get_device_capability(q_fhnd.device) >= (8, 0)
        if half and ampere and head_dim % 8 == 0 and head_dim <= 256:
            return FLASH
        if ((half and ampere) or dtype == torch.float32) and head_dim * dtype.itemsize % 16 == 0:
            return EFFICIENT
    return BLOCKWISE


def _cpu_forward(q, k, v, causal, scale, bias=None):
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )


def _cpu_backward(grad, q, k, v, out, lse, causal, scale, bias=None):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _flash_forward(q, k, v, causal, scale):
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(grad, q, k, v, out, lse, causal, scale):
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)  # its random state, unread
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal,
        no_dropout, no_dropout, scale=scale,
    )  # fmt: skip


def _efficient_forward(q, k, v, causal, scale):
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]  # the kernel pads the rows to a multiple of 32


def _efficient_backward(grad, q, k, v, out, lse, causal, scale):
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse, no_dropout, no_dropout, 0.0,
        (True, True, True, False), causal, scale=scale,
    )[:3]  # fmt: skip


def _tiles(f, h, rows, keys):
    """Slices of (batch, query rows) that bound the scores held at once: memory stays linear."""
    budget = TILE_SCORES // (h * keys)
    row_step = min(max(budget, 1), rows)
    f_step = max(budget // row_step, 1)
    for f0 in range(0, f, f_step):
        for n0 in range(0, rows, row_step):
            yield slice(f0, f0 + f_step), slice(n0, min(n0 + row_step, rows))


def _tile_scores(q, k, n, causal, scale, bias):
    scores = q @ k.mT * scale
    if bias is not None:
        scores += bias
    if causal:
        rows = torch.arange(n.start, n.stop, device=q.device)
        keys = torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(keys > rows[:, None], -torch.inf)
    return scores


def _blockwise_forward(q, k, v, causal, scale, bias=None):
    dtype = torch.promote_types(q.dtype, torch.float32)
    f, h, rows, d = q.shape
    out = q.new_empty(f, rows, h, d).transpose(1, 2)
    lse = q.new_empty(f, rows, h, dtype=dtype).transpose(1, 2)
    for b, n in _tiles(f, h, rows, k.shape[2]):
        keys = slice(0, n.stop if causal else k.shape[2])
        q_tile, k_tile, v_tile = (x.to(dtype) for x in (q[b, :, n], k[b, :, keys], v[b, :, keys]))
        of_keys = None if bias is None else bias[b]
        scores = _tile_scores(q_tile, k_tile, n, causal, scale, of_keys)
        lse[b, :, n] = tile_lse = torch.logsumexp(scores, -1)
        out[b, :, n] = torch.exp(scores - tile_lse[..., None]) @ v_tile
    return out, lse


def _blockwise_backward(grad, q, k, v, out, lse, causal, scale, bias=None):
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for b, n in _tiles(*q.shape[:3], k.shape[2]):
        keys = slice(0, n.stop if causal else k.shape[2])
        q_tile, g_tile, o_tile = (x[b, :, n].to(dtype) for x in (q, grad, out))
        k_tile, v_tile = (x[b, :, keys].to(dtype) for x in (k, v))
        of_keys = None if bias is None else bias[b]
        scores = _tile_scores(q_tile, k_tile, n, causal, scale, of_keys)
        p = torch.exp(scores - lse[b, :, n, None])
        delta = (g_tile * o_tile).sum(-1, keepdim=True)
        ds = p * (g_tile @ v_tile.mT - delta) * scale
        dq[b, :, n] = ds @ k_tile
        dk[b, :, keys] += ds.mT @ q_tile
        dv[b, :, keys] += p.mT @ g_tile
    return dq, dk, dv


def _one_key_forward(q, k, v, causal, scale):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return v.expand_as(q).clone(), (q.to(dtype) * k).sum(-1) * scale


def _one_key_backward(grad, q, k, v, out, lse, causal, scale):
    q, k, v, grad = (x.to(lse.dtype) for x in (q, k, v, grad))
    p = torch.exp((q * k).sum(-1) * scale - lse)[..., None]
    ds = p * (grad * (v - out)).sum(-1, keepdim=True) * scale
    return ds * k, (ds * q).sum(2, keepdim=True), (p * grad).sum(2, keepdim=True)


CPU = Operator(_cpu_forward, _cpu_backward)
FLASH = Operator(_flash_forward, _flash_backward)
EFFICIENT = Operator(_efficient_forward, _efficient_backward)
BLOCKWISE = Operator(_blockwise_forward, _blockwise_backward)
# A softmax over one key has nothing to weigh: of many tiny documents that is most of the work.
ONE_KEY = Operator(_one_key_forward, _one_key_backward)
