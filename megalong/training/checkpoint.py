"""Checkpoints: save aside, rename, then move the pointer; resume bit for bit.

A run folder holds

    latest                     the name of the newest complete checkpoint
    iter_0000200/              one checkpoint: tensors by torch.distributed.checkpoint, and
        progress.json          iteration, consumed samples, loss scale
        config.yaml            the resolved configuration
    iter_0000300.tmp/          one that a killed run left unfinished; never read

The tensors go by canonical parameter names (`megalong.model.names`), whole, in float32:
`weights.<name>` (the master weights, of which the model's own are a rounding),
`exp_avg.<name>`, `exp_avg_sq.<name>` (Adam's moments), and `random.<rank>.<generator>`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch.distributed.checkpoint.api import CheckpointException

from megalong.arguments import read_yaml, to_yaml
from megalong.config import AttentionConfig, Config, ModelConfig
from megalong.flags import ConfigError, flag_name
from megalong.model.names import EMBEDDING, named_parameters
from megalong.model.tensor_slices import cut_dimension, join_slices, tensor_slice
from megalong.parallel.mesh import Mesh
from megalong.training.engine import MOMENTS, TrainingEngine
from megalong.training.run_folder import same_folder


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    consumed_tokens: where the run stands in the training stream, whatever the sequence length and
        batch size were on the way.
    losses: those of the iterations since the last one that was logged.
    adam_step: updates that Adam has made; smaller than `iteration` where fp16 steps were skipped.
    loss_scaler: state of the fp16 dynamic loss scaler.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    adam_step: int = 0
    loss_scaler: dict[str, Any] | None = None


def open_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `--load` points at, or None for a run that starts at the beginning.

    A run that is started again with the same `--save` and `--load` may have been killed before its
    first checkpoint; anything else that is not there is an error, and so is a checkpoint of
    another model or, in the same folder, of a run on other data: ConfigError.
    """
    load = config.run.load
    if load is None:
        return None
    continues = same_folder(load, config.run.save)
    pointer = Path(load) / "latest"
    if not pointer.exists():
        if continues:
            return None
        raise ConfigError(f"--load {load}: no checkpoint there (no file `latest`)")
    checkpoint = Path(load) / pointer.read_text().strip()
    for name in ("progress.json", "config.yaml", ".metadata"):
        if not (checkpoint / name).exists():
            raise ConfigError(f"--load {load}: {checkpoint.name} is damaged, it has no {name}")
    _check_same_run(checkpoint, config, continues)
    return checkpoint


def read_progress(checkpoint: Path) -> Progress:
    """How far the run had come that wrote `checkpoint`."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


# What may differ between a checkpoint and the run that goes on from it.
_FREE_MODEL_FIELDS = {"seq_length", "init_method_std", "transformer_impl"}
# What a run in the same folder keeps: its data order and its held-out documents hang on it, and its
# losses would not be one curve.
_RUN_FIELDS = ["seed", "split", "data_path"]
_RUN_FIELDS += [field.name for field in dataclasses.fields(AttentionConfig)]


def _check_same_run(checkpoint: Path, config: Config, continues: bool) -> None:
    stored = read_yaml(str(checkpoint / "config.yaml"))
    sections = (config.model, config.attention, config.training, config.data)
    ours = {name: value for section in sections for name, value in vars(section).items()}
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in _FREE_MODEL_FIELDS]
    names += ["tokenizer_type", "tokenizer_model"]
    if continues:
        names += _RUN_FIELDS
    for name in names:
        theirs = stored.get(name)
        if _comparable(name, ours[name]) != _comparable(name, theirs):
            way_out = "start a new run without --load"
            if name in _RUN_FIELDS:
                way_out = "--save into another folder"
            raise ConfigError(
                f"{flag_name(name)} is {ours[name]}, but the checkpoint {checkpoint} was written"
                f" with {theirs}: set it to that, or {way_out}"
            )


def _comparable(name: str, value: Any) -> Any:
    """Data and tokenizers may have moved to another folder since; YAML has lists for tuples."""
    if name in ("data_path", "tokenizer_model") and value is not None:
        return Path(value).name
    return json.dumps(value)


def load_weights(checkpoint: Path, model: torch.nn.Module, config: Config, mesh: Mesh) -> None:
    """Fill a model that no engine holds yet, float32, with the checkpoint's master weights."""
    for name, parameter in named_parameters(model):
        parameter.data.copy_(
            _read_slice(checkpoint, "weights", name, parameter.shape, config, mesh)
        )


def load_optimizer(
    checkpoint: Path, engine: TrainingEngine, config: Config, progress: Progress
) -> None:
    """Fill the engine's master weights and Adam moments, and this rank's random states."""
    optimizer, mesh = engine.deepspeed.optimizer, engine.mesh
    for state in optimizer.optimizer.state.values():
        state["step"].fill_(progress.adam_step)
    for name, parameter in named_parameters(engine.model):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        values = {
            kind: _read_slice(checkpoint, kind, name, shape, config, mesh).to(mesh.device)
            for kind in ("weights", *MOMENTS)
        }
        safe_set_full_fp32_param(parameter, values["weights"])
        for kind in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[kind], kind)
    if progress.loss_scaler is not None and _loss_scaler_state(engine) is not None:
        vars(optimizer.loss_scaler).update(progress.loss_scaler)
    _load_random_states(checkpoint, engine.mesh)


