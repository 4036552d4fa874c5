"""Rotary position encoding that stays exact at any position, and the scales of xPos.

A float32 does not hold positions past 2^24, nor long before that an angle's fraction: angles are
computed in float64 and reduced to one turn, and only then become float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megalong.config import ModelConfig
from megalong.config.model import XPOS_GAMMA
from megalong.model.chunked.rows import tiles
from megalong.model.rope_scaling import rope_frequencies

PIECE = 2**16  # positions at a time in float64: temporaries that do not grow with the sequence


class LongRotaryEmbedding(RotaryEmbedding):
    """Angles of the positions `first_position`, ...: a drop-in for GPTModel's `rotary_pos_emb`.

    one_per_pair: each angle once, as `chunked/rotary.py` takes them; Megatron-core's own rotation
    wants them twice.
    """

    def __init__(self, model: ModelConfig, first_position: int = 0, *, one_per_pair: bool = False):
        super().__init__(
            model.kv_channels, 1.0, rotary_base=model.rotary_base, use_cpu_initialization=True
        )
        self.frequencies = rotary_frequencies(model)
        self.first_position = first_position
        self.copies = 1 if one_per_pair else 2
        self._of_newest: tuple[Any, torch.Tensor] | None = None

    def forward(self, length: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return angles in [0, 2 pi), float32, (length, 1, 1, kv_channels, or half of them with
        one_per_pair)."""
        device = torch.cuda.current_device()  # the CPU where there is no GPU: see parallel/cpu.py
        if self._of_newest is None or self._of_newest[0] != (length, device):
            self._of_newest = (length, device), self._angles(length, device)
        return self._of_newest[1]

    def _angles(self, length: int, device: Any) -> torch.Tensor:
        frequencies = self.frequencies.to(device, non_blocking=True)
        pairs, first = len(frequencies), self.first_position
        shape = (length, 1, 1, self.copies * pairs)
        angles = torch.empty(shape, dtype=torch.float32, device=device)
        for rows in tiles(length, PIECE):
            positions = torch.arange(
                first + rows.start, first + rows.stop, dtype=torch.float64, device=device
            )
            turns = torch.outer(positions, frequencies).remainder_(2 * math.pi)
            angles[rows, 0, 0].unflatten(1, (self.copies, pairs)).copy_(turns[:, None])
        return angles


class XposScales:
    """The scales of xPos (arXiv 2212.10554) for the positions `first_position`, ... of a model.

    Only differences of positions matter. They count from the middle of the training's sequence,
    where the scales reach farthest (`megalong.config.model.longest_xpos`).
    """

    def __init__(self, model: ModelConfig, first_position: int = 0):
        channels = torch.arange(0, model.kv_channels, 2, dtype=torch.float64) / model.kv_channels
        self._decays = ((channels + XPOS_GAMMA) / (1 + XPOS_GAMMA)).log_() / model.xpos_scale_base
        self._first = first_position - model.seq_length // 2
        self._of_newest: tuple[Any, torch.Tensor] | None = None

    def __call__(self, length: int, device: torch.device) -> torch.Tensor:
        """Return those of queries, float32 (length, kv_channels / 2); keys are divided by them."""
        if self._of_newest is None or self._of_newest[0] != (length, device):
            self._of_newest = (length, device), self._scales(length, device)
        return self._of_newest[1]

    def _scales(self, length: int, device: torch.device) -> torch.Tensor:
        decays = self._decays.to(device, non_blocking=True)
        scales = torch.empty(length, len(decays), dtype=torch.float32, device=device)
        for rows in tiles(length, PIECE):
            positions = torch.arange(
                self._first + rows.start,
                self._first + rows.stop,
                dtype=torch.float64,
                device=device,
            )
            scales[rows] = torch.outer(positions, decays).exp_()
        return scales


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """Return radians per position of each pair of channels, float64: (kv_channels / 2,)."""
    rope = model.rope_parameters
    if rope["rope_type"] == "default":
        # By torch's power, whose last bit may be another than Python's: so runs go on bit for bit
        # that began before there were scalings.
        exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.float64) / model.kv_channels
        return rope["rope_theta"] ** -exponents
    frequencies, _ = rope_frequencies(rope, model.kv_channels)
    return torch.tensor(frequencies, dtype=torch.float64)


def score_scale(model: ModelConfig) -> float | None:
    """Return the factor of scores, where positions change it; else None: 1 / sqrt(kv_channels).

    YaRN multiplies cosines and sines of queries and keys alike: a score has the square of that.
    """
    if not model.has_rotary_positions:
        return None
    _, factor = rope_frequencies(model.rope_parameters, model.kv_channels)
    return None if factor == 1 else factor**2 / math.sqrt(model.kv_channels)
