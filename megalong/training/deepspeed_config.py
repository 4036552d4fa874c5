"""DeepSpeed's settings, made from ours and merged with the user's own JSON file.

A flag's setting may be repeated in the file but not contradicted; everything else in the file is
passed on, if DeepSpeed knows it. DeepSpeed itself checks names only in those of its sections that
are pydantic models; elsewhere it passes over unknown keys in silence. So it reads the settings here
once, in a dictionary that notes which keys were looked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megalong.config import Config
from megalong.config.training import read_deepspeed_file
from megalong.model.optimizers import optimizer_of
from megalong.utils.errors import UserError, did_you_mean

# Gradients that are reduced together at most, out of a buffer of so many numbers: DeepSpeed's
# default; and of ZeRO 1, whose buffer is float32 beside 16-bit weights, 200 MB instead of 2 GB.
_BUCKET, _BUCKET_OF_ZERO_1 = 500_000_000, 50_000_000


def deepspeed_config(
    config: Config, data_parallel_size: int, parameters: int | None = None
) -> dict[str, Any]:
    """Make the dict for `deepspeed.initialize(config=...)`.

    parameters: numbers that the engine of this rank trains, before ZeRO 3 divides them: buckets of
        gradients are made for no more. None where nobody makes buckets.
    Raises UserError where `--deepspeed-config` contradicts a flag, or DeepSpeed refuses it.
    """
    ours, file = _defaults(config, parameters), config.training.deepspeed_config
    if file is None:
        return _merge(ours, _settings_of_flags(config))
    settings = read_deepspeed_file(file)
    _refuse_contradictions(settings, config, data_parallel_size)
    merged = _merge(_merge(ours, settings), _settings_of_flags(config))
    check_keys(merged, f"--deepspeed-config {file}")
    return merged


def _defaults(config: Config, parameters: int | None) -> dict[str, Any]:
    """What we set otherwise than DeepSpeed and no flag owns; the file may set it again."""
    bucket = _BUCKET
    if config.parallel.zero_stage == 1 and config.training.precision != "fp32":
        bucket = _BUCKET_OF_ZERO_1
    if parameters is not None:  # the buffer is made at once, and more than all never comes into it
        bucket = max(1, min(bucket, parameters))
    return {
        # It waits for the device in every forward pass, to measure what the run's log says anyway.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"reduce_bucket_size": bucket},
    }


def _settings_of_flags(config: Config) -> dict[str, Any]:
    training = config.training
    return {
        # Megatron-core's schedule runs the micro batches and scales the loss by their number;
        # engine.step() is the only boundary that DeepSpeed sees.
        "managed_gradient_accumulation": False,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_clipping": training.clip_grad,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_force_ds_cpu_optimizer": False,  # an offloaded optimizer is PyTorch's, too
        "zero_allow_untested_optimizer": True,  # of those of PyTorch it knows AdamW alone
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {
            "enabled": training.precision == "fp16",
            "loss_scale": training.loss_scale or 0,
            "initial_scale_power": int(training.initial_loss_scale).bit_length() - 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _refuse_contradictions(
    settings: dict[str, Any], config: Config, data_parallel_size: int
) -> None:
    training = config.training
    fixed, precision = _settings_of_flags(config), f"--precision {training.precision}"
    batches = "--global-batch-size / (--micro-batch-size x data-parallel ranks)"
    # Where in the file -> what it has to be, None: as we set it; and which flag says so.
    owners: dict[str, tuple[Any, str]] = {
        "train_batch_size": (training.global_batch_size, "--global-batch-size"),
        "train_micro_batch_size_per_gpu": (None, "--micro-batch-size"),
        "gradient_accumulation_steps": (config.num_microbatches(data_parallel_size), batches),
        "gradient_clipping": (None, "--clip-grad"),
        "zero_optimization.stage": (None, "--zero-stage"),
        "bf16.enabled": (None, precision),
        "fp16.enabled": (None, precision),
        "fp16.loss_scale": (None, "--loss-scale"),
        "fp16.initial_scale_power": (None, "the power of two of --initial-loss-scale"),
        "zero_optimization.reduce_scatter": (True, "megalong's gradient scale"),
        "zero_optimization.compute_grad_norm": (True, "megalong's log of gradient norms"),
        # With it DeepSpeed puts parameters elsewhere in the partitions than it says.
        "zero_optimization.round_robin_gradients": (False, "megalong's access to partitions"),
        "bf16.check_grad_overflow": (True, "megalong's end of a run gone wrong"),
        "zero_force_ds_cpu_optimizer": (None, "megalong's optimizer, which is PyTorch's,"),
        "data_types.grad_accum_dtype": (None, "megalong's gradient accumulation"),
        "managed_gradient_accumulation": (None, "megalong's schedule"),
    }
    optimizer = optimizer_of(training)
    for name, (value, flag) in optimizer.deepspeed_params().items():
        owners[f"optimizer.params.{name}"] = value, flag
    where = f"--deepspeed-config {training.deepspeed_config}"
    for section in ("zero_optimization", "bf16", "fp16", "data_types", "optimizer"):
        if not isinstance(settings.get(section, {}), dict):
            raise UserError(f"{where}: {section} must be an object in braces")
    for path, (ours, flag) in owners.items():
        theirs, ours = _get(settings, path), _get(fixed, path) if ours is None else ours
        if path == "zero_optimization.stage" and theirs == 0:
            theirs = 1  # the same arithmetic, see Config.resolve
        if theirs not in (None, "auto", ours):
            raise UserError(
                f"{where} sets {path} to {json.dumps(theirs)}, but {flag} makes it"
                f" {json.dumps(ours)}: make them agree, or leave it out of the file"
            )
    theirs = settings.pop("optimizer", {})
    _refuse_others(theirs, {"type", "params"}, where, "optimizer")
    # PyTorch's optimizer, which torch_adam asks for, it is anyway.
    known = {*optimizer.deepspeed_params(), "torch_adam"}
    _refuse_others(theirs.get("params", {}), known, where, "optimizer.params")
    kinds = optimizer.deepspeed_types
    kind = theirs.get("type", kinds[0])
    if str(kind).lower() not in map(str.lower, kinds):
        raise UserError(
            f"{where} asks for the optimizer {kind}, but --optimizer {training.optimizer} is"
            f" {kinds[0]}: make them agree, or leave it out of the file"
        )
    for section, instead in (
        ("scheduler", "--lr-decay-style, --lr-warmup-iters, --lr-decay-iters and --min-lr"),
        ("activation_checkpointing", "--recompute-granularity"),
    ):
        if section in settings:
            raise UserError(f"{where} has the section {section}: set {instead} instead")
    settings.pop("train_batch_size", None)


def _refuse_others(section: dict[str, Any], known: set[str], where: str, name: str) -> None:
    """Of the section that we carry out in DeepSpeed's place."""
    for key in section:
        if key not in known:
            raise UserError(
                f"{where}: {name}.{key} is not a setting of megalong's{did_you_mean(key, known)}"
            )


