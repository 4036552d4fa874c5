"""Random cases of the kinds of attention besides the dilated one, and their definitions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from document_cases import bounds, random_ids, same_document

from megalong.attention.dense import DensePasses
from megalong.attention.documents import Documents
from megalong.attention.local import LocalPasses
from megalong.attention.passes import Passes
from megalong.attention.patterns import DensePattern, LocalPattern, SparsePattern
from megalong.attention.reference import softmax_with_multiplicity
from megalong.attention.sparse import SparsePasses


@dataclass(frozen=True)
class KindCase:
    """pattern: of any kind; passes: its class. apart: documents are kept apart."""

    pattern: object
    passes: type[Passes]
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    seed: int
    apart: bool

    def inputs(self, dtype=torch.float64):
        """q, k, v and the output's gradient, each (batch, sequence, heads, head_dim)."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(
                self.batch, self.length, heads, self.head_dim, generator=generator,
                dtype=torch.float64,
            ).to(dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]  # fmt: skip

    @property
    def ids(self) -> torch.Tensor:
        """(batch, sequence): the number of each position's document."""
        return random_ids(self.seed, self.batch, self.length)

    def documents(self, here: slice = slice(None)) -> Documents | None:
        """Those of a slice of the sequence."""
        return Documents(*(x[:, here] for x in bounds(self.ids))) if self.apart else None

    def seen(self) -> torch.Tensor:
        """(heads, length, length) booleans: the query sees the key. From the definition."""
        query, key = torch.arange(self.length)[:, None], torch.arange(self.length)
        if isinstance(self.pattern, DensePattern):
            seen = torch.ones(self.length, self.length, dtype=torch.bool)
        elif isinstance(self.pattern, LocalPattern):
            seen = (query - key).abs() < self.pattern.window
        else:
            block = self.pattern.block
            own = query // block == key // block
            first = torch.tensor(self.pattern.first_columns(self.kv_heads)).repeat_interleave(
                self.heads // self.kv_heads
            )[:, None, None]
            inside = (key % block - first >= 0) & (key % block - first < self.pattern.columns)
            whole = key // block < self.length // block
            seen = own | inside & whole
        if self.causal:
            seen = seen & (key <= query)
        return seen.expand(self.heads, -1, -1)

    def reference(self) -> tuple[torch.Tensor, ...]:
        """Output, log-sum-exp and gradients of q, k and v, by the definition."""
        *qkv, grad = self.inputs()
        q, k, v = (x.requires_grad_() for x in qkv)
        group = self.heads // self.kv_heads
        q_bhid, k_bhjd, v_bhjd = (
            x.repeat_interleave(times, 2).transpose(1, 2)
            for x, times in ((q, 1), (k, group), (v, group))
        )
        scores_bhij = q_bhid @ k_bhjd.mT * self.head_dim**-0.5
        seen = self.seen()
        if self.apart:
            seen = seen & same_document(self.ids)[:, None]
        out_bhid, lse_bhi = softmax_with_multiplicity(scores_bhij, v_bhjd, seen)
        out = out_bhid.transpose(1, 2)
        return out.detach(), lse_bhi.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def random_case(seed: int, ranks: int = 1, longest: int = 60) -> KindCase:
    """A case whose length is a multiple of the number of ranks."""
    draw = random.Random(seed)
    length = draw.randint(1, longest // ranks) * ranks
    kv_heads = draw.choice((1, 2, 3))
    passes = draw.choice((DensePasses, LocalPasses, SparsePasses))
    if passes is DensePasses:
        pattern = DensePattern()
    elif passes is LocalPasses:
        pattern = LocalPattern(draw.choice((1, 2, draw.randint(1, length), 2 * length)))
    else:
        block = draw.choice((1, length, draw.randint(1, length), draw.randint(1, 8)))
        pattern = SparsePattern(block, draw.choice((1, block, draw.randint(1, block))))
    return KindCase(
        pattern,
        passes,
        batch=draw.choice((1, 2)),
        length=length,
        heads=kv_heads * draw.choice((1, 2)),
        kv_heads=kv_heads,
        head_dim=draw.choice((4, 8)),
        causal=draw.random() < 0.6,
        seed=seed,
        apart=seed % 2 == 1,
    )
