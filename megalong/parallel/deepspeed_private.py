"""Undocumented names of DeepSpeed that we need: they stand here and nowhere else.

`NAMES` says of each where it lives and what for; a test looks for them in the installed DeepSpeed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

NAMES = {
    "engine": {
        "global_steps": "steps that were asked for, skipped ones too",
        "skipped_steps": "those of which the gradients had overflowed",
        "_manual_backward_expected": "that the loss was scaled, of which it wants to be told",
    },
    "DeepSpeedEngine": {
        "_do_optimizer_sanity_check": "chooses the kind of DeepSpeed's optimizer",
    },
    "any ZeRO optimizer": {
        "optimizer": "PyTorch's optimizer, which steps the partitions",
        "clear_backward_seen_flag": "a backward pass begins",
    },
    "ZeRO 1 and 2": {
        "_lazy_init_hp_params_optimizer_state": "tells parameters where their moments are",
        "update_lp_params": "rounds the master weights to the model's own",
        "overflow": "whether the last step was skipped",
        "loss_scaler": "fp16's loss scale and how long it has held",
        "check_grad_overflow": "whether to look for overflows",
        "check_overflow": "looks for them, and sets overflow",
        "_update_scale": "tells the loss scaler of them",
    },
    "ZeRO 3": {
        "fp32_partitioned_groups_flat": "its partitions, which param_groups do not hold",
        "_get_fp32_opt_state_partition": "the part of a master weight or moment on this rank",
        "_get_param_partition_rank": "the number of that part",
        "_swappable_optimizer_subgroup": "whether it lives on an NVMe disk between two steps",
        "_optimizer_states_and_gradient_swap_out": "and back there",
        "_reassign_or_swap_out_partitioned_parameters": "rounds the master weights of a group",
        "persistent_parameters": "small weights, which every rank holds whole",
        "overflow": "as of ZeRO 1 and 2",
        "loss_scaler": "as of ZeRO 1 and 2",
        "_overflow_check_and_loss_scale_update": "looks for overflows before the norm",
        "_loss_scale_update_and_overflow_cleanup": "goes by what that found, and forgets gradients",
        "_update_scale": "as of ZeRO 1 and 2",
    },
    "parameter of ZeRO 1 and 2": {
        "set_full_hp_param": "fills this rank's part of a master weight or moment from the whole",
        "_hp_mapping": "its piece in the partition of this rank, if it has one",
        "grad_accum": "the float32 gradient of a bf16 or fp16 parameter",
    },
    "piece of ZeRO 1 and 2": {
        "lp_fragment_address": "which elements of the parameter it is",
        "hp_fragment_address": "where they are in the partition",
    },
    "parameter of ZeRO 3": {
        "ds_id": "marks it",
        "ds_shape": "its shape before it was divided",
        "ds_tensor": "this rank's part of it",
    },
}


@contextlib.contextmanager
def one_optimizer_for_zero_1() -> Iterator[None]:
    """Around `deepspeed.initialize`: have ZeRO 1 step a bf16 model as one in fp16 or fp32.

    DeepSpeed's BF16_Optimizer holds the float32 gradients of all parameters all the time, and
    copies them to reduce them: 15.5 bytes a parameter at the peak of 8 ranks instead of 8.
    """
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine

    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(self: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> str:
        kind = choose(self, optimizer)
        return ZERO_OPTIMIZATION if kind == BFLOAT16 else kind

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def announce_backward(engine: Any) -> None:
    """Tell that another backward pass begins, of a loss that was scaled: of several in a row, with
    which a pipeline ends, DeepSpeed would overlook all but the first, and it looks for fp16's loss
    scale on every rank, when the last stage has applied it for all."""
    engine.optimizer.clear_backward_seen_flag()
    engine._manual_backward_expected = True


def step_without_update(engine: Any) -> None:
    """Do what `engine.step()` does where gradients have overflowed, but leave fp16's loss scale."""
    optimizer = engine.optimizer

    def overflows(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    replaced: dict[str, Any] = {"_update_scale": lambda *_: None}
    if hasattr(optimizer, "check_grad_overflow"):  # ZeRO 1 and 2
        replaced |= {"check_grad_overflow": True, "check_overflow": overflows}
    else:
        replaced |= {"_overflow_check_and_loss_scale_update": overflows}
    own = vars(optimizer)
    before = {name: own[name] for name in replaced if name in own}
    own.update(replaced)
    try:
        engine.step()
    finally:
        for name in replaced:
            del own[name]
        own.update(before)


def steps_made(engine: Any) -> int:
    """Updates since the engine was built: the steps that were not skipped."""
    return engine.global_steps - engine.skipped_steps


def was_skipped(engine: Any) -> bool:
    """Whether the last step left the weights alone, for gradients that are not finite."""
    return bool(getattr(engine.optimizer, "overflow", False))


def stepping_optimizer(engine: Any) -> torch.optim.Optimizer:
    """PyTorch's optimizer, which steps flat partitions of parameters, inside of DeepSpeed's."""
    return engine.optimizer.optimizer


def partitions(engine: Any) -> list[torch.Tensor]:
    """The flat float32 partitions of this rank, which the optimizer steps."""
    # ZeRO 3 puts its partitions into the groups one at a time, while it steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if flat is not None:
        return flat
    groups = stepping_optimizer(engine).param_groups
    return [partition for group in groups for partition in group["params"]]


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that is in this rank's partition: `size` elements, which begin at
    `start` in the partition, and at `first` in the parameter, both flat."""

    start: int
    first: int
    size: int


def piece_of(parameter: torch.nn.Parameter) -> Piece | None:
    """The piece that ZeRO 1 or 2 has given this rank, if it has."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(here.start, there.start, here.numel)


def link_state(engine: Any) -> None:
    """Tell the parameters where their pieces of the state are that the partitions were given."""
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # ZeRO 3 looks for them when they are wanted
        link()


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The parameter's shape, also where ZeRO 3 has divided it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def held(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """The tensors in which this rank holds a parameter, or its part of it."""
    part = getattr(parameter, "ds_tensor", None)
    return [parameter.data] if part is None else [parameter.data, part]


def held_gradients(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """The gradients of a parameter that this rank holds whole."""
    gradients = parameter.grad, getattr(parameter, "grad_accum", None)
    return [gradient for gradient in gradients if gradient is not None]


def fill(
    engine: Any, parameter: torch.nn.Parameter, moment: str | None, value: torch.Tensor
) -> None:
    """Set this rank's part of a moment, or of the master weight (None), from the whole tensor."""
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(value, moment)
        return
    # ZeRO 3. DeepSpeed's own setter reads past the end of a parameter whose elements its ranks do
    # not divide evenly: the last part is padded, the parameter is not.
    optimizer = engine.optimizer
    part, group = optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=moment
    )
    start = part.numel() * optimizer._get_param_partition_rank(parameter)
    mine = value.flatten()[start : start + part.numel()]
    part.data[: mine.numel()].copy_(mine)
    if optimizer._swappable_optimizer_subgroup(group):
        optimizer._optimizer_states_and_gradient_swap_out(group)


def round_master_weights(engine: Any) -> None:
    """Give the model the master weights in its own precision, as a step does at its end."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def loss_scaler_state(engine: Any) -> dict[str, Any] | None:
    """The numbers of fp16's dynamic loss scaler, by DeepSpeed's names; None where there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)}


def set_loss_scaler_state(engine: Any, state: dict[str, Any]) -> None:
    """Go on with these, where the loss scale is a dynamic one here too."""
    if loss_scaler_state(engine) is not None:
        vars(engine.optimizer.loss_scaler).update(state)


def count_once_in_norm(parameter: torch.nn.Parameter, is_copy: bool) -> None:
    """Mark a parameter that is a copy of another stage, which the gradient norm leaves out."""
    from deepspeed.runtime.constants import PIPE_REPLICATED

    setattr(parameter, PIPE_REPLICATED, is_copy)


def accumulated_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient collected in the micro batches so far, float32, under ZeRO 1."""
    collected = getattr(parameter, "grad_accum", None)  # where the model is not in float32 itself
    return parameter.grad if collected is None else collected


def skip_shared_memory_kernels() -> None:
    """Keep DeepSpeed from compiling, at its start on a CPU, kernels that only inference uses."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
