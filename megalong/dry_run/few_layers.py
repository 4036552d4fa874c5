"""Of the layers of a stage that are alike, a few: what memory and recorder saw of one of them is
what happens in each of the others.

A layer that is not run is *replayed*: its output is a new tensor, in the backward pass it hands the
gradients of its weights to what waits for them, among that DeepSpeed's hooks, one after the other
as a layer that runs does, and what memory and recorder saw in between is written down again.

A layer begins where it is called, or where the gradient of its output is complete, and ends where
the next one begins: what the loop over the layers and autograd do between two of them is in it.
Who makes a tensor tells of its birth, and who consumes it of its end: a replayed layer of the birth
of its output and of the end of its input, whoever made that; in the backward pass of the end of its
output's gradient and of the birth of its input's. Where the model or a pipeline's schedule holds
a chunk's input or the gradient of its output for longer, its end is told as it comes. What the
accumulation of a weight's gradient does is told by itself, since it happens for every layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any
from unittest import mock

import torch

from megalong.config import Config
from megalong.dry_run.memory import Block, Change, DeviceMemory, whole_blocks
from megalong.dry_run.recorder import WorkRecorder
from megalong.dry_run.work import Work
from megalong.model.stage import PipelineStage
from megalong.utils.torch_private import is_going_backward


class LeavesSomething(Exception):
    """After its backward pass a layer leaves more behind than the gradients of its weights, which
    is not told of those that are replayed."""


@contextlib.contextmanager
def few_layers(
    config: Config, model: PipelineStage, memory: DeviceMemory, recorder: WorkRecorder
) -> Iterator[None]:
    """Inside, of the layers of each chunk that are alike, some are replayed, as long as that tells
    the same (`can_be_replayed`). For one training step of a model that was not run before.

    Raises LeavesSomething at the end, where what was told is not right for that reason."""
    chunks = []
    with contextlib.ExitStack() as stack:
        for chunk in model.chunks if can_be_replayed(config) else ():
            kinds = [_kind(config, layer, i) for i, layer in enumerate(chunk.decoder.layers)]
            always = config.data.isolates_documents  # of each batch they make tables
            chunks.append(_Layers(chunk.decoder, kinds, memory, recorder, always))
            stack.enter_context(chunks[-1].in_place())
        yield
    if any(chunk.leaving & chunk.replayed for chunk in chunks):
        raise LeavesSomething


def can_be_replayed(config: Config) -> bool:
    """Whether what a layer does is the same whatever layers are beside it. With ZeRO 3, and where
    activations wait on the host, one fetches for another; and several that are recomputed together
    (`--recompute-num-layers`) hold what one of them lets go."""
    parallel = config.parallel
    several = parallel.recompute_method == "uniform" and parallel.recompute_num_layers != 1
    return (
        parallel.zero_stage < 3
        and not config.memory.offload_activations
        and not (parallel.recompute_granularity == "full" and several)
    )


def _kind(config: Config, layer: torch.nn.Module, index: int) -> Hashable:
    """Equal for layers of a chunk that are alike. index: in the chunk."""
    attention = layer.self_attention.core_attention
    recomputed = config.parallel.recompute_granularity == "full" and (
        config.parallel.recompute_method == "uniform"
        or index < config.parallel.recompute_num_layers
    )
    shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
    return attention.pattern, recomputed, shapes


@dataclass(frozen=True)
class _Made:
    """A tensor that a layer made, and its life."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    held: int  # numbers behind it
    block: Block

    @property
    def bytes(self) -> int:
        """As the device holds it."""
        return whole_blocks(self.held * self.dtype.itemsize)

    @classmethod
    def of(cls, tensor: torch.Tensor, memory: DeviceMemory) -> _Made:
        held = tensor.untyped_storage().nbytes() // tensor.itemsize
        place = tensor.size(), tensor.stride(), tensor.storage_offset()
        return cls(*place, tensor.dtype, tensor.device, held, memory.block_of(tensor))

    def another(self, memory: DeviceMemory, *, ends: bool = True) -> torch.Tensor:
        """One like it, the birth of which is not told, and its end if it `ends`."""
        options = {"dtype": self.dtype, "device": self.device}
        with memory.silent(ends=ends):
            tensor = torch.empty_strided(self.size, self.stride, **options)
            if tensor.untyped_storage().nbytes() == self.held * tensor.itemsize:
                return tensor
            whole = torch.empty(self.held, **options)
            return whole.as_strided(self.size, self.stride, self.offset)


