"""The models that the benchmarks speak of: Llama's building blocks (RMSNorm, SwiGLU, RoPE, no
biases), sizes of GPT-3's, a vocabulary of 32,000."""

from __future__ import annotations

from typing import Any

VOCABULARY = 32_000

# Fields of megalong's configuration. Embeddings are tied but in 7B, as in Llama 2.
SHAPES: dict[str, dict[str, Any]] = {
    "125M": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "ffn_hidden_size": 2048,
    },
    "760M": {
        "num_layers": 24,
        "hidden_size": 1536,
        "num_attention_heads": 16,
        "ffn_hidden_size": 4096,
    },
    "1.3B": {
        "num_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "ffn_hidden_size": 5504,
    },
    "7B": {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "ffn_hidden_size": 11008,
        "untie_embeddings_and_output_weights": True,
    },
}


def flags(values: dict[str, Any]) -> str:
    """Fields of the configuration as flags of pretrain_longnet.py."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {value}")
    return " ".join(words)
