"""The attentions that attention.py measures: ours, and what ours has to beat.

CONTENDERS: name -> function of (pattern, q, k) that returns attention(q, k, v), where q and k only
show shapes and device. q: (batch, sequence, heads, head_dim), k and v with kv_heads. What depends
on the pattern alone (a block mask, a compilation) is done once, in the outer function. Attention is
causal, its scale head_dim ** -0.5. A new backend or a rival implementation is one more entry.

"dilated (sdpa)" is PyTorch's flash attention on strided views, one per branch and group of heads,
merged by log-sum-exp: nothing is copied, so on a GPU this is what the Triton kernels have to beat.

The first word of a name is the kind of attention, and pattern is one of that kind; dense contenders
take any, and see all pairs. "NAME, documents: 16" is ours where the sequence holds so many
documents, of random lengths, that are kept apart.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalong.attention import (
    DilatedPattern,
    dense_attention,
    dilated_attention,
    sdpa_operators,
)
from megalong.attention.dense import DensePasses
from megalong.attention.dilated import DilatedPasses
from megalong.attention.documents import Documents
from megalong.attention.local import LocalPasses
from megalong.attention.passes import attend
from megalong.attention.patterns import DensePattern
from megalong.attention.sparse import SparsePasses


def dense(backend: SDPBackend, pattern, q, k):
    """Dense attention by one of PyTorch's fused backends."""

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return dense_attention(q, k, v)

    return attention


def ours(backend: str, pattern, q, k):
    return partial(dilated_attention, pattern=pattern, backend=backend)


def kept_apart(passes, backend: str, documents: int, pattern, q, k):
    """The bounds are made once, as a batch has them: what is planned from them is kept."""
    start_1s, _ = document_bounds(q.shape[1], documents)
    apart = Documents(start_1s.to(q.device).repeat(len(q), 1))
    return partial(attend, passes=passes(pattern, backend=backend, documents=apart))


def document_bounds(length: int, documents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """document_start and document_stop of `document_starts`, (1, length)."""
    starts = torch.tensor(document_starts(length, documents), dtype=torch.int32)
    stops = torch.cat((starts[1:], starts.new_tensor([length])))
    return tuple(x.repeat_interleave(stops - starts)[None] for x in (starts, stops))


def document_starts(length: int, documents: int) -> list[int]:
    """Where documents of random lengths begin in a sequence; the same for the same arguments."""
    return [0, *sorted(random.Random(0).sample(range(1, length), min(documents, length) - 1))]


def of_kind(passes, backend: str, pattern, q, k):
    return partial(attend, passes=passes(pattern, backend=backend))


def of_all_pairs(pattern, q, k):
    return of_kind(DensePasses, "auto", DensePattern(), q, k)


def masked(pattern, q, k):
    """A window as PyTorch's operator has it: dense attention with a mask."""
    position = torch.arange(q.shape[1], device=q.device)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < pattern.window)

    def attention(q, k, v):
        out_bhsd = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return out_bhsd.transpose(1, 2)

    return attention


