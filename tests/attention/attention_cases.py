"""Cases of dilated attention for backend tests: named corners and seeded random ones.

Every backend is held against the reference on the same cases, so this module knows no backend.
"""

from __future__ import annotations

import random
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import document_cases
import pytest
import torch

from megalong.attention import DilatedPattern, dilated_attention, dilated_attention_reference

needs_inductor = pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch.compile on a CPU needs g++ and Python's headers",
)


@dataclass(frozen=True)
class Case:
    name: str
    length: int
    pattern: DilatedPattern
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    batch: int = 1
    causal: bool = True
    scale: float | None = None
    layout: str = "bshd"  # order of the axes in memory
    seed: int = 0
    document_seed: int | None = None  # of the documents that are kept apart

    def inputs(self, dtype=torch.float64, device="cpu"):
        """q, k, v and the output's gradient, each (batch, sequence, heads, head_dim)."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads):
            shape = (self.batch, self.length, heads, self.head_dim)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            x = x.to(device=device, dtype=dtype)
            if self.layout == "sbhd":
                return x.transpose(0, 1).contiguous().transpose(0, 1)
            if self.layout == "bhsd":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            if self.layout == "slice":  # as cut from a fused projection, with gaps
                return torch.cat([x, x], dim=-1)[..., : self.head_dim]
            return x

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), draw(self.heads)

    @property
    def options(self) -> dict:
        """Keyword arguments of dilated_attention and of the reference."""
        return self.options_on("cpu")

    def options_on(self, device) -> dict:
        options = {"causal": self.causal, "scale": self.scale}
        if self.document_seed is None:
            return options
        start, stop = (x.to(device) for x in document_cases.bounds(self.ids))
        return {**options, "document_start": start, "document_stop": stop}

    @property
    def ids(self) -> torch.Tensor:
        """(batch, sequence): the number of each position's document."""
        return document_cases.random_ids(self.document_seed, self.batch, self.length)


def corners() -> list[Case]:
    """What goes wrong first: tails, lengths that divide nothing, rows in no branch."""
    P = DilatedPattern
    ladder = P((8, 16, 32), (1, 2, 4))
    uneven = P((5, 7, 23), (1, 3, 4))
    return [
        Case("one-token", 1, ladder),
        Case("whole-segments", 64, ladder, batch=2),
        Case("tail", 61, ladder, batch=2),
        Case("tail-megatron-layout", 61, ladder, batch=3, layout="sbhd"),
        Case("whole-megatron-layout", 64, ladder, batch=2, layout="sbhd"),
        Case("w-exceeds-length", 19, P((64, 128), (1, 4))),
        Case("rate-does-not-divide-w", 47, uneven),
        Case("rate-does-not-divide-w-bidirectional", 47, uneven, causal=False, batch=2),
        Case("rate-exceeds-w", 20, P((3, 4), (1, 7))),
        Case("no-dense-branch", 33, P((8, 16), (2, 4))),
        Case("rows-in-no-branch", 33, P((16,), (5,)), heads=2, kv_heads=2),
        Case("first-branch-covers-by-single-rows", 9, P((1, 4), (2, 3), ((0,) * 4, (2, 1, 0, 1)))),
        Case("offset-beyond-tail", 17, P((16,), (8,)), heads=8, kv_heads=8),
        Case("two-dense-branches", 40, P((8, 20), (1, 1)), batch=2),
        Case("same-branch-twice", 24, P((8, 8), (2, 2))),
        Case("branches-out-of-order", 50, P((32, 8, 16), (4, 1, 2)), batch=2),
        Case("paper-misalignment", 96, P((24, 48), (6, 12)), heads=12, kv_heads=12),
        Case("one-head", 40, ladder, heads=1, kv_heads=1),
        Case("heads-do-not-divide-rate", 40, P((8, 40), (1, 5)), heads=7, kv_heads=7),
        Case("grouped", 45, ladder, heads=12, kv_heads=3, batch=2),
        Case("grouped-block", 45, P((8, 16, 32), (1, 2, 4), "block"), heads=12, kv_heads=3),
        Case("one-kv-head", 45, uneven, heads=6, kv_heads=1, batch=2),
        Case("layer-offsets", 45, P((8, 32), (1, 8), "layer", layer=3), heads=6, kv_heads=3),
        Case(
            "explicit-table",
            45,
            P((8, 32), (3, 8), ((2, 0, 1, 1), (7, 0, 3, 5))),
            kv_heads=2,
            causal=False,
        ),
        Case("uneven-tail-bidirectional", 50, uneven, causal=False, batch=2),
        Case("head-dim-one", 40, ladder, head_dim=1),
        Case("head-dim-odd", 40, ladder, head_dim=13, layout="bhsd"),
        Case("head-dim-large", 40, ladder, head_dim=160, layout="slice"),
        Case("scale-small", 40, ladder, scale=1e-6),
        Case("scale-large", 40, ladder, scale=30.0),
        Case("long-tail-tiles", 600, P((300, 512), (1, 2)), heads=2, kv_heads=1),
    ]


