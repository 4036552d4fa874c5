"""Batches, optimizer, schedule, precision; what the user's own DeepSpeed file says of them.

What may stand in that file, and how it is merged with the flags:
`megalong.training.deepspeed_config`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.config.flags import (
    default,
    flag,
    flag_name,
    largest_divisor,
    refuse_without,
    require_more_than_zero,
    require_not_negative,
    require_positive,
)
from megalong.utils.errors import UserError

MASK_RATE = 0.15  # BERT's


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, optimizer, schedule, precision."""

    objective: str = flag(
        "causal",
        "causal: tell the next token; mlm: tell masked tokens from those on both sides",
        choices=("causal", "mlm"),
    )
    mask_rate: float | None = flag(
        None, f"mlm: share of the tokens that are to be told (default: {MASK_RATE})"
    )
    micro_batch_size: int = flag(1, "sequences in one forward pass on one rank")
    global_batch_size: int | None = flag(
        None, "sequences in one optimizer step (default: micro batch x data-parallel ranks)"
    )
    train_iters: int = flag(1000, "optimizer steps")
    lr: float = flag(6e-4, "peak learning rate")
    min_lr: float = flag(0.0, "learning rate after the decay")
    lr_decay_style: str = flag(
        "polynomial",
        "shape of the decay; inverse-square-root: --lr x sqrt(warm-up / iterations); WSD: stable,"
        " then --lr-wsd-decay-iters of --lr-wsd-decay-style",
        choices=("polynomial", "linear", "cosine", "inverse-square-root", "WSD", "constant"),
    )
    lr_decay_power: float = flag(1.0, "power of the polynomial decay; 1 is linear")
    lr_wsd_decay_style: str = flag(
        "exponential",
        "shape of the decay at the end of WSD",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = flag(
        None, "WSD: iterations of the decay, of which --lr-decay-iters is the last"
    )
    lr_decay_iters: int | None = flag(
        None, "last iteration of the decay (default: that of the run)"
    )
    lr_warmup_iters: int = flag(0, "iterations of linear warm-up")
    lr_begin_iters: int = flag(
        0, "iterations before the schedule of the learning rate begins, for a run with a new one"
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "with --load: the schedule of the learning rate is that of the checkpoint's run"
    )
    optimizer: str = flag(
        "adam",
        "adam, or adamw: AdamW; sgd: with momentum; muon: of the layers' matrices, the rest AdamW",
        choices=("adam", "sgd", "muon"),
        aliases={"adamw": "adam"},
    )
    weight_decay: float = flag(0.01, "weight decay, on matrices only")
    z_loss_coeff: float = flag(
        0.0, "z-loss: weight of the mean square of the logits' logsumexp (PaLM's is 1e-4)"
    )
    skip_loss_spikes: float | None = flag(
        None, "leave out updates whose loss is above this times the median before (default: never)"
    )
    loss_spike_window: int = flag(128, "losses that --skip-loss-spikes looks back on")
    clip_grad: float = flag(1.0, "clip the global gradient norm to this; 0 turns it off")
    adam_beta1: float = flag(0.9, "Adam's beta1")
    adam_beta2: float = flag(0.98, "Adam's beta2")
    adam_eps: float = flag(1e-8, "Adam's epsilon")
    sgd_momentum: float = flag(0.9, "momentum of SGD")
    muon_momentum: float = flag(0.95, "Muon's momentum")
    muon_nesterov: bool = flag(True, "Muon: Nesterov's momentum")
    muon_num_ns_steps: int = flag(5, "Muon: steps of the Newton-Schulz iteration")
    muon_scale_mode: str = flag(
        "spectral",
        "Muon: what the update of a matrix is multiplied by: sqrt(max(rows, columns));"
        " sqrt(max(1, rows / columns)); or sqrt(rows / columns)",
        choices=("spectral", "shape_scaling", "unit_rms_norm"),
    )
    muon_extra_scale_factor: float = flag(
        0.2, "Muon: and by this; 0.2 makes spectral updates as large as AdamW's"
    )
    muon_split_qkv: bool = flag(
        True, "Muon: queries, keys and values are three matrices, in spite of one product for all"
    )
    precision: str = flag("bf16", "number format of the model", choices=("fp32", "bf16", "fp16"))
    loss_scale: float | None = flag(None, "static loss scale for fp16 (default: dynamic)")
    initial_loss_scale: float = flag(2.0**16, "first dynamic loss scale for fp16, a power of two")
    seed: int = flag(1234, "seed of the initial weights, of the data order and of the masks")
    deepspeed_config: str | None = flag(
        None, "JSON file with further DeepSpeed settings, merged with those of the flags"
    )

    @property
    def causal(self) -> bool:
        """Whether a token is told from those before it alone, and not masked tokens from both
        sides."""
        return self.objective == "causal"

    def resolve(self, data_parallel_size: int) -> TrainingConfig:
        """Fill in what is open: a batch is one micro batch a replica, and the decay ends with the
        last iteration."""
        require_positive(self, "micro_batch_size", "train_iters")
        if not 0 <= self.lr_begin_iters < self.train_iters:
            raise UserError(
                f"--lr-begin-iters {self.lr_begin_iters} must lie in [0, {self.train_iters})"
            )
        return dataclasses.replace(
            self,
            mask_rate=self.mask_rate if self.causal else default(self.mask_rate, MASK_RATE),
            global_batch_size=default(
                self.global_batch_size, self.micro_batch_size * data_parallel_size
            ),
            lr_decay_iters=default(self.lr_decay_iters, self.train_iters - self.lr_begin_iters),
        )

    def check(self, data_parallel_size: int) -> None:
        """Raise UserError where these settings cannot train (after `resolve`)."""
        assert self.global_batch_size is not None and self.lr_decay_iters is not None
        step = self.micro_batch_size * data_parallel_size
        if self.global_batch_size <= 0 or self.global_batch_size % step:
            larger = max(self.global_batch_size // step + 1, 1) * step
            share, odd = divmod(self.global_batch_size, data_parallel_size)
            smaller = ""
            if share > 0 and not odd:
                smaller = f"--micro-batch-size {largest_divisor(share, self.micro_batch_size)}, or "
            raise UserError(
                f"--global-batch-size {self.global_batch_size} does not divide by"
                f" --micro-batch-size {self.micro_batch_size} x {data_parallel_size} data-parallel"
                f" ranks: set {smaller}--global-batch-size {larger}, or change the layout"
            )
        self._check_objective()
        require_more_than_zero(self, "lr", "lr_decay_power", "loss_scale")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must lie in [0, 2^32)")
        self._check_schedule()
        self._check_loss_spikes()
        require_positive(self, "muon_num_ns_steps")
        require_more_than_zero(self, "muon_extra_scale_factor")
        for name in ("adam_beta1", "adam_beta2", "sgd_momentum", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag_name(name)} must lie in [0, 1)")
        require_not_negative(self, "clip_grad", "weight_decay", "adam_eps", "z_loss_coeff")
        if self.initial_loss_scale < 1 or math.log2(self.initial_loss_scale) % 1:
            raise UserError(
                f"--initial-loss-scale {self.initial_loss_scale:g} must be a power of two"
            )

    def check_optimizer(self, zero_stage: int) -> None:
        """Raise UserError where the optimizer cannot work as ZeRO divides what it steps."""
        if self.optimizer != "muon":
            return
        if zero_stage == 3:
            raise UserError(
                "--optimizer muon needs whole matrices, of which --zero-stage 3 leaves each rank a"
                " part alone: set --zero-stage 2 (1 with pipeline stages), or --optimizer adam"
            )
        if keeps_optimizer_on_host(self.deepspeed_config):
            raise UserError(
                "--optimizer muon is too slow on a host: leave offload_optimizer and cpu_offload"
                f" out of --deepspeed-config {self.deepspeed_config}, or set --optimizer adam"
            )

    def _check_loss_spikes(self) -> None:
        factor = self.skip_loss_spikes
        require_positive(self, "loss_spike_window")
        if factor is None:
            what = "--skip-loss-spikes"
            return refuse_without(what, "that, 2 say", self, "loss_spike_window")
        if not 1 < factor < math.inf:
            raise UserError(f"--skip-loss-spikes {factor:g} must be more than 1 median: set 2, say")
        if keeps_optimizer_on_host(self.deepspeed_config):
            raise UserError(
                f"--skip-loss-spikes leaves out no update of an optimizer on the host, where"
                f" --deepspeed-config {self.deepspeed_config} has it: leave out one of the two"
            )

    def _check_schedule(self) -> None:
        # The last iteration of the decay, by the flag that says it.
        end = f"--train-iters {self.train_iters}"
        if self.lr_begin_iters:
            end += f" - --lr-begin-iters {self.lr_begin_iters}"
        if self.lr_decay_iters != self.train_iters - self.lr_begin_iters:
            end = f"--lr-decay-iters {self.lr_decay_iters}"
        room = self.lr_decay_iters - self.lr_warmup_iters
        if self.lr_warmup_iters < 0 or room < 0:
            raise UserError(
                f"--lr-warmup-iters {self.lr_warmup_iters} must lie between 0 and {end}"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        if self.lr_decay_style != "WSD":
            names = ("lr_wsd_decay_iters", "lr_wsd_decay_style")
            return refuse_without("WSD", "--lr-decay-style WSD", self, *names)
        iterations = self.lr_wsd_decay_iters
        if iterations is None:
            raise UserError(
                "--lr-decay-style WSD ends with a decay: set --lr-wsd-decay-iters to its length"
            )
        if not 0 < iterations <= room:
            raise UserError(
                f"--lr-wsd-decay-iters {iterations} must be at least 1, and at most {room}, the"
                f" iterations from the warm-up to {end}"
            )

    def _check_objective(self) -> None:
        if self.causal:
            return refuse_without("masked tokens", "--objective mlm", self, "mask_rate")
        if not 0 < self.mask_rate < 1:
            raise UserError(
                f"--mask-rate {self.mask_rate:g} must lie between 0 and 1 (BERT's is {MASK_RATE})"
            )


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Read the file of --deepspeed-config. Raises UserError where it is no JSON object."""
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed-config {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed-config {path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed-config {path}: expected a JSON object")
    return settings


def keeps_optimizer_on_host(path: str | None) -> bool:
    """Return whether the file asks for ZeRO-Offload: master weights and moments in the host's
    memory, or on its disks, and the update on its processors. path: None is no file."""
    zero = read_deepspeed_file(path).get("zero_optimization") if path is not None else None
    if not isinstance(zero, dict):
        return False
    offload = zero.get("offload_optimizer")
    here = isinstance(offload, dict) and offload.get("device", "none") != "none"
    return here or bool(zero.get("cpu_offload"))  # the older name, which DeepSpeed still takes