@dataclass
class _Forward:
    """What was seen of a layer's forward pass."""

    start: int
    input: Block
    is_leaf: bool  # the input, of autograd's graph
    work: Work = field(default_factory=Work)
    changes: list[Change] = field(default_factory=list)
    output: _Made | None = None
    held: bool | None = None  # the input, by others than the layer; None: nobody knows yet

    @property
    def seems_held(self) -> bool:
        """The same, while the backward pass is still to come: a leaf is a tensor of a pipeline's
        schedule, which holds it until that is over; and what has gone, and not within the layer,
        the model held."""
        gone = self.input.end is not None and not _ends(self.changes, self.input)
        return self.is_leaf or gone


@dataclass
class _Backward:
    """What was seen of a layer's backward pass: the gradients of its weights, by their names in the
    layer, and the changes before each and after the last of them."""

    start: int
    input: Block  # of the forward pass
    is_leaf: bool  # the input, of autograd's graph
    output_gradient: Block
    work: Work = field(default_factory=Work)
    pieces: list[list[Change]] = field(default_factory=list)
    weights: list[tuple[str, _Made]] = field(default_factory=list)
    input_gradient: _Made | None = None

    def ends(self, block: Block) -> bool:
        """Whether the end of this is among what was seen."""
        return _ends(chain(*self.pieces), block)


def _ends(changes: Iterable[Change], block: Block) -> bool:
    return any(change.block is block and change.size < 0 for change in changes)


