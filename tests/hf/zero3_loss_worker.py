"""What a model computes that DeepSpeed has divided among the ranks, whose sequences differ in
length: losses in chunks, gradients, and logits of long sequences as the whole model."""

import copy
import os

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from megalong.hf import modeling_longnet
from megalong.parallel.deepspeed_private import skip_shared_memory_kernels
from tests.hf.test_transformers import make_model, sequences

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,  # SGD
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main(tied: bool, checkpointing: bool) -> None:
    whole = make_model(tie_word_embeddings=tied).train()
    model = copy.deepcopy(whole)
    rows = [row[None] for row in sequences(40, 13)]
    modeling_longnet.MANY_LOGITS = 10**9
    (sum(whole(row, labels=row).loss for row in rows) / 2).backward()
    # One rank alone would take its 13 rows at once, without chunks.
    modeling_longnet.MANY_LOGITS, modeling_longnet.CHUNK_LOGITS = 20 * 50, 3 * 50
    modeling_longnet.TILE = 12
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    tokens = rows[engine.global_rank]
    outputs = engine(tokens, labels=tokens)
    assert outputs.logits.shape[1] == 0
    engine.backward(outputs.loss)
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            safe_get_full_grad(one), other.grad, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )
    engine.eval()
    with torch.no_grad():
        found, expected = engine(tokens).logits, whole.eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    engine.destroy()


if __name__ == "__main__":
    skip_shared_memory_kernels()
    deepspeed.init_distributed("gloo")
    assert int(os.environ["WORLD_SIZE"]) == 2
    main(tied=True, checkpointing=False)
    main(tied=False, checkpointing=True)
    torch.distributed.destroy_process_group()