def _get(settings: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(settings, dict) or key not in settings:
            return None
        settings = settings[key]
    return settings


def _merge(base: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in ours.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# By `deepspeed.initialize`, before it makes its configuration.
_READ_ELSEWHERE = {"data_parallel_size", "sequence_parallel_size"}


def check_keys(settings: dict[str, Any], where: str) -> None:
    """Raise UserError where DeepSpeed does not know a key of `settings`, or refuses a value.

    settings: as `deepspeed.initialize` is given them. where: flag and file, for the message.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    noted = _Noting(settings)
    try:
        DeepSpeedConfig(noted)
    except ValidationError as error:
        raise UserError(_first_of(error, settings, where)) from error
    except Exception as error:
        line = " ".join(str(error).split())
        raise UserError(f"DeepSpeed refuses {where}: {line or type(error).__name__}") from error
    noted.taken_whole = False  # it is copied first, and then read
    for path, known in noted.passed_over():
        if path not in _READ_ELSEWHERE:
            raise UserError(_unknown(where, path, known))


class _Noting(dict):
    """A dictionary, with all that are in it, that knows which keys it was asked for."""

    def __init__(self, content: dict[str, Any]):
        super().__init__(
            {key: _Noting(v) if isinstance(v, dict) else v for key, v in content.items()}
        )
        self.asked: set[str] = set()
        self.taken_whole = False  # by somebody who may look at any of it later

    def passed_over(self, at: str = "") -> Iterator[tuple[str, set[str]]]:
        """The keys that nobody asked for, and what was asked for beside each; none of a section
        that is switched off."""
        if self.asked == {"enabled"} and dict.get(self, "enabled") is False:
            return
        for key, value in dict.items(self):
            if not self.taken_whole and self.asked and key not in self.asked:
                yield at + key, self.asked
            elif isinstance(value, _Noting):
                yield from value.passed_over(f"{at}{key}.")

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self.taken_whole = True
        return super().__iter__()

    get, keys, values, items = Mapping.get, Mapping.keys, Mapping.values, Mapping.items

    def __copy__(self) -> _Noting:
        self.taken_whole = True
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noting:
        return self.__copy__()


def _first_of(error: ValidationError, settings: dict[str, Any], where: str) -> str:
    """What pydantic found first, in one line: a key that is not there, or its value."""
    found = error.errors()[0]
    place = tuple(str(part) for part in found["loc"])
    path = ".".join(_path_to(place, found["input"], settings) or place)
    if found["type"] == "extra_forbidden":
        return _unknown(where, path, _fields())
    return f"DeepSpeed refuses {where}: {path} is {found['input']!r}: {found['msg']}"


def _path_to(
    place: tuple[str, ...], value: Any, settings: dict[str, Any], at: tuple[str, ...] = ()
) -> tuple[str, ...] | None:
    """Where in the settings the value is, of which pydantic knows the place in a section."""
    for key, inner in settings.items():
        here = (*at, key)
        if here[-len(place) :] == place and inner == value:
            return here
        if isinstance(inner, dict) and (found := _path_to(place, value, inner, here)):
            return found
    return None


def _fields() -> set[str]:
    """The keys of all sections that are pydantic models."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models, names = [DeepSpeedConfigModel], set()
    for model in models:
        models += model.__subclasses__()
        for name, field in model.model_fields.items():
            names |= {name, field.alias or name}
    return names


def _unknown(where: str, path: str, known: set[str]) -> str:
    return f"{where}: DeepSpeed knows no {path}{did_you_mean(path.rpartition('.')[2], known)}"
