"""Plain formulas, and random inputs of many layouts, for the PyTorch and the Triton code."""

import math
import random

import torch
import torch.nn.functional as F

from megalong.model.chunked.mlp import GELU, SWIGLU, Activation

GEGLU = Activation("gelu", gated=True)
SILU = Activation("silu", gated=False)
ACTIVATIONS = {"swiglu": SWIGLU, "gelu": GELU, "geglu": GEGLU, "silu": SILU}


def plain(activation, x):
    """As Megatron-core's MLP has it."""
    function = {"silu": F.silu, "gelu": F.gelu}[activation.function]
    if not activation.gated:
        return function(x)
    gate, up = x.chunk(2, -1)
    return function(gate) * up


def activation_case(activation, seed: int):
    """x and the gradient of its activation, rows with gaps or without, float64."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, width = draw.randint(1, 50), draw.choice((1, 7, 33, 64, 200, 1500))
    features = width * (2 if activation.gated else 1)
    gap = draw.choice((0, 0, 5))
    x, grad = (
        3 * torch.randn(rows, n + gap, generator=generator, dtype=torch.float64)[:, :n]
        for n in (features, width)
    )
    return x, grad


def rotated(x_sbhd, angles_sp):
    """The formula, out of place."""
    cos, sin = angles_sp.cos()[:, None, None], angles_sp.sin()[:, None, None]
    first, second = x_sbhd.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotary_case(seed: int):
    """x in one of several layouts, float64, and angles."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    length, batch, heads = draw.randint(1, 70), draw.randint(1, 3), draw.randint(1, 5)
    pairs = draw.choice((1, 3, 8, 12, 32, 40, 128))
    packed = torch.randn(
        length, batch, heads, 3 * 2 * pairs + 1, generator=generator, dtype=torch.float64
    )
    x = packed[..., 2 * pairs : 4 * pairs]  # as between queries and values
    layout = draw.randrange(4)
    if layout == 1:
        x = x.contiguous()
    elif layout == 2:  # as Megatron's (batch, heads, sequence, d)
        x = x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    elif layout == 3:  # every third row
        x = packed.repeat_interleave(3, 0)[1::3, ..., 1 : 1 + 2 * pairs]
    angles = torch.rand(length, pairs, generator=generator, dtype=torch.float64) * 2 * math.pi
    return x, angles


def logits_case(seed: int):
    """Logits, labels in and out of the slice of the vocabulary, its first label, and gradients of
    the losses; float64."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, columns = draw.randint(1, 9), draw.choice((1, 7, 1000, 1024, 4096, 5001, 9000))
    gap, first = draw.choice((0, 0, 5)), draw.choice((0, 1, columns, 3 * columns))
    x = 4 * torch.randn(rows, columns + gap, generator=generator, dtype=torch.float64)
    labels = torch.randint(first - columns, first + 2 * columns, (rows,), generator=generator)
    labels[0] = first + columns - 1
    grad = torch.randn(rows, generator=generator, dtype=torch.float64)
    return x[:, :columns], labels, first, grad


def read(logits_nv, labels_n, first):
    """The formulas: logsumexp, the labels' logits, and where they are, 1 there and 0 elsewhere."""
    columns = torch.arange(logits_nv.shape[1], device=logits_nv.device)
    labelled_nv = (columns == labels_n[:, None] - first).to(logits_nv.dtype)
    return logits_nv.logsumexp(1), (logits_nv * labelled_nv).sum(1), labelled_nv
