"""One table of all that is known of parameters, without torch.

Names are canonical: those of Megatron-core's local GPTModel with global layer numbers, the same in
every layout and with every module set. On Transformers' side they are Llama's, so that Llama's
checkpoints go through the same table.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from megalong.config import ModelConfig

Condition = Callable[[ModelConfig], bool]


def _always(model: ModelConfig) -> bool:
    return True


def _norms_heads(model: ModelConfig) -> bool:
    return model.qk_layernorm


class Packing(Enum):
    """How a parameter is made of its parts, along the first dimension."""

    ALONE = auto()  # it is the one part
    PADDED = auto()  # the one part, and rows that fill up the vocabulary
    STACKED = auto()  # one above the other, of equal height; a tensor rank has a piece of each
    GROUPED = auto()  # by key/value head: its query heads, the key head, the value head


class Initial(Enum):
    """Initial values."""

    ZEROS = auto()
    ONES = auto()
    NORMAL = auto()  # of deviation --init-method-std
    RESIDUAL = auto()  # that / sqrt(2 x layers), for what writes to the residual stream (GPT-2)
    # With --sub-layer-norm, matrices of a layer have MAGNETO's deviations in the place of the two.


class Sees(Enum):
    """What a tensor-parallel rank applies a parameter to that all of them have whole."""

    ALL = auto()  # the same as the others do: its gradient is theirs
    TOKENS = auto()  # under Megatron's sequence parallelism, to its share of the tokens
    HEADS = auto()  # to its share of the heads


@dataclass(frozen=True)
class Part:
    """A tensor of Transformers that a parameter is made of: its name there, and its shape in words
    of `sizes`. gain: whether MAGNETO's initial weights are larger by its gain."""

    name: str
    shape: str
    exists: Condition = _always
    gain: bool = False

    def size(self, words: dict[str, int]) -> tuple[int, ...]:
        """Return the shape in numbers. words: `sizes` of a model."""
        return tuple(words[word] for word in self.shape.split())


@dataclass(frozen=True)
class Row:
    """One kind of parameter. {} in names stands for the number of the layer.

    cut: the dimension along which tensor-parallel ranks divide it; None where each has it whole.
    sees: of a whole one, whether its gradient is a sum over those ranks.
    decays: whether weight decay applies.
    fused_name: in Transformer Engine's layers, which keep a norm in the linear layer that follows.
    """

    name: str
    parts: tuple[Part, ...]
    exists: Condition
    initial: Initial
    decays: bool
    cut: int | None = None
    sees: Sees = Sees.ALL
    packing: Packing = Packing.ALONE
    fused_name: str | None = None

    def parts_of(self, model: ModelConfig) -> list[Part]:
        """Return the parts that a model has."""
        return [part for part in self.parts if part.exists(model)]


def sizes(model: ModelConfig, vocabulary: int) -> dict[str, int]:
    """Return the words of shapes in the table. vocabulary: rows of the embedding."""
    return {
        "vocabulary": vocabulary,
        "hidden": model.hidden_size,
        "queries": model.num_attention_heads * model.kv_channels,
        "keys": model.num_query_groups * model.kv_channels,
        "head": model.kv_channels,
        "mlp": model.ffn_hidden_size,
    }


def _vocabulary(name: str, there: str, exists: Condition = _always) -> Row:
    """A matrix with a row for each id, divided over the tensor-parallel ranks."""
    parts = (Part(f"{there}.weight", "vocabulary hidden"),)
    kinds = {"decays": True, "cut": 0, "packing": Packing.PADDED}
    return Row(f"{name}.weight", parts, exists, Initial.NORMAL, **kinds)


def _linear(
    name: str,
    *modules: tuple[str, str] | tuple[str, str, Condition],
    column: bool,
    bias: Condition = lambda model: model.add_bias_linear,
    packing: Packing = Packing.ALONE,
) -> tuple[Row, Row]:
    """Weight and bias of a linear layer, column-parallel (its outputs are divided) or row-parallel
    (its inputs are, and the bias is added to the sum over the ranks; Megatron-LM, arXiv 1909.08053,
    section 3). All that are row-parallel write to the residual stream.

    modules: those of Transformers, and the shapes of their weights.
    """
    weights = tuple(
        Part(f"{there}.weight", *rest, gain=not there.endswith((".q_proj", ".k_proj")))
        for there, *rest in modules
    )
    biases = tuple(
        Part(f"{there}.bias", shape.split()[0], *rest) for there, shape, *rest in modules
    )
    initial = Initial.NORMAL if column else Initial.RESIDUAL
    of_weight = {"decays": True, "cut": 0 if column else 1, "packing": packing}
    of_bias = {"decays": False, "cut": 0 if column else None, "packing": packing}
    return (
        Row(f"{name}.weight", weights, _always, initial, **of_weight),
        Row(f"{name}.bias", biases, bias, Initial.ZEROS, sees=Sees.TOKENS, **of_bias),
    )


