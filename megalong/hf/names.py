"""One table of names for both directions: megalong's canonical parameters and Transformers'.

A row of the table is a module: its name here, its names there with their shapes, and how the
tensors there become the one here. Transformers' side is named as in Llama, so that Llama's
checkpoints go through the same table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megalong.config import ModelConfig
from megalong.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """The sizes that the shapes in the table are made of, and what decides which rows apply."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    padded_vocabulary: int
    swiglu: bool
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    norm_bias: bool
    tied: bool

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> Sizes:
        """model: resolved. vocab_size: the tokenizer's."""
        return cls(
            layers=model.num_layers,
            hidden=model.hidden_size,
            heads=model.num_attention_heads,
            kv_heads=model.num_query_groups,
            head_dim=model.kv_channels,
            mlp=model.ffn_hidden_size,
            vocabulary=model.padded_vocab_size or vocab_size,
            padded_vocabulary=model.vocabulary_rows(vocab_size),
            swiglu=model.swiglu,
            linear_bias=model.add_bias_linear,
            qkv_bias=model.add_bias_linear or model.add_qkv_bias,
            qk_norm=model.qk_layernorm,
            norm_bias=model.normalization == "LayerNorm",
            tied=not model.untie_embeddings_and_output_weights,
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


# How the tensors of Transformers become one of megalong, and back. `parts` are in the table's
# order; biases go the same way as weights, along the first dimension.


class Same:
    """One tensor, the same on both sides."""

    @staticmethod
    def join(parts, sizes):
        return parts[0]

    @staticmethod
    def split(whole, sizes):
        return [whole]


class Stacked:
    """One above the other, of equal height."""

    @staticmethod
    def join(parts, sizes):
        return torch.cat(parts)

    @staticmethod
    def split(whole, sizes):
        return whole.chunk(2)


class GroupedQKV:
    """Group by group: the query heads that share a key/value head, their key head, their value
    head (Megatron-core's `linear_qkv`)."""

    @staticmethod
    def join(parts, sizes):
        grouped = [part.unflatten(0, (sizes.kv_heads, -1)) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)

    @staticmethod
    def split(whole, sizes):
        group, d = sizes.heads // sizes.kv_heads, sizes.head_dim
        parts = whole.unflatten(0, (sizes.kv_heads, -1)).split([group * d, d, d], 1)
        return [part.flatten(0, 1) for part in parts]


class Vocabulary:
    """Rows of a vocabulary, which megalong fills up to a round number. New rows are zero."""

    @staticmethod
    def join(parts, sizes):
        missing = sizes.padded_vocabulary - sizes.vocabulary
        return torch.nn.functional.pad(parts[0], (0, 0, 0, missing))

    @staticmethod
    def split(whole, sizes):
        return [whole[: sizes.vocabulary]]


# Which field of Sizes adds a bias.
NORM, LINEAR, QKV, EMBEDDING = "norm_bias", "linear_bias", "qkv_bias", None


@dataclass(frozen=True)
class Row:
    """A module: `modules` maps Transformers' names to the fields of Sizes that make the shape."""

    megalong: str
    modules: dict[str, str]
    bias: str | None
    how: type = Same
    only: tuple[str, bool] | None = None  # applies where this field of Sizes has this value


HERE, THERE = "decoder.layers.{}.", "model.layers.{}."
TABLE = (
    Row(
        "embedding.word_embeddings",
        {"model.embed_tokens": "vocabulary hidden"},
        EMBEDDING,
        Vocabulary,
    ),
    Row(HERE + "input_layernorm", {THERE + "input_layernorm": "hidden"}, NORM),
    Row(
        HERE + "self_attention.linear_qkv",
        {
            THERE + "self_attn.q_proj": "queries hidden",
            THERE + "self_attn.k_proj": "keys hidden",
            THERE + "self_attn.v_proj": "keys hidden",
        },
        QKV,
        GroupedQKV,
    ),
    Row(
        HERE + "self_attention.q_layernorm",
        {THERE + "self_attn.q_norm": "head_dim"},
        NORM,
        only=("qk_norm", True),
    ),
    Row(
        HERE + "self_attention.k_layernorm",
        {THERE + "self_attn.k_norm": "head_dim"},
        NORM,
        only=("qk_norm", True),
    ),
    Row(
        HERE + "self_attention.linear_proj", {THERE + "self_attn.o_proj": "hidden queries"}, LINEAR
    ),
    Row(HERE + "pre_mlp_layernorm", {THERE + "post_attention_layernorm": "hidden"}, NORM),
    Row(
        HERE + "mlp.linear_fc1",
        {THERE + "mlp.gate_proj": "mlp hidden", THERE + "mlp.up_proj": "mlp hidden"},
        LINEAR,
        Stacked,
        only=("swiglu", True),
    ),
    Row(
        HERE + "mlp.linear_fc1",
        {THERE + "mlp.up_proj": "mlp hidden"},
        LINEAR,
        only=("swiglu", False),
    ),
    Row(HERE + "mlp.linear_fc2", {THERE + "mlp.down_proj": "hidden mlp"}, LINEAR),
    Row("decoder.final_layernorm", {"model.norm": "hidden"}, NORM),
    Row(
        "output_layer",
        {"lm_head": "vocabulary hidden"},
        EMBEDDING,
        Vocabulary,
        only=("tied", False),
    ),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of megalong: its name and shape, and those of Transformers that it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    how: type
    sizes: Sizes

    def to_huggingface(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raises UserError where the tensor does not have its shape."""
        check_shape(self.name, self.shape, whole.shape)
        return dict(zip(self.parts, self.how.split(whole, self.sizes), strict=True))

    def to_megalong(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """parts: the tensors that `self.parts` names. Raises UserError on a wrong shape."""
        for name, shape in self.parts.items():
            check_shape(name, shape, parts[name].shape)
        return self.how.join([parts[name] for name in self.parts], self.sizes)


def entries(sizes: Sizes) -> list[Entry]:
    """Every tensor of a model, layer by layer."""
    found = []
    for row in TABLE:
        if row.only is not None and getattr(sizes, row.only[0]) != row.only[1]:
            continue
        layers = range(sizes.layers) if "{}" in row.megalong else [None]
        kinds = ["weight"]
        if row.bias is not None and getattr(sizes, row.bias):
            kinds.append("bias")
        found += [_entry(row, layer, kind, sizes) for layer in layers for kind in kinds]
    return found


def _entry(row: Row, layer: int | None, kind: str, sizes: Sizes) -> Entry:
    parts = {}
    for module, shape in row.modules.items():
        numbers = tuple(getattr(sizes, word) for word in shape.split())
        parts[f"{module.format(layer)}.{kind}"] = numbers if kind == "weight" else numbers[:1]
    height = sum(shape[0] for shape in parts.values())
    if row.how is Vocabulary:
        height = sizes.padded_vocabulary
    shape = (height, *next(iter(parts.values()))[1:])
    return Entry(f"{row.megalong.format(layer)}.{kind}", shape, parts, row.how, sizes)


def check_shape(name: str, expected: Iterable[int], found: Iterable[int]) -> None:
    """Raise UserError unless a tensor has the shape that the configuration gives it."""
    if tuple(expected) != tuple(found):
        raise UserError(
            f"{name} has shape {tuple(found)}, and the configuration says {tuple(expected)}: the"
            " configuration is not that of these weights"
        )


def check_names(where: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise UserError unless exactly the expected tensors are there; `where`: the file."""
    expected, found = set(expected), set(found)
    for problem, names in (("has no", expected - found), ("has an unknown", found - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{where} {problem} tensor {', '.join(sorted(names)[:3])}{more}: not a model that"
                " megalong has"
            )
