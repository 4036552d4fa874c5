"""Three training steps for each case, on however many ranks this was started with.

Rank 0 writes {case: (losses, grad norms, weights by canonical name)} to the file it is given.
"""

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param

from megalong.arguments import parse_arguments
from megalong.config import world_size
from megalong.data.batches import training_batches
from megalong.model.build import build_model
from megalong.model.names import canonical_name
from megalong.parallel import launch
from megalong.training.engine import TrainingEngine
from megalong.training.learning_rate import learning_rate
from megalong.training.run_data import open_run_data
from tests.launching import small_run_flags

CASES = {
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero3 gelu layernorm bias untied": {
        "zero_stage": 3,
        "no_swiglu": True,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    },
    "zero1 dense": {"attention": "dense"},
    "zero1 bf16": {"precision": "bf16"},
    "zero2 bf16": {"zero_stage": 2, "precision": "bf16"},
    "zero3 bf16": {"zero_stage": 3, "precision": "bf16"},
}
STEPS = 3

# Adam with its usual epsilon forgets the scale of the gradients, so that a wrong scale would go
# unseen in the weights, and blows a rounding difference in a vanishing gradient (a key's bias) up
# to a whole step. With an epsilon of the gradients' own size a weight says what its gradient was.
OPTIMIZER = {"adam_eps": 1e-3, "lr": 1e-2}


def main(data_path: str, output: str) -> None:
    results = {}
    with launch(seed=1) as mesh:
        for case, changes in CASES.items():
            flags = small_run_flags(Path(data_path), **OPTIMIZER, **changes)
            result = train(parse_arguments(flags).resolve(world_size()), mesh)
            results[case] = result
        if mesh.is_main:
            torch.save(results, output)


def train(config, mesh):
    data = open_run_data(config)
    engine = TrainingEngine(build_model(config, data.tokenizer.vocab_size), config, mesh)
    batches = training_batches(
        data.train,
        consumed_samples=0,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
    )
    steps = [
        engine.train_step(batches, learning_rate(i, config.training)) for i in range(1, STEPS + 1)
    ]
    weights = {
        canonical_name(name): safe_get_full_fp32_param(parameter).cpu()
        for name, parameter in engine.model.named_parameters()
    }
    return [step.loss for step in steps], [step.grad_norm for step in steps], weights


if __name__ == "__main__":
    main(*sys.argv[1:])
