"""The Triton backend: dilated attention in a fixed number of kernel launches."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from megalong.attention.triton.tile_sizes import interpreting


def unsupported(q_bshd) -> str | None:
    """Why this backend cannot run on such inputs; None where it can. Does not import triton."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if q_bshd.shape[-1] > 256:
        return f"head_dim is {q_bshd.shape[-1]}, more than 256"
    if interpreting():
        if q_bshd.device.type != "cpu":
            return "TRITON_INTERPRET=1 runs on the CPU"
        if q_bshd.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None
    if q_bshd.device.type != "cuda" or torch.version.hip:
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(q_bshd.device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    if q_bshd.dtype == torch.float32 and q_bshd.shape[-1] > 128:
        return f"head_dim is {q_bshd.shape[-1]}, and float32 tiles of more than 128 do not fit"
    if q_bshd.dtype == torch.float64:
        return "float64 runs in the interpreter only"
    return None


def forward(q, k, v, pattern, **options):
    """The backend's forward: output and log-sum-exp."""
    from megalong.attention.triton import launch

    return launch.forward(q, k, v, pattern, **options)


def backward(grad, q, k, v, out, lse, pattern, **options):
    """The backend's backward: gradients of q, k and v."""
    from megalong.attention.triton import launch

    return launch.backward(grad, q, k, v, out, lse, pattern, **options)


def attend_rows(q, k, v, *, scale):
    """The backend's dense attention of queries to other rows: output and log-sum-exp."""
    from megalong.attention.triton import rows

    return rows.attend_rows(q, k, v, causal=False, query_shift=0, scale=scale)


def attend_rows_backward(grad, q, k, v, out, lse, *, scale):
    """Shares of the gradients of q, k and v, from the output and log-sum-exp of all parts."""
    from megalong.attention.triton import rows

    return rows.attend_rows_backward(
        grad, q, k, v, out, lse, causal=False, query_shift=0, scale=scale
    )
