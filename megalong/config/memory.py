"""Tensors of a step that long sequences make large, and how little of them is held at a time.

The pieces are exact, and each has its flag. Left to themselves they follow `--memory-path`: "on" is
all of them, "off" none, and "auto" is decided by tokens per rank and the memory of device and host,
before the model is built (`megalong.model.memory_path`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megalong.config.flags import default, flag, flag_name, largest_divisor, require_positive
from megalong.config.model import ModelConfig
from megalong.config.parallel import ParallelConfig
from megalong.utils.errors import UserError

# The pieces that --memory-path turns on and off.
PIECES = ("linear_cross_entropy", "tiled_mlp", "tiled_attention", "offload_activations")
# The sizes, and the pieces that use them.
SIZES = {
    "tile_size": ("tiled_mlp", "tiled_attention", "linear_cross_entropy"),
    "loss_chunk_size": ("linear_cross_entropy",),
    "attention_head_groups": ("tiled_attention",),
}
HEAD_GROUPS = 4  # of attention, if the heads divide
TILE_NUMBERS = 2**26  # inner values of the MLP in a tile
SMALLEST_TILE, LARGEST_TILE = 2**12, 2**14  # tokens
# Of the device's memory and of the host's: the rest is for CUDA's context, NCCL, fragments, others.
USABLE = 0.9
_FOLLOWS = "(default: as --memory-path says)"


@dataclass(frozen=True)
class MemoryConfig:
    """The memory of long sequences: a few tensors of a layer at a time, in tiles of rows."""

    memory_path: str = flag(
        "auto",
        "the pieces below that bound memory: on, off, or as memory requires",
        choices=("auto", "on", "off"),
    )
    linear_cross_entropy: bool | None = flag(
        None, f"losses without logits of the whole sequence {_FOLLOWS}"
    )
    loss_chunk_size: int | None = flag(
        None, "tokens whose logits exist at a time (default: 4096, or as many as make 256M logits)"
    )
    tiled_mlp: bool | None = flag(None, f"norm and MLP over tiles of the sequence {_FOLLOWS}")
    tiled_attention: bool | None = flag(
        None, f"attention for some heads at a time, its projections over tiles {_FOLLOWS}"
    )
    tile_size: int | None = flag(
        None, "tokens in a tile, of all tensor ranks (default: 4096 to 16384, by the MLP's width)"
    )
    attention_head_groups: int | None = flag(
        None, "with --tiled-attention: groups of heads, one at a time (default: up to 4)"
    )
    offload_activations: bool | None = flag(
        None, f"keep what the backward pass needs of a layer in the host's memory {_FOLLOWS}"
    )

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Raise UserError where these settings cannot be (resolved configurations)."""
        require_positive(self, *SIZES)
        if self.attention_head_groups is None:
            return
        heads = _kv_heads_of_a_rank(model, parallel)
        if heads % self.attention_head_groups:
            fitting = largest_divisor(heads, self.attention_head_groups)
            raise UserError(
                f"--attention-head-groups {self.attention_head_groups} does not divide the {heads}"
                f" key/value heads of a tensor-parallel rank: set --attention-head-groups {fitting}"
            )

    def unused(self, settled: MemoryConfig, parallel: ParallelConfig) -> list[str]:
        """Say what was given and does nothing in the run, a line each.

        settled: these settings with nothing left open. parallel: the run's.
        """
        lines = [
            f"{flag_name(size)} {getattr(self, size)} is not used: without"
            f" {' or '.join(map(flag_name, pieces))} there is nothing that it is of"
            for size, pieces in SIZES.items()
            if getattr(self, size) is not None and getattr(settled, size) is None
        ]
        wanted = default(self.offload_activations, self.memory_path == "on")
        if wanted and not settled.offload_activations:
            lines.append(
                "--offload-activations is not used: on a CPU the host's memory is the device's"
            )
        if settled.tiled_attention and parallel.recompute_granularity == "selective":
            lines.append(
                "--recompute-granularity selective is not used: --tiled-attention keeps only the"
                " attention's output anyway"
            )
        return lines

    def resolve(self, model: ModelConfig, parallel: ParallelConfig) -> MemoryConfig:
        """Settle all but what "auto" decides later."""
        if self.memory_path == "auto":
            return self
        return self.with_pieces(self.memory_path == "on", model, parallel)

    def with_pieces(
        self, on: bool, model: ModelConfig, parallel: ParallelConfig, offload: bool | None = None
    ) -> MemoryConfig:
        """Settle all: what is not given is as `on` says, and the offload, where it is not given, as
        `offload` says if that is not None."""
        pieces = {name: default(getattr(self, name), on) for name in PIECES}
        pieces["offload_activations"] = default(self.offload_activations, default(offload, on))
        most = HEAD_GROUPS
        if parallel.divides_norms:
            # Each group gathers the rows of all tensor ranks, which have fewer heads each.
            most = max(HEAD_GROUPS // parallel.tensor_model_parallel_size, 1)
        sizes = {
            "tile_size": self.tile_size or _tile_size(model, parallel),
            "loss_chunk_size": self.loss_chunk_size,
            "attention_head_groups": self.attention_head_groups
            or largest_divisor(_kv_heads_of_a_rank(model, parallel), most),
        }
        for size, users in SIZES.items():
            if not any(pieces[user] for user in users):
                sizes[size] = None
        return dataclasses.replace(self, memory_path="on" if on else "off", **sizes, **pieces)


def _tile_size(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Tokens that keep a GPU busy, and whose inner values of the MLP are small beside a sequence:
    a power of two."""
    assert model.ffn_hidden_size is not None
    width = model.ffn_hidden_size * (2 if model.swiglu else 1)
    width //= parallel.tensor_model_parallel_size
    return 2 ** (min(max(TILE_NUMBERS // width, SMALLEST_TILE), LARGEST_TILE).bit_length() - 1)


def _kv_heads_of_a_rank(model: ModelConfig, parallel: ParallelConfig) -> int:
    assert model.num_query_groups is not None
    return model.num_query_groups // parallel.tensor_model_parallel_size
