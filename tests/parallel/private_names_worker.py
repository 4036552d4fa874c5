"""DeepSpeed's engines of every kind, their private names, and what `deepspeed_private` does with
them; and Megatron-core's private names, as they are before we replace them. Takes a corpus."""

import importlib
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megalong.config import world_size
from megalong.config.arguments import parse_arguments
from megalong.data.batches import training_batches
from megalong.model.build import build_model
from megalong.parallel import (
    cpu,
    deepspeed_private,
    process_group,
    temporary_mesh,
)
from megalong.training.engine import TrainingEngine
from megalong.training.run_data import open_run_data
from megalong.training.training_loss import LossSpikes, TrainingLoss
from tests.launching import small_run_flags

# (ZeRO stage, precision) -> what `NAMES` calls the optimizer and the parameters.
ENGINES = {
    (1, "fp32"): ("ZeRO 1 and 2", "parameter of ZeRO 1 and 2"),
    (1, "fp16"): ("ZeRO 1 and 2", "parameter of ZeRO 1 and 2"),
    (1, "bf16"): ("ZeRO 1 and 2", "parameter of ZeRO 1 and 2"),
    (2, "fp32"): ("ZeRO 1 and 2", "parameter of ZeRO 1 and 2"),
    (2, "bf16"): ("ZeRO 1 and 2", "parameter of ZeRO 1 and 2"),
    (3, "fp32"): ("ZeRO 3", "parameter of ZeRO 3"),
    (3, "bf16"): ("ZeRO 3", "parameter of ZeRO 3"),
}


def main(corpus: str) -> None:
    for module, names in cpu.NAMES.items():
        for name in names:
            assert callable(getattr(importlib.import_module(module), name)), name
    accelerator = get_accelerator()
    supported = [*accelerator.supported_dtypes(), torch.float16]
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: supported
    with process_group() as device:
        for (stage, precision), kinds in ENGINES.items():
            print(stage, precision, flush=True)
            flags = small_run_flags(Path(corpus), zero_stage=stage, precision=precision)
            config = parse_arguments(flags).resolve(world_size())
            with temporary_mesh(config, device) as mesh:
                data = open_run_data(config)
                model = build_model(config, data.tokenizer.vocab_size, mesh)
                engine = TrainingEngine(model, config, mesh)
                check_names(engine, kinds)
                check_functions(engine, data, config, stage, precision)
                engine.deepspeed.destroy()


def check_names(engine, kinds) -> None:
    optimizer_kind, parameter_kind = kinds
    parameter = next(engine.model.parameters())
    pieces = []
    if optimizer_kind == "ZeRO 1 and 2":
        pieces.append((parameter._hp_mapping, "piece of ZeRO 1 and 2"))
    for owner, kind in (
        (engine.deepspeed, "engine"),
        (engine.deepspeed, "DeepSpeedEngine"),
        (engine.deepspeed.optimizer, "any ZeRO optimizer"),
        (engine.deepspeed.optimizer, optimizer_kind),
        (parameter, parameter_kind),
        *pieces,
    ):
        for name in deepspeed_private.NAMES[kind]:
            assert hasattr(owner, name), f"{kind}: {name}"


def check_functions(engine, data, config, stage: int, precision: str) -> None:
    """That each does what it says."""
    parameter = engine.model.chunks[0].decoder.final_layernorm.weight
    assert deepspeed_private.full_shape(parameter) == (config.model.hidden_size,)
    [*_, moment] = engine.optimizer.moments
    value = torch.rand(config.model.hidden_size) + 1
    deepspeed_private.fill(engine.deepspeed, parameter, moment, value)
    deepspeed_private.fill(engine.deepspeed, parameter, None, value + 1)
    assert torch.equal(safe_get_full_optimizer_state(parameter, moment), value)
    assert torch.equal(safe_get_full_fp32_param(parameter), value + 1)
    deepspeed_private.round_master_weights(engine.deepspeed)
    # ZeRO 3 keeps small weights whole.
    assert torch.equal(parameter.detach(), (value + 1).to(parameter.dtype))

    if stage < 3:
        assert deepspeed_private.piece_of(parameter).size == parameter.numel()

    scaler = deepspeed_private.loss_scaler_state(engine.deepspeed)
    assert (scaler is not None) == (precision == "fp16")
    if scaler is not None:
        assert scaler["cur_scale"] == config.training.initial_loss_scale
        deepspeed_private.set_loss_scaler_state(engine.deepspeed, scaler | {"cur_scale": 2.0})
        assert deepspeed_private.loss_scaler_state(engine.deepspeed)["cur_scale"] == 2.0

    batches = training_batches(
        data.train,
        consumed_samples=0,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=0,
        data_parallel_size=1,
        sequence_range=(0, config.model.seq_length),
    )
    if stage == 1:
        engine.deepspeed.train()
        loss = TrainingLoss(1.0, 1, 0.0)
        engine._run(batches, engine.num_microbatches, loss, loss.beside)
        gradient = deepspeed_private.accumulated_gradient(parameter)
        assert gradient.dtype == torch.float32 and gradient.shape == parameter.shape
        assert gradient.abs().max() > 0
        engine.deepspeed.step()
    else:
        engine.train_step(batches, 1e-3)
    assert not deepspeed_private.was_skipped(engine.deepspeed)
    assert deepspeed_private.steps_made(engine.deepspeed) == 1
    check_step_without_update(engine, batches, config)


def check_step_without_update(engine, batches, config) -> None:
    """It leaves no trace: the next step is as if it and its batch had not been."""

    def state():
        stepping = deepspeed_private.stepping_optimizer(engine.deepspeed)
        parts = deepspeed_private.partitions(engine.deepspeed)
        moments = [
            stepping.state[part][name] for part in parts for name in engine.optimizer.moments
        ]
        # Of ZeRO 3's weights this rank's part: the whole is there until somebody lets go of it.
        weights = [deepspeed_private.held(parameter)[-1] for parameter in engine.model.parameters()]
        return [tensor.clone() for tensor in (*parts, *moments, *weights)]

    before, scaler = state(), deepspeed_private.loss_scaler_state(engine.deepspeed)
    engine.spikes = LossSpikes(1e-3, 2, [1.0, 1.0])
    result = engine.train_step(batches, 1e-3)
    assert result.usual_loss == 1.0 and result.skipped and result.grad_norm is None
    assert all(map(torch.equal, before, state()))
    assert scaler == deepspeed_private.loss_scaler_state(engine.deepspeed)
    assert deepspeed_private.steps_made(engine.deepspeed) == 1
    engine.spikes = None
    batch = [next(batches) for _ in range(engine.num_microbatches)]
    # Of one batch twice, the first time without an update: the gradients are its own alone.
    norms = [engine.train_step(iter(batch), rate).grad_norm for rate in (0.0, 1e-3)]
    assert norms[0] == norms[1] > 0
    assert not deepspeed_private.was_skipped(engine.deepspeed)
    assert deepspeed_private.steps_made(engine.deepspeed) == 3


if __name__ == "__main__":
    main(*sys.argv[1:])
