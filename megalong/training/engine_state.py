"""Between the engine and a checkpoint, which holds whole tensors under canonical names, whatever
the layout: a rank cuts its own part out of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megalong.checkpoint.content import WEIGHTS, Progress, random_state_name, tensor_name
from megalong.checkpoint.manifest import DamagedCheckpoint
from megalong.checkpoint.reading import CheckpointReader
from megalong.config import Config, ModelConfig
from megalong.data.batches import ADD_A_ROW
from megalong.model.optimizers import Optimizer
from megalong.model.parameters import EMBEDDING, is_layer_matrix
from megalong.model.stage import named_parameters
from megalong.model.tensor_slices import cut_dimension, join_slices, tensor_slice
from megalong.parallel.deepspeed_private import (
    fill,
    full_shape,
    loss_scaler_state,
    round_master_weights,
    set_loss_scaler_state,
)
from megalong.parallel.mesh import Mesh
from megalong.training.engine import TrainingEngine


def tensors_to_save(engine: TrainingEngine, config: Config) -> dict[str, torch.Tensor]:
    """Copy to the CPU what this rank has to save; called by every rank. The ranks of a pipeline
    stage put every tensor together, and take turns in keeping it: each has an equal share."""
    mesh, tensors = engine.mesh, {}
    for turn, (name, parameter) in enumerate(named_parameters(engine.model)):
        if name == EMBEDDING and not mesh.is_first_stage:
            continue  # the last stage's copy of a tied embedding
        # DeepSpeed puts these together anew: the next step does not change them.
        parts = {WEIGHTS: safe_get_full_fp32_param(parameter)}
        for moment in kinds_of(name, engine.optimizer)[1:]:
            parts[moment] = safe_get_full_optimizer_state(parameter, moment)
        for kind, part in parts.items():
            whole = _join_over_tensor_ranks(name, part, config.model, mesh)
            if turn % mesh.stage_size == mesh.stage_rank:
                tensors[tensor_name(kind, name)] = whole.cpu()
    tensors.update(_random_states(mesh))
    return tensors


def progress_to_save(engine: TrainingEngine, progress: Progress) -> Progress:
    """The run's progress, with what the optimizer knows of it filled in."""
    return dataclasses.replace(
        progress,
        updates=engine.updates,
        recent_losses=[] if engine.spikes is None else list(engine.spikes.losses),
        loss_scaler=loss_scaler_state(engine.deepspeed),
    )


def load_checkpoint(reader: CheckpointReader, engine: TrainingEngine, config: Config) -> Progress:
    """Fill the engine with a checkpoint, but for what the flags leave out; called by every rank.
    Returns how far the run has come: with `--finetune` nowhere. Raises DamagedCheckpoint."""
    progress = Progress() if config.run.finetune else reader.progress()
    if not config.run.loads_optimizer:
        progress = dataclasses.replace(progress, updates=0, loss_scaler=None)
    # Before the first update all moments are zero, as they are here: any optimizer may go on.
    with_moments = progress.updates > 0
    for parameter, kind, value in _slices(reader, engine, config, with_moments):
        fill(engine.deepspeed, parameter, None if kind == WEIGHTS else kind, value)
    if config.run.load_rng and not config.run.finetune:
        _load_random_states(reader, engine.mesh)
    round_master_weights(engine.deepspeed)
    engine.resume_at(progress.updates)
    if engine.spikes is not None:
        engine.spikes.losses.extend(progress.recent_losses)
    if progress.loss_scaler is not None:
        set_loss_scaler_state(engine.deepspeed, progress.loss_scaler)
    return progress


def _slices(
    reader: CheckpointReader, engine: TrainingEngine, config: Config, with_moments: bool
) -> Iterator[tuple[torch.nn.Parameter, str, torch.Tensor]]:
    """Yield this rank's parts of the tensors: the parameter, the kind, and the values, float32, on
    the device. The ranks that want the same parts take turns in reading, and tell each other."""
    mesh = engine.mesh
    wanted = [
        (name, parameter, kind)
        for name, parameter in named_parameters(engine.model)
        for kind in kinds_of(name, engine.optimizer, with_moments)
    ]
    for name, parameter, kind in wanted:
        _check_shape(reader, name, parameter, kind, config, mesh)

    def read(name: str, _, kind: str) -> torch.Tensor:
        whole, ranks = reader.read(tensor_name(kind, name)), mesh.tensor_parallel_size
        part = tensor_slice(name, whole, mesh.tensor_parallel_rank, ranks, config.model)
        return part.contiguous().to(mesh.device)

    group = mesh.replica_group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for first in range(0, len(wanted), ranks):
        turn = wanted[first : first + ranks]
        mine = read(*turn[rank]) if rank < len(turn) else None
        for source, (_, parameter, kind) in enumerate(turn):
            part = mine
            if source != rank:
                part = torch.empty(full_shape(parameter), dtype=torch.float32, device=mesh.device)
            dist.broadcast(part, group=group, group_src=source)
            yield parameter, kind, part


def kinds_of(name: str, optimizer: Optimizer, with_moments: bool = True) -> tuple[str, ...]:
    """The kinds of tensors that a checkpoint holds of a parameter."""
    moments = optimizer.moments_of(is_layer_matrix(name)) if with_moments else ()
    return (WEIGHTS, *moments)


def _check_shape(
    reader: CheckpointReader,
    name: str,
    parameter: torch.nn.Parameter,
    kind: str,
    config: Config,
    mesh: Mesh,
) -> None:
    whole, dimension = list(full_shape(parameter)), cut_dimension(name)
    if dimension is not None:
        whole[dimension] *= mesh.tensor_parallel_size
    stored = reader.shape(tensor_name(kind, name))
    if stored != tuple(whole):
        lacks_mask = not config.training.causal and name == EMBEDDING and stored[0] < whole[0]
        raise DamagedCheckpoint(
            f"{reader.checkpoint} is of another model: {name} is {stored} there, and has to be"
            f" {tuple(whole)}{f'; {ADD_A_ROW}' if lacks_mask else ''}"
        )


def _join_over_tensor_ranks(
    name: str, part: torch.Tensor, model: ModelConfig, mesh: Mesh
) -> torch.Tensor:
    if cut_dimension(name) is None or mesh.tensor_parallel_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(mesh.tensor_parallel_size)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tensor_group)
    return join_slices(name, parts, model)


def _random_states(mesh: Mesh) -> dict[str, torch.Tensor]:
    """The states of this rank's random generators, as integer tensors."""
    _, python_state, _ = random.getstate()
    _, numpy_state, numpy_position, *_ = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_state),
        "numpy": torch.tensor([*numpy_state.tolist(), numpy_position]),
    }
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return {random_state_name(mesh.rank, name): state for name, state in states.items()}


def _load_random_states(reader: CheckpointReader, mesh: Mesh) -> None:
    # Those that are not there (of a new rank, or of a GPU where there was none) start fresh.
    names = _random_states(mesh).keys() & reader.tensors.keys()
    values = {name.rsplit(".", 1)[1]: reader.read(name) for name in names}
    if "torch" in values:
        torch.set_rng_state(values["torch"])
    if "python" in values:
        version, _, gauss = random.getstate()
        random.setstate((version, tuple(values["python"].tolist()), gauss))
    if "numpy" in values:
        *numpy_state, numpy_position = values["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(numpy_state, dtype=np.uint32), numpy_position))
    if "cuda" in values:
        torch.cuda.set_rng_state(values["cuda"], mesh.device)