class _Layers:
    """The layers of a chunk. The first two micro batches, or `always` all, run the first and the
    last of all and of each kind, for these may find something to make that the others then have:
    how they go is seen in the second. Of the others one of a kind is seen in each direction, in the
    first micro batch: the second, and going backward the last but one."""

    def __init__(
        self,
        decoder: torch.nn.Module,
        kinds: Sequence[Hashable],
        memory: DeviceMemory,
        recorder: WorkRecorder,
        always: bool,
    ):
        self.decoder, self.layers, self.kinds = decoder, list(decoder.layers), list(kinds)
        self.memory, self.recorder = memory, recorder
        places = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in kinds}
        ends = {0, len(kinds) - 1} | {p[end] for p in places.values() for end in (0, -1)}
        several = [p for p in places.values() if len(p) > 2]
        # Layer -> the micro batch in which it is seen, up to which it is run.
        second = math.inf if always else 1
        self.seen_forward = {p[1]: 0 for p in several} | dict.fromkeys(ends, second)
        self.seen_backward = {p[-2]: 0 for p in several} | dict.fromkeys(ends, second)
        for index in ends:  # like no other
            self.kinds[index] = index
        self.forward: dict[Hashable, _Forward] = {}
        self.backward: dict[Hashable, _Backward] = {}
        self.inputs: dict[int, tuple[Block, bool]] = {}  # of layers that are seen backward: is_leaf
        self.going_forward: tuple[int, _Forward] | None = None
        self.going_backward: tuple[int, _Backward] | None = None
        self.microbatch = self.microbatch_back = -1  # that is under way, in each direction
        self.leaving: set[Hashable] = set()  # kinds of layers that leave something
        self.replayed: set[Hashable] = set()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layers are called through here."""
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                call = partial(self._call, index, layer.forward)
                stack.enter_context(mock.patch.object(layer, "forward", call))
            norm = self.decoder.final_layernorm
            if norm is None:
                hook = self.decoder.register_forward_hook(lambda _, __, output: self._over(output))
            else:
                hook = norm.register_forward_pre_hook(lambda _, args: self._over(args[0]))
            stack.callback(hook.remove)
            for index in self.seen_backward:
                for name, parameter in self.layers[index].named_parameters():
                    hook = parameter.register_hook(partial(self._weight, index, name))
                    stack.callback(hook.remove)
            yield

    def _call(
        self, index: int, run: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any
    ) -> Any:
        """A layer's forward pass."""
        if is_going_backward():  # a layer that is recomputed
            if self._runs(index, self.microbatch_back):
                return run(hidden_states, **kwargs)
            return self._in_steps(index, hidden_states), None
        self._ends_forward(hidden_states)
        if index == 0:
            self.microbatch += 1
        if hidden_states.requires_grad:
            hidden_states.register_hook(partial(self._ends_backward, index, self.microbatch))
        if not self._runs(index, self.microbatch):
            return self._replayed(index, hidden_states), None
        block = self.memory.block_of(hidden_states)
        if self.seen_backward.get(index) == self.microbatch:
            self.inputs[index] = block, hidden_states.is_leaf
        if self.seen_forward.get(index) == self.microbatch:
            self.going_forward = index, _Forward(self.memory.moment, block, hidden_states.is_leaf)
            self.recorder.write_besides(self.going_forward[1].work)
        return run(hidden_states, **kwargs)

    def _over(self, hidden_states: torch.Tensor) -> None:
        """The forward pass of the last layer is over."""
        self._ends_forward(hidden_states)
        if hidden_states.grad_fn is None:
            return
        ends = partial(self._ends_backward, len(self.layers), self.microbatch)
        number = hidden_states.output_nr
        # After the hooks of the tensor: DeepSpeed has one that scales the gradient.
        hidden_states.grad_fn.register_prehook(lambda gradients: ends(gradients[number]))

    def _runs(self, index: int, microbatch: int) -> bool:
        seen = (self.seen_forward.get(index, -1), self.seen_backward.get(index, -1))
        return microbatch <= max(seen)

    # ------------------------------------------------------------------- seeing a layer

    def _ends_forward(self, output: torch.Tensor) -> None:
        """The next layer is given the output of the one that is seen, if one is."""
        if self.going_forward is None:
            return
        (index, seen), self.going_forward = self.going_forward, None
        self.recorder.write_besides(None)
        seen.changes = self.memory.since(seen.start)
        seen.output = _Made.of(output, self.memory)
        self.forward[self.kinds[index]] = seen

    def _ends_backward(self, index: int, microbatch: int, gradient: torch.Tensor) -> None:
        """Layer `index` has gone backward, with this gradient of its input; the one before it
        begins."""
        self.microbatch_back = microbatch
        if self.going_backward is not None:
            seen = self.going_backward[1]
            seen.input_gradient = _Made.of(gradient, self.memory)
            if not seen.is_leaf or self._all_weights_seen():
                self._is_over()
        if self.seen_backward.get(index - 1) == microbatch:
            block = self.memory.block_of(gradient)
            seen = _Backward(self.memory.moment, *self.inputs[index - 1], block)
            self.going_backward = index - 1, seen
            self.recorder.write_besides(seen.work)

    def _all_weights_seen(self) -> bool:
        """An input that is a leaf, as weights are, may have its gradient before some of them."""
        index, seen = self.going_backward
        return len(seen.weights) == sum(1 for _ in self.layers[index].parameters())

    def _is_over(self) -> None:
        """The backward pass that is seen."""
        (index, seen), self.going_backward = self.going_backward, None
        self.recorder.write_besides(None)
        seen.pieces.append(self.memory.since(seen.start))
        self.backward[self.kinds[index]] = seen
        if not self._as_expected(self.forward[self.kinds[index]], seen):
            self.leaving.add(self.kinds[index])

    @staticmethod
    def _as_expected(forward: _Forward, backward: _Backward) -> bool:
        """Output and input, and their gradients, are of the same size, and everything else has
        ended but the gradients of the weights, of whose ends others tell, and what others hold."""
        held = not (_ends(forward.changes, forward.input) or backward.ends(backward.input))
        left = sum(change.size for change in chain(forward.changes, *backward.pieces))
        left -= sum(made.bytes for _, made in backward.weights)
        left -= backward.input_gradient.bytes * held
        left -= backward.input_gradient.bytes * (not backward.ends(backward.output_gradient))
        forward.held = held if forward.held is None else forward.held
        return left == 0 and forward.held == held

    def _weight(self, index: int, name: str, gradient: torch.Tensor) -> None:
        """A gradient of a weight is there, and about to be accumulated."""
        if self.going_backward is None or self.going_backward[0] != index:
            return
        seen = self.going_backward[1]
        seen.pieces.append(self.memory.since(seen.start))
        seen.weights.append((name, _Made.of(gradient, self.memory)))
        seen.start = self.memory.moment
        if seen.input_gradient is not None and self._all_weights_seen():
            self._is_over()

    # ---------------------------------------------------------------- replaying a layer

    def _replayed(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of a layer that is not run, in the forward pass."""
        seen = self.forward[self.kinds[index]]
        self.replayed.add(self.kinds[index])
        seen.held = seen.seems_held if seen.held is None else seen.held
        taken = self.memory.block_of(x) if seen.held else self.memory.hand_over(x)
        y = seen.output.another(self.memory)
        blocks = {seen.input: taken, seen.output.block: self.memory.block_of(y)}
        self.memory.again(seen.changes, blocks)
        self.recorder.again(seen.work)
        if not torch.is_grad_enabled():  # it is recomputed, and then gets its steps
            return y
        like_x = _Made.of(x, self.memory)

        def backward(gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            with torch.enable_grad():
                x = like_x.another(self.memory, ends=False).requires_grad_()
                y = self._in_steps(index, x, taken)
            torch.autograd.backward(y, gradient)
            return x.grad, None

        return _Step.apply(x, None, lambda: y, backward)

    def _in_steps(self, index: int, x: torch.Tensor, taken: Block | None = None) -> torch.Tensor:
        """Something like a layer's output, whose gradient goes the layer's way back to x and to its
        weights. taken: the life of the layer's input; None: that of x."""
        seen = self.backward.get(self.kinds[index])
        if seen is None:  # it was not over when another began
            raise LeavesSomething
        taken = self.memory.block_of(x) if taken is None else taken
        steps = _Steps(seen, taken, _Made.of(x, self.memory), self.memory, self.recorder)
        return steps.output(x, dict(self.layers[index].named_parameters()))


class _Steps:
    """The backward pass of a layer that is replayed. Between two steps autograd gives a weight the
    gradient that the first of them has handed over."""

    def __init__(
        self,
        seen: _Backward,
        taken: Block,
        like_x: _Made,
        memory: DeviceMemory,
        recorder: WorkRecorder,
    ):
        """seen: the backward pass of a layer that is alike. taken: the life of this one's input."""
        self.seen, self.like_x = seen, like_x
        self.memory, self.recorder = memory, recorder
        self.blocks = {seen.input: taken}
        self.gradients: list[torch.Tensor | None] = []

    def output(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """What depends on x, and on the weights in the order in which they get their gradients."""
        last = len(self.seen.weights)
        token = _Step.apply(x, None, self._nothing, lambda _: (self._step(last), None))
        for number, (name, _) in reversed(list(enumerate(self.seen.weights))):
            step = partial(self._hand_over, number)
            token = _Step.apply(token, weights[name], self._nothing, step)
        like_x = partial(self.like_x.another, self.memory, ends=False)
        return _Step.apply(token, None, like_x, self._begin)

    def _begin(self, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ends = self.seen.ends(self.seen.output_gradient)
        taken = self.memory.hand_over(gradient) if ends else self.memory.block_of(gradient)
        self.blocks[self.seen.output_gradient] = taken
        for made in (*(made for _, made in self.seen.weights), self.seen.input_gradient):
            self.gradients.append(made.another(self.memory))
            self.blocks[made.block] = self.memory.block_of(self.gradients[-1])
        self.recorder.again(self.seen.work)
        return self._nothing(), None

    def _hand_over(self, number: int, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._nothing(), self._step(number)

    def _step(self, number: int) -> torch.Tensor:
        self.memory.again(self.seen.pieces[number], self.blocks)
        gradient, self.gradients[number] = self.gradients[number], None
        return gradient

    def _nothing(self) -> torch.Tensor:
        with self.memory.silent(ends=False):
            return torch.empty((), device=self.like_x.device)


class _Step(torch.autograd.Function):
    """Makes something of anything; backward is a function of its gradient, which returns those of
    the two inputs."""

    @staticmethod
    def forward(ctx, x, weight, make, backward):
        ctx.of_inputs = backward
        return make()

    @staticmethod
    def backward(ctx, gradient):
        return *ctx.of_inputs(gradient), None, None