def gathered(pattern, q, k):
    """How dilated attention is usually written: copy the rows of a branch, attend, scatter, mix.

    As in torchscale, segments are filled up with zeros to equal, divisible lengths (which a causal
    query never sees), and the mixing weights carry no gradient: `mixed_as_torchscale`.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    offsets = torch.tensor(pattern.offsets(heads, kv_heads), device=q.device)
    every_head = torch.arange(heads, device=q.device)

    def attention(q, k, v):
        length, head_dim = q.shape[1], q.shape[3]
        k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
        outs, lses = [], []
        for (width, rate), offset in zip(pattern.branches, offsets, strict=True):
            width = min(width, length)
            rows = (slice(None), slice(None), slice(None), offset, every_head)
            folded = [fold(x, width, rate) for x in (q, k, v)]
            shape = folded[0].shape[:-1]  # (batch, segments, rows, rate, heads)
            taken = [x[rows].flatten(0, 1).transpose(1, 2) for x in folded]
            out, lse = sdpa_operators.attend(*taken, True, head_dim**-0.5)
            full_out = out.new_zeros(*shape, head_dim)
            full_out[rows] = out.transpose(1, 2).unflatten(0, shape[:2])
            full_lse = lse.new_full(shape, -torch.inf)
            full_lse[rows] = lse.detach().transpose(1, 2).unflatten(0, shape[:2])
            outs.append(unfold(full_out, width, length))
            lses.append(unfold(full_lse, width, length))
        weights = torch.stack(lses).softmax(0).nan_to_num().to(q.dtype)
        return sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))

    return attention


def mixed_as_torchscale(q, k, v, pattern, **options):
    """What torchscale computes (torchscale/component/dilated_attention.py): the output of
    dilated_attention, with another gradient.

    Each branch attends by itself, and the outputs are mixed by weights that are constants to
    autograd, where the softmax over all keys has a gradient through them as well: dQ and dK differ,
    dV does not. Arguments and output as in dilated_attention.
    """
    offsets = pattern.offsets(q.shape[2], k.shape[2])
    outs, lses = [], []
    for (width, rate), row in zip(pattern.branches, offsets, strict=True):
        branch = DilatedPattern((width,), (rate,), (row,))
        out, lse_bhs = dilated_attention(q, k, v, branch, return_lse=True, **options)
        outs.append(out)
        lses.append(lse_bhs.mT)
    weights = torch.stack(lses).softmax(0).nan_to_num().to(q.dtype)  # lse has no gradient
    return sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))


def fold(x_bshd, width: int, rate: int):
    """(batch, segments, rows, rate, heads, head_dim), with zeros at the ends of segments."""
    length = x_bshd.shape[1]
    x_bshd = F.pad(x_bshd, (0, 0, 0, 0, 0, -length % width)) if length % width else x_bshd
    x_bcwhd = x_bshd.unflatten(1, (-1, width))
    x_bcwhd = F.pad(x_bcwhd, (0, 0, 0, 0, 0, -width % rate)) if width % rate else x_bcwhd
    return x_bcwhd.unflatten(2, (-1, rate))


def unfold(x_bcnrh, width: int, length: int):
    """The inverse of fold: (batch, length, heads, ...)."""
    return x_bcnrh.flatten(2, 3)[:, :, :width].flatten(1, 2)[:, :length]


def flex(pattern, q, k):
    """FlexAttention: a block mask of the pairs that a branch offers, log(multiplicity) on scores.

    Blocks are 128 x 128 positions, and one with a single pair is computed whole.
    """
    offsets = torch.tensor(pattern.offsets(q.shape[2], k.shape[2]), device=q.device)

    def multiplicity(batch, head, i, j):
        count = 0
        for branch, (width, rate) in enumerate(pattern.branches):
            offset = offsets[branch, head]
            offered = (i // width == j // width) & (i % width % rate == offset)
            count = count + (offered & (j % width % rate == offset)).to(torch.int32)
        return count

    def mask(batch, head, i, j):
        return (i >= j) & (multiplicity(batch, head, i, j) > 0)

    def score(score, batch, head, i, j):
        return score + torch.log(multiplicity(batch, head, i, j).to(torch.float32))

    return compiled_flex(mask, score, q, k)


def flex_window(pattern, q, k):
    """FlexAttention with a block mask of the window."""

    def mask(batch, head, i, j):
        return (i >= j) & (i - j < pattern.window)

    return compiled_flex(mask, None, q, k)


def compiled_flex(mask, score, q, k):
    """FlexAttention with a mask and a change of scores: on a CPU its forward pass alone exists."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # seconds

    torch.compiler.reset()  # each mask is a compilation of its own, and their number is limited
    length, heads = q.shape[1:3]
    on_gpu = q.device.type == "cuda"
    make_mask = torch.compile(create_block_mask) if on_gpu else create_block_mask
    heads = None if score is None else heads  # a window is the same for all
    block_mask = make_mask(mask, None, heads, length, length, device=q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q, k, v):
        out_bhsd = compiled(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod=score,
            block_mask=block_mask, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return out_bhsd.transpose(1, 2)

    return attention


CONTENDERS = {
    "dense (flash)": partial(dense, SDPBackend.FLASH_ATTENTION),
    "dense (cuDNN)": partial(dense, SDPBackend.CUDNN_ATTENTION),
    "dilated (flex)": flex,
    "dilated (gather)": gathered,
    "dilated (sdpa)": partial(ours, "sdpa"),
    "dilated (triton)": partial(ours, "triton"),
    "local (flex)": flex_window,
    "local (masked)": masked,
    "local (sdpa)": partial(of_kind, LocalPasses, "sdpa"),
    "local (triton)": partial(of_kind, LocalPasses, "triton"),
    "sparse (sdpa)": partial(of_kind, SparsePasses, "sdpa"),
    "sparse (triton)": partial(of_kind, SparsePasses, "triton"),
    "dense (ours)": of_all_pairs,
}
# Measured there by default.
ON_CPU = (
    "dense (flash)", "dilated (gather)", "dilated (sdpa)", "local (flex)", "local (masked)",
    "local (sdpa)", "sparse (sdpa)", "dense (ours)",
)  # fmt: skip


def contenders(documents: tuple[int, ...] = ()) -> dict:
    """Return CONTENDERS, and ours with each of these numbers of documents."""
    found = dict(CONTENDERS)
    kinds = {"dilated": DilatedPasses, "local": LocalPasses, "sparse": SparsePasses}
    ours = {f"{kind} ({x})": (kinds[kind], x) for kind, x in product(kinds, ("sdpa", "triton"))}
    ours["dense (ours)"] = DensePasses, "auto"
    for count, (name, (passes, backend)) in product(documents, ours.items()):
        found[f"{name}, documents: {count}"] = partial(kept_apart, passes, backend, count)
    return found


def documents_of(name: str) -> int:
    """How many the contender of this name keeps apart; 0 where it does not."""
    _, _, documents = name.partition(", documents: ")
    return int(documents or 0)
