"""Frequencies of the rotary encoding, plain or stretched for sequences beyond the first training's.

The parameters are Transformers' `rope_parameters`; a copy of this file goes into exported folders.
Plain Python: its numbers are float64, as angles at a billion positions need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def rope_frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[list[float], float]:
    """Return radians per position of each of the head_dim / 2 pairs of channels, and the factor of
    cosines and sines (1 but for YaRN).

    rope: `rope_theta`, `rope_type` and what that takes: default (arXiv 2104.09864); linear, all
        slower by `factor` (arXiv 2306.15595); llama3, slow pairs slower by `factor`; yarn, the same
        by other rules, and sharper scores (arXiv 2309.00071).
    Raises ValueError for another type, and KeyError where a parameter is missing.
    """
    base, kind = rope["rope_theta"], rope.get("rope_type", "default")
    plain = [base ** -(channel / head_dim) for channel in range(0, head_dim, 2)]
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return [frequency / rope["factor"] for frequency in plain], 1.0
    if kind == "llama3":
        return [_llama3(frequency, rope) for frequency in plain], 1.0
    if kind == "yarn":
        return _yarn(plain, rope, head_dim), yarn_attention_factor(rope)
    raise ValueError(
        f"rotary positions of the type {kind!r}: there are default, linear, llama3 and yarn"
    )


def _llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    """Llama 3.1: slower by the factor below `low_freq_factor` turns in the original length,
    as it was above `high_freq_factor`, and in between from one to the other."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    stays = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (stays + (1 - stays) / rope["factor"])


def _yarn(plain: list[float], rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """All pairs in YaRN (section 3.2): slower by the factor below `beta_slow` turns in the original
    length, as they were above `beta_fast`; in between in proportion to the number of the pair,
    which with `truncate` counts from and to whole numbers."""

    def pair_with(turns: float) -> float:
        length = rope["original_max_position_embeddings"]
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    base = rope["rope_theta"]
    first, last = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 if first == last else 0  # as the paper's code, for a ramp that has no width
    slowed = [min(max((pair - first) / (last - first), 0.0), 1.0) for pair in range(len(plain))]
    return [
        frequency * (1 - share + share / rope["factor"])
        for frequency, share in zip(plain, slowed, strict=True)
    ]


def yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """Return YaRN's factor of cosines and sines, by whose square scores grow: the given
    `attention_factor`, or 0.1 ln(factor) + 1 (its equation 22), or with `mscale` and
    `mscale_all_dim`, which weigh the logarithm, the ratio of two of these (DeepSeek-V2)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(max(rope["factor"], 1.0)) + 1.0

    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1.0)