def _read_slice(
    checkpoint: Path, kind: str, name: str, shape: torch.Size, config: Config, mesh: Mesh
) -> torch.Tensor:
    """This tensor-parallel rank's part, of `shape`, of one tensor; float32, on the CPU."""
    ranks, dimension, whole_shape = mesh.tensor_parallel_size, cut_dimension(name), list(shape)
    if dimension is not None:
        whole_shape[dimension] *= ranks
    tensor = torch.empty(whole_shape)
    _read(checkpoint, {f"{kind}.{name}": tensor})
    return tensor_slice(name, tensor, mesh.tensor_parallel_rank, ranks, config.model.swiglu)


def _read(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the tensors from the checkpoint. Every rank reads for itself: nobody waits for anybody.

    Raises ConfigError where the files do not hold what they should.
    """
    try:
        dcp.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    except (Exception, CheckpointException) as error:  # whatever the damage leads to
        cause = error
        if isinstance(error, CheckpointException):
            cause, _ = next(iter(error.failures.values()))
        raise ConfigError(
            f"--load: the checkpoint {checkpoint} cannot be read: {cause!r}"
        ) from error


def save_checkpoint(engine: TrainingEngine, config: Config, progress: Progress) -> Path:
    """Write one checkpoint of the run; called by every rank. Returns its folder.

    progress: how far the run has come; what the optimizer knows of it is filled in here.

    Until the rename the folder is called `.tmp`, and until the pointer moves nobody reads it: a
    run killed at any moment leaves the previous checkpoint in force.
    """
    mesh = engine.mesh
    folder = Path(config.run.save) / f"iter_{progress.iteration:07d}"
    aside = folder.with_suffix(".tmp")
    if mesh.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    dcp.save(_tensors(engine, config), checkpoint_id=str(aside))
    if mesh.is_main:
        progress = dataclasses.replace(
            progress, adam_step=_adam_step(engine), loss_scaler=_loss_scaler_state(engine)
        )
        (aside / "progress.json").write_text(json.dumps(asdict(progress)))
        (aside / "config.yaml").write_text(to_yaml(config))
        for file in aside.iterdir():
            _flush_to_disk(file)
        _flush_to_disk(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        pointer = folder.parent / "latest.tmp"
        pointer.write_text(folder.name)
        _flush_to_disk(pointer)
        os.replace(pointer, folder.parent / "latest")
        _flush_to_disk(folder.parent)
    dist.barrier()
    return folder


def _tensors(engine: TrainingEngine, config: Config) -> dict[str, torch.Tensor]:
    """What this rank has to save, on the CPU.

    The ranks of a pipeline stage put every tensor together, one after the other, and take turns
    in keeping it: each has an equal share of the stage to hold in memory and to write.
    """
    mesh, tensors = engine.mesh, {}
    for turn, (name, parameter) in enumerate(named_parameters(engine.model)):
        if name == EMBEDDING and not mesh.is_first_stage:
            continue  # the last stage's copy of a tied embedding
        parts = {"weights": safe_get_full_fp32_param(parameter)}
        parts |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        for kind, part in parts.items():
            whole = _join_over_tensor_ranks(name, part, config.model.swiglu, mesh)
            if turn % mesh.stage_size == mesh.stage_rank:
                tensors[f"{kind}.{name}"] = whole.cpu()
    tensors.update(_random_states(mesh))
    return tensors


def _join_over_tensor_ranks(name: str, part: torch.Tensor, gated: bool, mesh: Mesh) -> torch.Tensor:
    if cut_dimension(name) is None or mesh.tensor_parallel_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(mesh.tensor_parallel_size)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tensor_group)
    return join_slices(name, parts, gated)


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
    return {f"random.{mesh.rank}.{name}": state for name, state in states.items()}


def _load_random_states(checkpoint: Path, mesh: Mesh) -> None:
    states = _random_states(mesh)
    stored = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    if not states.keys() <= stored.keys():
        return  # written by fewer ranks: the generators start fresh on those that are new
    _read(checkpoint, states)
    values = {name.rsplit(".", 1)[1]: state for name, state in states.items()}
    torch.set_rng_state(values["torch"])
    version, _, gauss = random.getstate()
    random.setstate((version, tuple(values["python"].tolist()), gauss))
    *numpy_state, numpy_position = values["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(numpy_state, dtype=np.uint32), numpy_position))
    if "cuda" in values:
        torch.cuda.set_rng_state(values["cuda"], mesh.device)


def _adam_step(engine: TrainingEngine) -> int:
    return int(next(iter(engine.deepspeed.optimizer.optimizer.state.values()))["step"])


def _loss_scaler_state(engine: TrainingEngine) -> dict[str, Any] | None:
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)}


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
