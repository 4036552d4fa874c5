"""Two training steps for each case, on however many ranks this was started with.

    parity_worker.py CORPUS FILE [usual|seldom]

Rank 0 writes {case: (losses, grad norms, weights by canonical name, evaluation)} to the file; the
cases are those of `parity_cases`.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.config import world_size
from megalong.config.arguments import parse_arguments
from megalong.data.batches import evaluation_batches, training_batches
from megalong.model.build import build_model
from megalong.model.stage import named_parameters
from megalong.model.tensor_slices import join_slices
from megalong.parallel import process_group, temporary_mesh
from megalong.training.engine import TrainingEngine, weights_divider
from megalong.training.evaluation import continued, evaluate, evaluate_task
from megalong.training.learning_rate import learning_rate
from megalong.training.run_data import open_run_data
from tests.launching import small_run_flags
from tests.training.parity_cases import LAYOUTS, cases, flags_of

STEPS = 2
MUON_STEPS = 5  # of its cases


def write_short_documents(prefix: Path) -> Path:
    """200 of 1 to 60 tokens, the last one always the same; so that a sequence has several."""
    draw = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in draw.integers(0, 60, 200):
        builder.add_document([*draw.integers(0, 256, length), 256], [length + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_masked_documents(prefix: Path) -> Path:
    """The same documents, with a mask by which some tokens count: those of `counts`."""
    tokens = np.fromfile(f"{write_short_documents(prefix)}.bin", np.uint16)
    counts(tokens).astype(np.uint8).tofile(f"{prefix}.loss")
    return prefix


def counts(tokens):
    """Two of a sequence on average, and of some sequences none."""
    return tokens % 64 == 3


def main(data_path: str, output: str, which: str = "usual") -> None:
    # DeepSpeed offers fp16 only to processors that compute in it; PyTorch does, on any.
    accelerator = get_accelerator()
    supported = [*accelerator.supported_dtypes(), torch.float16]
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: supported
    results = {}
    with process_group() as device:
        short = write_short_documents(Path(f"{output}-documents-{dist.get_rank()}"))
        masked = write_masked_documents(Path(f"{output}-masked-{dist.get_rank()}"))
        for case in cases(which):
            layout, stage, model = case
            if LAYOUTS[layout] != world_size():
                continue
            print(f"{time.monotonic():.0f}: {case}", flush=True)  # shown if a case fails or hangs
            flags = flags_of(layout, stage, model)
            data = short if "document_attention" in flags else Path(data_path)
            data = masked if model == "masked" else data
            flags = small_run_flags(data, **flags)
            config = parse_arguments(flags).resolve(world_size())
            with temporary_mesh(config, device) as mesh:
                results[case] = train(config, mesh)
                if case == ("one", 1, "masked"):
                    results["one", 1, "masked by hand"] = trained_by_hand(config, mesh)
        if mesh.is_main:
            torch.save(results, output)


def train(config, mesh):
    data = open_run_data(config)
    divide = weights_divider(config, mesh)
    model = build_model(config, data.tokenizer.vocab_size, mesh, divide=divide)
    engine = TrainingEngine(model, config, mesh)
    batches = training_batches(
        data.train,
        consumed_samples=0,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
        sequence_range=mesh.sequence_range(config.model.seq_length),
        masking=data.masking,
        documents=data.documents,
    )
    last = MUON_STEPS if config.training.optimizer == "muon" else STEPS
    steps = [
        engine.train_step(batches, learning_rate(i, config.training)) for i in range(1, last + 1)
    ]
    held_out = evaluation_batches(
        data.held_out["validation"],
        num_samples=3,  # more than a pipeline holds, and none for a last data-parallel rank
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
        sequence_range=mesh.sequence_range(config.model.seq_length),
        masking=data.masking,
        documents=data.documents,
    )
    evaluation = dataclasses.asdict(evaluate(engine, held_out, data.token_bytes, mesh))
    if data.tasks:
        [trials] = data.tasks
        evaluation["task"] = evaluate_task(engine, trials, mesh).record()
        evaluation["echoed"] = tokens_echoed(engine, data, mesh)
        evaluation["continued"] = continued(engine, data.prompts, config, mesh, 256, iteration=2)
    mine = {
        name: safe_get_full_fp32_param(parameter).cpu()
        for name, parameter in named_parameters(engine.model)
    }
    engine.deepspeed.destroy()  # its hooks keep model and process groups alive
    of_ranks = [None] * mesh.world_size
    dist.all_gather_object(of_ranks, (mesh.tensor_parallel_rank, mine))
    weights = {}
    for name in {name for _, theirs in of_ranks for name in theirs}:
        parts = {}
        for tensor_rank, theirs in of_ranks:
            if name in theirs:  # replicas must agree to the last bit
                known = parts.setdefault(tensor_rank, theirs[name])
                assert torch.equal(known, theirs[name]), name
        in_order = [parts[rank] for rank in sorted(parts)]
        weights[name] = join_slices(name, in_order, config.model)
    losses, norms = [step.loss for step in steps], [step.grad_norm for step in steps]
    losses += [step.z_loss for step in steps if step.z_loss is not None]
    return losses, norms, weights, evaluation


def trained_by_hand(config, mesh):
    """Losses, grad norms and weights of the same steps on masked data: the mean over what counts of
    the token losses of all sequences of a step at once, its gradient, and SGD with momentum."""
    data, training = open_run_data(config), config.training
    model = build_model(config, data.tokenizer.vocab_size, mesh)
    weights = dict(named_parameters(model))
    velocities = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    losses, norms = [], []
    for step in range(STEPS):
        first = step * training.global_batch_size
        samples = [data.train.sample(first + i) for i in range(training.global_batch_size)]
        tokens = torch.from_numpy(np.stack(samples))
        labels = tokens[:, 1:]
        counted = counts(labels)
        assert step or not counted.any(1).all()  # so that a micro batch has nothing to predict
        token_losses = model(
            input_ids=tokens[:, :-1],
            position_ids=torch.arange(labels.shape[1]),
            attention_mask=None,
            labels=labels,
        )
        loss = token_losses[counted].mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        losses.append(loss.item())
        norms.append(
            torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()
        )
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                velocities[name] = training.sgd_momentum * velocities[name] + gradient
                weight -= learning_rate(step + 1, training) * velocities[name]
    return losses, norms, {name: weight.detach().clone() for name, weight in weights.items()}


def tokens_echoed(engine, data, mesh):
    """Which tokens of a held-out sequence are the likeliest ones to follow themselves, 128 times 1
    or 0: with a tied embedding many are, and a model of two steps tells nothing of a task."""
    start, stop = mesh.sequence_range(engine.seq_length)
    tokens = torch.from_numpy(data.held_out["validation"].sample(0, start, stop))[None]
    batch = {"tokens": tokens, "labels": tokens, "positions": torch.arange(start, stop)}
    echoed = torch.zeros(engine.seq_length, dtype=torch.int64, device=mesh.device)
    for _, likeliest, _ in engine.token_scores([batch]):
        echoed[start:stop] = likeliest[0]
    return (mesh.sum_of_losses(echoed) // mesh.data_parallel_size).tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
