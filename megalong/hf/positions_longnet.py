"""Positions as turns of channels (RoPE), and as scales besides (xPos). Travels in the exported
folder."""

from __future__ import annotations

import math

import torch

from .configuration_longnet import LongNetConfig
from .rope_scaling import rope_frequencies


def rotary_angles(config: LongNetConfig, starts: list[int], length: int, device):
    """Cosines and sines, (b or 1, s, 1, head_dim) each, of the positions from each start on; with
    YaRN times its attention factor.

    The angle is computed in float64 and reduced to one turn, and only then becomes float32: a
    float32 position loses its fraction of a turn long before a million tokens.
    """
    frequencies, factor = rope_frequencies(config.rope_parameters, config.head_dim)
    frequencies = torch.tensor(frequencies, dtype=torch.float64, device=device)
    angles = positions_from(starts, length, device) * frequencies
    angles = angles.remainder_(2 * math.pi).float()
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos() * factor, angles.sin() * factor


def positions_from(starts: list[int], length: int, device):
    """So many positions from each start on, (b or 1, s, 1), float64."""
    starts = torch.tensor(starts if len(set(starts)) > 1 else starts[:1], device=device)
    return (starts[:, None].double() + torch.arange(length, device=device))[..., None]


def xpos_scales(config: LongNetConfig, starts: list[int], length: int, device):
    """What queries are multiplied by, and keys divided, (b or 1, s, 1, head_dim), float32: they
    count from the middle of the training's sequence."""
    positions = positions_from(starts, length, device) - config.max_position_embeddings // 2
    scales = (positions * xpos_decays(config).to(device)).exp_().float()
    return torch.cat((scales, scales), -1)[:, :, None]


def xpos_decays(config: LongNetConfig):
    """Logarithm of what the score of each pair of channels decays by in one position, float64."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return ((channels + 0.4) / 1.4).log() / config.xpos_scale_base


def check_length(config: LongNetConfig, tokens: int, dtype: torch.dtype) -> None:
    """Raise ValueError where so many tokens are more than xPos can scale: at the first or the last
    it would take more than half of the format's exponents, and leave the values too few."""
    if config.position_embedding_type != "xpos":
        return
    middle = config.max_position_embeddings // 2
    smallest = max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny)  # scales are float32
    reach = math.floor(math.log(smallest) / 2 / float(xpos_decays(config)[0]))
    if max(middle, tokens - middle) <= reach:
        return
    way_out = f"give at most {middle + reach}" if middle <= reach else "load it in bfloat16"
    raise ValueError(
        f"xPos has no room for {tokens} tokens in {str(dtype).removeprefix('torch.')}: {way_out}"
    )


def rotate(x_bshd, cos, sin):
    """Turn pairs of channels, half a head apart (RoPE, arXiv 2104.09864)."""
    one, other = x_bshd.chunk(2, -1)
    return x_bshd * cos.to(x_bshd.dtype) + torch.cat((-other, one), -1) * sin.to(x_bshd.dtype)
