"""What a LongNet model is, for Transformers. Travels in the exported folder: needs only that, and
the pattern and the rotary frequencies beside it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from megalong.attention.pattern import DilatedPattern
from megalong.model.rope_scaling import rope_frequencies

KINDS = ("dilated", "dense", "local", "sparse")
_CHOICES = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "position_embedding_type": ("rope", "xpos", "none"),
    "document_attention": ("mixed", "isolated"),
}


class LongNetConfig(PreTrainedConfig):
    """A Transformer with dilated attention (LongNet, arXiv 2307.02486): a decoder, or with
    `causal` False an encoder, whose tokens see both sides.

    segment_lengths, dilation_rates: the branches (w, r) of dilated attention. A head with offset o
        keeps the positions o, o + r, o + 2r, ... of each segment of w, and they attend to each
        other; one softmax runs over the keys of all branches.
    head_offsets: a rule, "mod", "block" or "layer", or a table of branches x query heads; see
        `DilatedPattern`.
    attention: the kind of all layers, or a list of kinds that repeats over them: "dilated",
        "dense", "local" (a query sees `window_size` positions) or "sparse" (it sees its block of
        `sparse_block_size`, and of each block before it `sparse_columns`).
    max_position_embeddings: the sequence length of training; longer sequences work.
    position_embedding_type: "rope", "xpos" (arXiv 2212.10554, scores that decay over
        `xpos_scale_base` positions; of about 35,000 tokens, in the middle of which the middle of
        `max_position_embeddings` is) or "none".
    rope_parameters: RoPE's base and scaling, as Transformers has them: `rope_theta`, `rope_type`
        ("default", "linear", "llama3" or "yarn") and what that takes; None without positions.
    swiglu: a gated SiLU MLP; else GELU. linear_bias: biases in all linear layers; qkv_bias: in the
        query, key and value projections. qk_norm: a norm of each head's queries and keys.
    document_attention: "isolated": the model was trained on documents that share a row without
        seeing each other, and `input_ids` are read so (`LongNetModel.forward`); "mixed": a token
        sees the documents before its own.
    sub_layer_norm: a norm before the output projection and before the MLP's last matrix, too
        (MAGNETO, arXiv 2210.06423).
    """

    model_type = "longnet"

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 8192
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = True
    linear_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sub_layer_norm: bool = False
    position_embedding_type: str = "rope"
    xpos_scale_base: int = 512
    rope_parameters: dict | None = None
    attention: str | list[str] = "dilated"
    segment_lengths: list[int] | None = None
    dilation_rates: list[int] | None = None
    head_offsets: str | list[list[int]] = "mod"
    window_size: int = 2048
    sparse_block_size: int = 2048
    sparse_columns: int = 32
    document_attention: str = "mixed"
    causal: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.segment_lengths is None:
            self.segment_lengths = [self.max_position_embeddings]
            self.dilation_rates = [1]
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "none":
            self.rope_parameters = None  # Transformers' default, which it checks against head_dim
        else:
            rope_frequencies(self.rope_parameters, self.head_dim)  # raises ValueError for others
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of"
                f" num_key_value_heads ({self.num_key_value_heads})"
            )
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("window_size", "sparse_block_size", "sparse_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sparse_columns > self.sparse_block_size:
            raise ValueError(
                f"sparse_columns ({self.sparse_columns}) must be at most sparse_block_size"
                f" ({self.sparse_block_size})"
            )
        for layer, kind in enumerate(self.kinds):
            if kind not in KINDS:
                raise ValueError(f"attention must be of {', '.join(KINDS)}, got {kind!r}")
            self.branches(layer)

    @property
    def kinds(self) -> list[str]:
        """The kinds of attention, of one layer after the other, and so on."""
        return [self.attention] if isinstance(self.attention, str) else list(self.attention)

    def kind(self, layer: int) -> str:
        """The kind of a layer, from 0."""
        return self.kinds[layer % len(self.kinds)]

    def branches(self, layer: int) -> list[tuple[int, int, list[int]]]:
        """Segment length, dilation rate and the offset of each query head, of every branch of a
        layer (from 0); of a sparse one that of its own block. Raises ValueError where the fields do
        not fit each other."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        kind = self.kind(layer)
        if kind == "local":
            return []
        if kind == "dense":
            pattern = DilatedPattern((2**62,), (1,))  # one segment without end
        elif kind == "sparse":
            pattern = DilatedPattern((self.sparse_block_size,), (1,))
        else:
            fields = self.segment_lengths, self.dilation_rates, self.head_offsets
            pattern = DilatedPattern(*fields, layer)
        offsets = pattern.offsets(heads, kv_heads)
        return [(*branch, list(row)) for branch, row in zip(pattern.branches, offsets, strict=True)]