def _norm(
    name: str,
    there: str,
    shape: str = "hidden",
    exists: Condition = _always,
    sees: Sees = Sees.TOKENS,
    fused_into: str | None = None,
    cut: int | None = None,
) -> tuple[Row, Row]:
    """Weight and bias of a norm; RMSNorm has no bias. cut: as of a Row."""

    def row(kind: str, initial: Initial, exists: Condition) -> Row:
        parts = (Part(f"{there}.{kind}", shape),)
        fused = fused_into and f"{fused_into}.layer_norm_{kind}"
        how = {"decays": False, "cut": cut, "sees": sees, "fused_name": fused}
        return Row(f"{name}.{kind}", parts, exists, initial, **how)

    def has_bias(model: ModelConfig) -> bool:
        return exists(model) and model.normalization == "LayerNorm"

    return row("weight", Initial.ONES, exists), row("bias", Initial.ZEROS, has_bias)


def _sub_layer_norm(linear: str, there: str, shape: str) -> tuple[Row, Row]:
    """Of the norm before a row-parallel layer, whose inputs are divided."""
    return _norm(f"{linear}.norm", there, shape, lambda model: model.sub_layer_norm, cut=0)


_HERE, _THERE = "decoder.layers.{}.", "model.layers.{}."
_QKV, _FC1 = _HERE + "self_attention.linear_qkv", _HERE + "mlp.linear_fc1"
_PROJ, _FC2 = _HERE + "self_attention.linear_proj", _HERE + "mlp.linear_fc2"


def _norm_of_heads(letter: str) -> tuple[Row, Row]:
    here, there = f"self_attention.{letter}_layernorm", f"self_attn.{letter}_norm"
    return _norm(_HERE + here, _THERE + there, "head", _norms_heads, Sees.HEADS)


TABLE: tuple[Row, ...] = (
    _vocabulary("embedding.word_embeddings", "model.embed_tokens"),
    *_norm(_HERE + "input_layernorm", _THERE + "input_layernorm", fused_into=_QKV),
    *_linear(
        _QKV,
        (_THERE + "self_attn.q_proj", "queries hidden"),
        (_THERE + "self_attn.k_proj", "keys hidden"),
        (_THERE + "self_attn.v_proj", "keys hidden"),
        column=True,
        bias=lambda model: model.add_bias_linear or model.add_qkv_bias,
        packing=Packing.GROUPED,
    ),
    *_norm_of_heads("q"),
    *_norm_of_heads("k"),
    *_linear(_PROJ, (_THERE + "self_attn.o_proj", "hidden queries"), column=False),
    *_sub_layer_norm(_PROJ, _THERE + "self_attn.attn_sub_norm", "queries"),
    *_norm(_HERE + "pre_mlp_layernorm", _THERE + "post_attention_layernorm", fused_into=_FC1),
    *_linear(
        _FC1,
        (_THERE + "mlp.gate_proj", "mlp hidden", lambda model: model.swiglu),
        (_THERE + "mlp.up_proj", "mlp hidden"),
        column=True,
        packing=Packing.STACKED,
    ),
    *_linear(_FC2, (_THERE + "mlp.down_proj", "hidden mlp"), column=False),
    *_sub_layer_norm(_FC2, _THERE + "mlp.ffn_sub_norm", "mlp"),
    *_norm("decoder.final_layernorm", "model.norm"),
    _vocabulary(
        "output_layer", "lm_head", exists=lambda model: model.untie_embeddings_and_output_weights
    ),
)

EMBEDDING, OUTPUT = TABLE[0].name, TABLE[-1].name

_ROWS = {row.name: row for row in TABLE}
_FUSED = {row.fused_name: row.name for row in TABLE if row.fused_name is not None}
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")


def row_of(name: str) -> Row:
    """Return the row of a parameter. Raises LookupError where the table has none."""
    pattern, _ = split_name(name)
    if pattern not in _ROWS:
        raise LookupError(f"no row for {name} in the table of parameters: {__file__}")
    return _ROWS[pattern]


