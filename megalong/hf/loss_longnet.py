"""The loss of the next tokens without the logits of all positions. Travels in the exported folder.

Shape letters: b batch, s sequence, n rows (positions of all sequences), h hidden size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25  # logits that are held at once


def is_divided(module: nn.Module) -> bool:
    """Whether DeepSpeed has divided the module's parameters among the ranks (ZeRO 3). These meet
    whenever a module runs: all have to run it equally often, whatever the length of their input."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def most_rows(head: nn.Module, hidden_bsh: torch.Tensor) -> int:
    """How many rows the head gets at most on a rank that has to run it as often as this one."""
    rows = hidden_bsh.shape[:2].numel()
    if not is_divided(head):
        return rows
    most = torch.tensor(rows, device=hidden_bsh.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


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
    if graph and not is_divided(head):  # such weights are whole only while the head runs
        # Views: of a leaf autocast keeps one low-precision copy, and sums its gradients in that.
        weights = {
            name: weight.view_as(weight).to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in head.named_parameters()
            if weight.requires_grad
        }

    def of_chunk(rows_nh, wanted_n):
        narrow = {name: w.to(head.get_parameter(name).dtype) for name, w in weights.items()}
        logits = functional_call(head, narrow, (rows_nh,))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, wanted_n, ignore_index=ignore_index, reduction="sum")

    count = -(-most_rows(head, hidden_bsh) // max(CHUNK_LOGITS // vocab_size, 1))
    ends = [len(labels_n) * number // count for number in range(count + 1)]
    sizes = [end - start for start, end in pairwise(ends)]
    total = 0.0
    for chunk in zip(hidden_bsh.flatten(0, 1).split(sizes), labels_n.split(sizes), strict=True):
        part = checkpoint(of_chunk, *chunk, use_reentrant=False) if graph else of_chunk(*chunk)
        total = total + part
    if num_items_in_batch is None:
        return total / (labels_n != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
