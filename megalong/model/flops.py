"""Floating-point operations of a model, by part, from its configuration.

*Model FLOPs* are those of the matrix products that the model is made of, whatever computes them: a
multiplication and an addition each; two products for each pair of a query and a key that attends to
it (scores, and what they weigh). Norms, rotary angles, activations, the softmax, the embedding's
lookup and the optimizer are not counted. A training step is the forward pass three times over: the
gradient of a product are two products of its size. What is computed once more to save memory
(`--recompute-granularity`, the scores in the backward pass of attention) is not counted: it is no
work of the model, and the utilisation that is made of these numbers is less for it. So does PaLM
(arXiv 2204.02311, appendix B), but for the scores, of which it counts all N^2.

Attention counts the exact pairs of its pattern (`DilatedPattern.attention_pairs`), which are
N (N + 1) / 2 a head for dense attention, and N^2 where it looks both ways (`--objective mlm`). The
*dense equivalent* of a model is the one with dense attention in the place of its own: what a
Transformer without the pattern would have had to compute for the same tokens.
"""

from __future__ import annotations

from megalong.attention.patterns import DensePattern
from megalong.config import Config

PARTS = ("qkv", "attention", "attention_output", "mlp", "logits")


def forward_flops(config: Config, vocab_size: int, dense: bool = False) -> dict[str, int]:
    """FLOPs of one forward pass over one sequence, by part (`PARTS`), of all layers and ranks.

    config: resolved. vocab_size: the tokenizer's; the logits of the rows that pad the vocabulary
    are computed, and counted, too. dense: count the dense equivalent.
    """
    model = config.model
    tokens, hidden, channels = model.seq_length, model.hidden_size, model.kv_channels
    heads, kv_heads = model.num_attention_heads, model.num_query_groups
    mlp_matrices = 3 if model.swiglu else 2
    return {
        "qkv": model.num_layers * _product(tokens, hidden, (heads + 2 * kv_heads) * channels),
        "attention": _attention_flops(config, dense),
        "attention_output": model.num_layers * _product(tokens, heads * channels, hidden),
        "mlp": model.num_layers * mlp_matrices * _product(tokens, hidden, model.ffn_hidden_size),
        "logits": _product(tokens, hidden, model.vocabulary_rows(vocab_size)),
    }


def step_flops(config: Config, vocab_size: int, dense: bool = False) -> dict[str, int]:
    """Model FLOPs of one training step, forward and backward over a global batch, by part."""
    forward = forward_flops(config, vocab_size, dense)
    return {part: 3 * config.training.global_batch_size * flops for part, flops in forward.items()}


def executed_flops(config: Config, vocab_size: int) -> dict[str, int]:
    """FLOPs that one training step executes, by part: with what is computed again to save memory,
    and with the scores that attention computes again in its backward pass.

    config: resolved, nothing left open in its memory section.
    """
    memory, parallel = config.memory, config.parallel
    forward = forward_flops(config, vocab_size)
    passes = dict.fromkeys(PARTS, 3.0)
    passes["attention"] = 3.5
    if memory.linear_cross_entropy:
        passes["logits"] += 1
    full = parallel.recompute_granularity == "full"
    tiled = memory.tiled_attention or memory.tiled_mlp
    if full and tiled and not parallel.recomputes_each_layer:
        for part in ("qkv", "attention", "attention_output", "mlp"):
            passes[part] += 1  # Megatron-core's, of several layers around the layers' own
        full = False
    if memory.tiled_attention:
        passes["qkv"] += 2 if full else 1  # for the output, and for the gradients
        passes["attention"] += 1 if full else 0
        passes["attention_output"] += 1 if memory.tiled_mlp else 0
        passes["attention_output"] += 1 if config.model.sub_layer_norm else 0  # its gradient
    else:
        passes["qkv"] += 1 if full else 0
        passes["attention"] += 1 if full or parallel.recompute_granularity == "selective" else 0
        passes["attention_output"] += 1 if full else 0
    if memory.tiled_mlp:
        passes["mlp"] += 2 / 3 if config.model.swiglu else 1 / 2  # all but the last matrix
    elif full:
        passes["mlp"] += 1
    sequences = config.training.global_batch_size
    return {part: round(sequences * passes[part] * flops) for part, flops in forward.items()}


def _product(rows: int, inner: int, columns: int) -> int:
    """Of a (rows, inner) matrix with an (inner, columns) one."""
    return 2 * rows * inner * columns


def _attention_flops(config: Config, dense: bool) -> int:
    model = config.model
    tokens, heads, kv_heads = model.seq_length, model.num_attention_heads, model.num_query_groups
    patterns = (
        DensePattern() if dense else config.attention.pattern(layer)
        for layer in range(model.num_layers)
    )
    pairs = sum(
        pattern.attention_pairs(tokens, heads, kv_heads, config.training.causal)
        for pattern in patterns
    )
    return 2 * 2 * model.kv_channels * pairs