def split_name(name: str) -> tuple[str, int | None]:
    """Return a name with {} for the number of its layer, and that number, if it has one."""
    match = _LAYER.search(name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}{{}}{name[match.end() :]}", int(match[0])


def canonical_name(local_name: str, first_layer: int = 0, tied: bool = False) -> str:
    """Return the global name of a parameter from that in a GPTModel.

    first_layer: number of layers before this pipeline stage. tied: the output layer's weight is a
    copy of the embedding's.
    """
    pattern, layer = split_name(local_name)
    name = _FUSED.get(pattern, pattern)
    if layer is not None:
        name = name.format(first_layer + layer)
    return EMBEDDING if tied and name == OUTPUT else name


def decays(name: str) -> bool:
    """Return whether weight decay applies to a parameter."""
    return row_of(name).decays


def is_layer_matrix(name: str) -> bool:
    """Return whether a parameter is a matrix of a layer, or several in one."""
    row = row_of(name)
    return "{}" in row.name and len(row.parts[0].shape.split()) == 2


def gradient_is_summed(name: str, divides_norms: bool) -> bool:
    """Return whether a parameter's gradient is a sum over the tensor-parallel ranks. divides_norms:
    whether Megatron's sequence parallelism is on."""
    row = row_of(name)
    return row.cut is None and (
        row.sees is Sees.HEADS or (row.sees is Sees.TOKENS and divides_norms)
    )


def deviations(row: Row, model: ModelConfig) -> list[float]:
    """Return the standard deviation of the initial values of each part of a row.

    With sub-layer norms that of a layer's matrix is Xavier's, times a gain for all of them but
    those of queries and keys (MAGNETO, arXiv 2210.06423, section 2.3: sqrt(log 2N) for a decoder
    of N layers). model: resolved.
    """
    parts = row.parts_of(model)
    if model.sub_layer_norm and "{}" in row.name:
        gain, words = math.sqrt(math.log(2 * model.num_layers)), sizes(model, 0)
        return [
            math.sqrt(2 / sum(part.size(words))) * (gain if part.gain else 1.0) for part in parts
        ]
    residual = math.sqrt(2 * model.num_layers) if row.initial is Initial.RESIDUAL else 1.0
    return [model.init_method_std / residual for _ in parts]


@dataclass(frozen=True)
class Parameter:
    """One parameter of one model, with its whole shape."""

    name: str
    shape: tuple[int, ...]
    row: Row
    layer: int | None


def parameters(model: ModelConfig, vocabulary: int) -> Iterator[Parameter]:
    """Yield every parameter of a resolved model, module by module. vocabulary: rows of the
    embedding."""
    words = sizes(model, vocabulary)
    for _, rows in itertools.groupby(TABLE, key=lambda row: row.name.rpartition(".")[0]):
        rows = [row for row in rows if row.exists(model)]
        for layer in range(model.num_layers) if rows and "{}" in rows[0].name else (None,):
            for row in rows:
                parts = [part.size(words) for part in row.parts_of(model)]
                shape = (sum(part[0] for part in parts), *parts[0][1:])
                yield Parameter(row.name.format(layer), shape, row, layer)


@dataclass(frozen=True)
class ParameterCount:
    """The parameters of a model that are exported, a shared embedding once, and those that fill up
    the vocabulary to a round number."""

    used: int
    padding: int
    tied: bool

    def __str__(self) -> str:
        notes = ["the embedding, which is the output layer too, counted once"] if self.tied else []
        if self.padding:
            notes.append(f"without {self.padding:,} that fill up the vocabulary")
        return f"{self.used:,} parameters" + (f" ({'; '.join(notes)})" if notes else "")


def used_rows(model: ModelConfig, vocab_size: int) -> int:
    """Return the rows of the embedding that are the model's own. vocab_size: the tokenizer's."""
    return model.padded_vocab_size or vocab_size


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Count the parameters of a resolved model. vocab_size: the tokenizer's."""

    def count(vocabulary: int) -> int:
        return sum(math.prod(parameter.shape) for parameter in parameters(model, vocabulary))

    used = count(used_rows(model, vocab_size))
    padding = count(model.vocabulary_rows(vocab_size)) - used
    return ParameterCount(used, padding, not model.untie_embeddings_and_output_weights)
