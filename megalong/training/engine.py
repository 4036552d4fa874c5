"""One optimizer step: a DeepSpeed engine around the model, driven by Megatron-core's schedule.

Gradient scale. The gradient wanted is that of (sum of token losses) / (predictions of the global
batch): all its tokens, or fewer, which the ranks count together beforehand.
DeepSpeed averages gradients over data-parallel ranks and sums them over the ranks of a sequence,
except for ZeRO 3, whose reduce-scatter averages over both; Megatron-core's schedule divides a loss
by the number of micro batches and multiplies it by the ranks of a sequence. The loss of a micro
batch on this rank is scaled beforehand to undo all that.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch

from megalong.config import Config
from megalong.data.batches import IGNORE_INDEX, Batch
from megalong.model.optimizers import optimizer_of
from megalong.model.output import NextTokens
from megalong.model.stage import PipelineStage
from megalong.parallel.deepspeed_private import (
    full_shape,
    one_optimizer_for_zero_1,
    step_without_update,
    stepping_optimizer,
    steps_made,
    was_skipped,
)
from megalong.parallel.mesh import Mesh
from megalong.parallel.schedule import (
    ScheduleModule,
    TiedEmbedding,
    run_schedule,
    sum_divided_gradients,
)
from megalong.parallel.traffic import Counts, CountTraffic
from megalong.training.deepspeed_config import deepspeed_config
from megalong.training.parameter_groups import (
    create_state,
    parameter_groups,
    show_whole_matrices,
)
from megalong.training.training_loss import (
    LossSpikes,
    StepResult,
    TrainingLoss,
    held_out_losses,
    next_tokens,
)
from megalong.utils.errors import UserError


class TrainingEngine:
    """The model and its optimizer: training steps, and token losses of held-out batches.

    sources: names of those of the training batches, whose losses are told apart.
    counted_step: the number, from 1, of the step whose traffic is counted.
    """

    def __init__(
        self, model: PipelineStage, config: Config, mesh: Mesh, sources: Sequence[str] = ("",)
    ):
        import deepspeed

        from megalong.parallel.mesh import DeepSpeedMPU

        training = config.training
        self.mesh = mesh
        self.micro_batch_size = training.micro_batch_size
        self.seq_length = config.model.seq_length
        self.num_microbatches = config.num_microbatches(mesh.data_parallel_size)
        shards = 1 if config.parallel.zero_stage == 3 else mesh.sequence.size
        self.loss_scale = mesh.data_parallel_size / shards  # see above
        self.tokens_per_step = training.global_batch_size * config.model.seq_length
        self.sources = sources
        self.z_loss_coeff = training.z_loss_coeff
        self.spikes = None
        if training.skip_loss_spikes is not None:
            self.spikes = LossSpikes(training.skip_loss_spikes, training.loss_spike_window)
        self.model = model
        sum_divided_gradients(model, mesh.tensor_group)
        self.tied_embedding = TiedEmbedding(
            model.copied_embedding, is_copy=model.is_last, group=mesh.embedding_group
        )
        parameters = sum(full_shape(parameter).numel() for parameter in model.parameters())
        settings = deepspeed_config(config, mesh.data_parallel_size, parameters)
        self.optimizer = optimizer_of(training)
        groups = parameter_groups(model, self.optimizer, training.weight_decay)
        fused = mesh.device.type == "cuda"
        optimizer = self.optimizer.build(groups, fused)
        with _refusals(config):
            if config.parallel.zero_stage == 3:
                _divide_weights(model, settings, mesh)
            # It prints its memory use.
            with contextlib.redirect_stdout(io.StringIO()), one_optimizer_for_zero_1():
                self.deepspeed, *_ = deepspeed.initialize(
                    model=model,
                    optimizer=optimizer,
                    config=settings,
                    mpu=DeepSpeedMPU(mesh),
                )
        create_state(self.deepspeed, self.optimizer, fused)
        if self.optimizer.layer_matrices_apart:
            show_whole_matrices(self.deepspeed, model, config, mesh)
        model.config.grad_scale_func = self.deepspeed.scale
        self.traffic: Counts | None = None  # of one step on this rank, until it is taken
        # The first step that is like all that follow. ZeRO 3 finds its way in the first forward
        # pass, and its ranks compare in the second what they found.
        compares_late = config.parallel.zero_stage == 3 and self.num_microbatches == 1
        self.counted_step = 3 if compares_late else 2
        self._steps = 0
        self._updates_before = 0  # those of the run that a checkpoint was written by
        self.modules = [
            ScheduleModule(self.deepspeed, chunk, number)
            for number, chunk in enumerate(model.chunks)
        ]

    def destroy(self) -> None:
        """Let go of the model and of the process groups, which DeepSpeed's hooks keep alive."""
        self.deepspeed.destroy()

    def train_step(self, batches: Iterator[Batch], learning_rate: float) -> StepResult:
        """Forward and backward over one global batch, then one optimizer update.

        batches: yields this rank's micro batches, see `megalong.data.batches`.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.train()
        self._steps += 1
        counting = self._steps == self.counted_step
        groups = self.mesh.groups_by_axis
        with CountTraffic(groups) if counting else contextlib.nullcontext() as counter:
            result = self._train_step(batches)
        if counting:
            self.traffic = counter.counts
        return result

    def take_traffic(self) -> dict[str, Any] | None:
        """Return once what this rank sent and received in the counted step: "per_step", by axis and
        collective, and "per_layer", bytes of the sequence axis for one layer and micro batch."""
        counts, self.traffic = self.traffic, None
        if not counts:
            return None
        layers = sum(len(chunk.decoder.layers) for chunk in self.model.chunks)
        per_layer = {
            collective: count["bytes"] / (layers * self.num_microbatches)
            for collective, count in counts.get("sequence", {}).items()
        }
        return {"per_step": counts, "per_layer": per_layer}

    def _train_step(self, batches: Iterator[Batch]) -> StepResult:
        predictions, batches = self._predictions(batches)
        scale = self.loss_scale * self.num_microbatches / predictions
        loss_function = TrainingLoss(scale, len(self.sources), self.z_loss_coeff)
        results = self._run(batches, self.num_microbatches, loss_function, loss_function.beside)
        nothing = loss_function.nothing(self.mesh.device)  # of a stage that sees no losses
        sums = self.mesh.sum_of_losses(sum(results, start=nothing))
        loss_sum, by_source, z_sum = loss_function.parts(sums)
        loss = loss_sum.double() / predictions
        usual_loss = self._usual_loss(loss)
        self.tied_embedding.sum_gradients()
        if usual_loss is None:
            self.deepspeed.step()
        else:
            step_without_update(self.deepspeed)
        return StepResult(
            loss,
            self.deepspeed.get_global_grad_norm(),
            was_skipped(self.deepspeed),
            None if z_sum is None else self.z_loss_coeff * z_sum / predictions,
            self.sources,
            by_source,
            usual_loss,
        )

    def _usual_loss(self, loss: torch.Tensor) -> float | None:
        """Return the usual loss where this one is a spike. The host waits for the loss."""
        if self.spikes is None:
            return None
        return self.spikes.usual_loss(self.mesh.of_main(loss).item())  # the same on all ranks

    def _predictions(self, batches: Iterator[Batch]) -> tuple[int | torch.Tensor, Iterator[Batch]]:
        """How many predictions the global batch has, at least 1, and its micro batches."""
        first = next(batches)
        batches = chain((first,), batches)
        if "predicted" not in first:  # every token is
            return self.tokens_per_step, batches
        mine = first["predicted"].to(self.mesh.device, non_blocking=True, copy=True)
        return self.mesh.sum_of_losses(mine).clamp(min=1), batches

    @property
    def updates(self) -> int:
        """Steps of the optimizer since the run began, without those that were skipped."""
        return self._updates_before + steps_made(self.deepspeed)

    def resume_at(self, updates: int) -> None:
        """Tell a new engine of how many steps its moments are the result."""
        self._updates_before = updates
        for state in stepping_optimizer(self.deepspeed).state.values():
            self.optimizer.set_step(state, updates)

    def token_losses(self, batches: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Compute losses of some micro batches without gradient; called by all ranks alike.

        Returns for each the token losses in nats, float32 (micro batch, this rank's slice of the
        sequence), and the mask of the labels that count; nothing on stages before the last.
        """
        return [(losses, mask) for losses, _, mask in self._held_out(batches)]

    def token_scores(
        self, batches: list[Batch]
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return the same, and which labels are the likeliest tokens: losses, likeliest, mask."""
        return self._held_out(batches, "likeliest")

    def next_tokens(self, batch: Batch, wanted: NextTokens) -> torch.Tensor | None:
        """Return the tokens that follow in a micro batch, int64 (micro batch,), -1 where another
        rank of the sequence has the position; None on stages before the last."""
        found = self._held_out([batch], wanted, next_tokens)
        return found[0] if found else None

    def _held_out(
        self,
        batches: list[Batch],
        beside: str | NextTokens | None = None,
        loss_function: Callable[..., Any] = held_out_losses,
    ) -> list[Any]:
        self.deepspeed.eval()
        filled = batches
        if len(self.modules) > 1:  # the interleaved schedule takes them in groups of all stages
            filled = batches + batches[-1:] * (-len(batches) % self.mesh.pipeline_parallel_size)
        with torch.no_grad():
            results = self._run(iter(filled), len(filled), loss_function, beside, forward_only=True)
        return results[: len(batches)]

    def _run(
        self, batches, num_microbatches, loss_function, beside, forward_only=False
    ) -> list[Any]:
        return run_schedule(
            partial(_forward_step, self.mesh.device, loss_function, beside),
            batches,
            self.modules,
            num_microbatches=num_microbatches,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )


def _forward_step(device, loss_function, beside, batches: Iterator[Batch], module: torch.nn.Module):
    """Megatron-core's forward step: the model's token losses, and how to make a loss of them."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    labels = batch["labels"]
    mask = labels != IGNORE_INDEX
    losses = module(
        input_ids=batch["tokens"],
        position_ids=batch["positions"],
        attention_mask=None,
        labels=labels.clamp(min=0),
        document_start=batch.get("document_start"),
        document_stop=batch.get("document_stop"),
        beside=beside,
    )
    return losses, partial(loss_function, mask=mask, source=batch.get("source"))


def weights_divider(config: Config, mesh: Mesh) -> Callable[[torch.nn.Parameter], None] | None:
    """Return what `build_model` does with each parameter: for ZeRO 3, divide it, so that no rank
    ever holds the whole of its stage; else nothing. Raises UserError."""
    if config.parallel.zero_stage != 3:
        return None
    settings = deepspeed_config(config, mesh.data_parallel_size)
    swapper = None  # of weights that a DeepSpeed file puts on NVMe: one set of buffers for all

    def divide(parameter: torch.nn.Parameter) -> None:
        nonlocal swapper
        with _refusals(config):
            swapper = _divide_weights(torch.nn.ParameterList([parameter]), settings, mesh, swapper)

    return divide


def _divide_weights(
    module: torch.nn.Module, settings: dict[str, Any], mesh: Mesh, swapper: Any = None
) -> Any:
    """Divide the weights of a module for ZeRO 3 over all ranks that hold the same ones. Returns
    DeepSpeed's swapper. Left to itself, DeepSpeed divides them over the data-parallel ranks alone,
    and then forgets the gradients of the other ranks of a sequence."""
    import deepspeed

    from megalong.parallel.mesh import DeepSpeedMPU

    return deepspeed.zero.Init(
        module=module,
        data_parallel_group=mesh.replica_group,
        config_dict_or_path=settings,
        mpu=DeepSpeedMPU(mesh),
        param_swapper=swapper,
    ).param_swapper


@contextlib.contextmanager
def _refusals(config: Config) -> Iterator[None]:
    """Makes a UserError of what DeepSpeed says to settings that came from the user."""
    try:
        yield
    except Exception as error:
        if config.training.deepspeed_config is None:
            raise
        raise UserError(
            f"DeepSpeed refuses --deepspeed-config {config.training.deepspeed_config}: {error}"
        ) from error