def random_case(seed: int, longest: int = 600, most_heads: int = 12, most_batch: int = 3) -> Case:
    """A case drawn from everything that the contract allows; the same for the same arguments."""
    rng = random.Random(seed)
    length = rng.randint(1, rng.choice([longest // 15 + 1, longest // 4 + 1, longest]))
    kv_heads = rng.randint(1, min(6, most_heads))
    heads = kv_heads * rng.randint(1, most_heads // kv_heads)

    branches = rng.randint(1, 4)
    segment_lengths = [
        rng.choice([rng.randint(1, 16), rng.randint(1, 800)]) for _ in range(branches)
    ]
    rates = [rng.choice([1, rng.randint(1, 4), rng.randint(1, 16)]) for _ in range(branches)]
    if rng.random() < 0.3:  # a regular ladder
        width, ratio = rng.choice([4, 8, 16]), rng.choice([2, 4])
        segment_lengths = [width * ratio**i for i in range(branches)]
        rates = [ratio**i for i in range(branches)]
    offsets = rng.choice(["mod", "block", "layer", "table"])
    if offsets == "table":
        offsets = [[rng.randrange(rate) for _ in range(heads)] for rate in rates]

    return Case(
        name=f"random-{seed}",
        length=length,
        pattern=DilatedPattern(segment_lengths, rates, offsets, layer=rng.randint(0, 5)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=rng.choice([1, 3, 4, 8, 16, 17, 32]),
        batch=min(rng.choice([1, 1, 2, 3]), most_batch),
        causal=rng.random() < 0.6,
        scale=rng.choice([None, None, 0.3]),
        layout=rng.choice(["bshd", "sbhd", "bhsd", "slice"]),
        seed=seed,
    )


def run_backend(case: Case, inputs, backend: str) -> dict[str, torch.Tensor]:
    """Output, log-sum-exp and gradients of one backend through the public function."""
    options = {"backend": backend, "return_lse": True, **case.options_on(inputs[0].device)}
    return _run(case, inputs, lambda *qkv: dilated_attention(*qkv, case.pattern, **options))


def run_reference(case: Case, inputs) -> dict[str, torch.Tensor]:
    """Output, log-sum-exp and gradients of the definition, the gradients by autograd."""
    options = case.options_on(inputs[0].device)
    return _run(
        case, inputs, lambda *qkv: dilated_attention_reference(*qkv, case.pattern, **options)
    )


def _run(case, inputs, function):
    *qkv, grad = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    out, lse = function(*qkv)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out.detach(), lse, *torch.autograd.grad(out, qkv, grad)), strict=True))


def assert_agree(found: dict, expected: dict, tolerance: float) -> None:
    """Every quantity within an absolute tolerance; equal infinities count as equal."""
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
