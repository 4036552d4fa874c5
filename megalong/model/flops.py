"""Floating-point operations of a model, by part, from its configuration, and those of a device in a
second.

*Model FLOPs* are those of the matrix products that the model is made of, a multiplication and an
addition each, and of the exact pairs of a query and a key that attends to it, two products each. A
training step is the forward pass three times over. What is computed once more to save memory is not
counted. So does PaLM (arXiv 2204.02311, appendix B), but for the scores, of which it counts all
N^2. The *dense equivalent* of a model has dense attention in the place of its own.
"""

from __future__ import annotations

import re
import time

import torch

from megalong.attention.patterns import DensePattern
from megalong.config import Config

PARTS = ("qkv", "attention", "attention_output", "mlp", "logits")


def forward_flops(config: Config, vocab_size: int, dense: bool = False) -> dict[str, int]:
    """Return the FLOPs of one forward pass over one sequence, by part, of all layers and ranks.

    config: resolved. vocab_size: the tokenizer's; rows that pad the vocabulary are counted too.
    dense: count the dense equivalent.
    """
    model = config.model
    tokens, hidden, channels = model.seq_length, model.hidden_size, model.kv_channels
    heads, kv_heads = model.num_attention_heads, model.num_query_groups
    mlp_matrices = 3 if model.swiglu else 2
    layers = range(model.num_layers)
    patterns = [DensePattern() if dense else config.attention.pattern(layer) for layer in layers]
    causal = config.training.causal
    pairs = sum(pattern.attention_pairs(tokens, heads, kv_heads, causal) for pattern in patterns)
    return {
        "qkv": model.num_layers * _product(tokens, hidden, (heads + 2 * kv_heads) * channels),
        "attention": 2 * 2 * channels * pairs,
        "attention_output": model.num_layers * _product(tokens, heads * channels, hidden),
        "mlp": model.num_layers * mlp_matrices * _product(tokens, hidden, model.ffn_hidden_size),
        "logits": _product(tokens, hidden, model.vocabulary_rows(vocab_size)),
    }


def step_flops(config: Config, vocab_size: int, dense: bool = False) -> dict[str, int]:
    """Return the model FLOPs of one training step over a global batch, by part."""
    forward = forward_flops(config, vocab_size, dense)
    return {part: 3 * config.training.global_batch_size * flops for part, flops in forward.items()}


def executed_flops(config: Config, vocab_size: int) -> dict[str, int]:
    """Return the FLOPs that one training step executes, by part, with what is computed again.

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


# TFLOP/s of dense products with float32 sums: of bf16 and fp16, of TF32, of plain fp32. From the
# data sheets and white papers of NVIDIA, whose figures "with sparsity" are halved. A row holds for
# the devices whose name has all of its words; the first such row counts.
PEAK_TFLOPS = {
    ("GB300",): (2500.0, 1250.0, 80.0),
    ("B300",): (2250.0, 1125.0, 75.0),
    ("GB200",): (2500.0, 1250.0, 80.0),
    ("B200",): (2250.0, 1125.0, 75.0),
    ("B100",): (1750.0, 875.0, 60.0),
    ("GH200",): (989.4, 494.7, 67.0),
    ("H200", "NVL"): (835.5, 417.5, 60.0),
    ("H200",): (989.4, 494.7, 67.0),
    ("H100", "NVL"): (835.5, 417.5, 60.0),
    ("H100", "PCIe"): (756.0, 378.0, 51.0),
    ("H100",): (989.4, 494.7, 67.0),  # SXM
    ("H800",): (989.4, 494.7, 67.0),
    ("H20",): (148.0, 74.0, 44.0),
    ("A100",): (312.0, 156.0, 19.5),
    ("A800",): (312.0, 156.0, 19.5),
    ("A40",): (149.7, 74.8, 37.4),
    ("A30",): (165.0, 82.0, 10.3),
    ("A10",): (125.0, 62.5, 31.2),
    ("A10G",): (70.0, 35.0, 31.2),
    ("L40S",): (362.1, 183.0, 91.6),
    ("L40",): (181.1, 90.5, 90.5),
    ("L4",): (121.0, 60.0, 30.3),
    ("RTX", "6000", "Ada"): (364.2, 182.1, 91.1),
    ("RTX", "A6000"): (154.8, 77.4, 38.7),
    ("RTX", "5090"): (209.5, 104.8, 104.8),
    ("RTX", "4090"): (165.2, 82.6, 82.6),
    ("RTX", "3090"): (71.2, 35.6, 35.6),
}
_PARTS_OF_DEVICES = {"Laptop", "MIG", "D", "Ti"}  # words that make a device another one
_LONG = 0.005  # seconds of a product that takes long enough to be timed
_TRYING = 0.3  # seconds for the best of them, on a device that others may be using


def peak_of_name(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Return the peak FLOP/s of the GPU of this name for products in `dtype`; None for one not in
    the table. tf32: whether float32 products may round their factors to TF32."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if words & _PARTS_OF_DEVICES:
        return None
    for row, (half, tensor_float, single) in PEAK_TFLOPS.items():
        if words.issuperset(row):
            return 1e12 * (half if dtype.itemsize == 2 else tensor_float if tf32 else single)
    return None


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s of a device, and where that comes from: "data sheet" or "measured"."""
    if device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32
        known = peak_of_name(torch.cuda.get_device_name(device), dtype, tf32)
        if known is not None:
            return known, "data sheet"
    return measured_flops(device, dtype), "measured"


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of a few products of square matrices, each twice as wide as
    the one before, up to one that takes long enough, and of that for some time more."""
    best, size = 0.0, 256
    _seconds_of_product(torch.ones(size, size, dtype=dtype, device=device))  # starts threads
    while True:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_seconds_of_product(matrix) for _ in range(2))
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LONG or size == 4096:
            break
        size *= 2
    end = time.perf_counter() + _TRYING
    while time.perf_counter() < end:
        best = max(best, 2 * size**3 / _seconds_of_product(matrix))
    return best


def _seconds_of_product(matrix: torch.Tensor) -> float:
    wait = torch.cuda.synchronize if matrix.is_cuda else (lambda device: None)
    wait(matrix.device)
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    wait(matrix.device)
    return time.perf_counter() - start
