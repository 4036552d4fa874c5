"""The loss of the next tokens without the logits of all positions. Travels in the exported folder.

Shape letters: b batch, s sequence, n rows (positions of all sequences), h hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25  # logits that are held at once


def next_token_loss(
    head: nn.Module,
    hidden_bsh: torch.Tensor,
    labels_bs: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """What Transformers' ForCausalLMLoss makes of the head's logits, at least in float32: the mean
    cross entropy of each position's next label, or the sum over num_items_in_batch.

    Logits exist for a chunk of rows, in the backward pass too, where the head runs again. The
    gradients of the head's weights are summed over the chunks in at least float32, but under
    DeepSpeed's ZeRO 3 in their own dtype.
    """
    labels_bs = F.pad(labels_bs, (0, 1), value=ignore_index)[:, 1:].to(hidden_bsh.device)
    labels_n = labels_bs.flatten()
    weights, graph = {}, torch.is_grad_enabled()
    if graph:
        # Views: of a leaf autocast keeps one low-precision copy, and sums its gradients in that.
        # What DeepSpeed has divided among the ranks (ZeRO 3) is whole only inside of the head.
        weights = {
            name: weight.view_as(weight).to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in head.named_parameters()
            if weight.requires_grad and not hasattr(weight, "ds_id")
        }

    def of_chunk(rows_nh, wanted_n):
        narrow = {name: w.to(head.get_parameter(name).dtype) for name, w in weights.items()}
        logits = functional_call(head, narrow, (rows_nh,))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, wanted_n, ignore_index=ignore_index, reduction="sum")

    size = max(CHUNK_LOGITS // vocab_size, 1)
    total = 0.0
    for chunk in zip(hidden_bsh.flatten(0, 1).split(size), labels_n.split(size), strict=True):
        part = checkpoint(of_chunk, *chunk, use_reentrant=False) if graph else of_chunk(*chunk)
        total = total + part
    if num_items_in_batch is None:
        return total / (labels_n != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
