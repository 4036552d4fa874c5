"""Writes down what a step does on the device: see `megalong.dry_run.work`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megalong.dry_run.work import TO_DEVICE, TO_HOST, Collective, Operation, Work
from megalong.model.chunked.attention import TiledAttention
from megalong.model.chunked.mlp import TiledMLP
from megalong.model.stage import PipelineStage
from megalong.parallel.traffic import Call, call_of
from megalong.utils.machine import use_gpu
from megalong.utils.torch_private import (
    FakeTensor,
    TorchDispatchMode,
    current_node,
    is_going_backward,
    tree_leaves,
    written_arguments,
)

if TYPE_CHECKING:
    from megalong.dry_run.memory import DeviceMemory

MARK = "megalong part"

# Functions that are a part of a node: class -> its methods by part. The projections are with the
# norm and the rotation of the tile that they are made of; attention itself is an operator.
FUNCTIONS = {
    TiledMLP: {"mlp": ("forward_tile", "backward_tile")},
    TiledAttention: {
        "projections": ("attend", "output_tile", "output_backward_tile", "backward"),
    },
}

# Modules of a layer, and of a chunk of the model.
OF_LAYER = {
    "self_attention": "attention",
    "self_attention.linear_qkv": "projections",
    "self_attention.linear_proj": "projections",
    "mlp": "mlp",
}
OF_CHUNK = {"embedding": "embedding", "rotary_pos_emb": "attention", "output_layer": "logits"}


class Parts:
    """Knows the part that is running.

    now(): its name; "other" outside of all.
    """

    def __init__(self) -> None:
        self._open: list[str] = []

    def now(self) -> str:
        if self._open:
            return self._open[-1]
        node = current_node()
        if node is None:
            return "other"
        if accumulates(node):
            return "optimizer"
        return node.metadata.get(MARK, "other")

    @contextlib.contextmanager
    def watch(self, model: PipelineStage) -> Iterator[None]:
        """Inside, the modules of this stage say when they run."""
        with contextlib.ExitStack() as stack:
            for owner, parts in FUNCTIONS.items():
                for part, names in parts.items():
                    for name in names:
                        function = self._scoped(getattr(owner, name), part)
                        stack.enter_context(mock.patch.object(owner, name, function))
            modules = dict(pair for chunk in model.chunks for pair in _modules(chunk))
            for module, part in modules.items():  # chunks share one for the angles of positions
                for handle in self._hook(module, part):
                    stack.callback(handle.remove)
            for chunk in model.chunks:
                loss = self._marking(chunk.compute_language_model_loss, "logits")
                stack.enter_context(mock.patch.object(chunk, "compute_language_model_loss", loss))
            yield

    def _hook(self, module: torch.nn.Module, part: str) -> list[Any]:
        inside: list[dict[int, Any]] = []

        def before(_, args: Any, kwargs: Any) -> None:
            inside.append(_nodes((args, kwargs)))
            self._open.append(part)

        def after(_, args: Any, output: Any) -> None:
            self._open.pop()
            _mark(output, part, inside.pop())

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def _scoped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()

        return scoped

    def _marking(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        scoped = self._scoped(function, part)

        @wraps(function)
        def marking(*args: Any, **kwargs: Any) -> Any:
            output = scoped(*args, **kwargs)
            _mark(output, part, _nodes((args, kwargs)))
            return output

        return marking


def accumulates(node: Any) -> bool:
    """Whether a node of autograd's graph is the end of a path: a parameter's gradient."""
    return node.name().endswith("AccumulateGrad")


def _modules(chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    for name, part in OF_CHUNK.items():
        module = getattr(chunk, name, None)
        if isinstance(module, torch.nn.Module):
            yield module, part
    for layer in chunk.decoder.layers:
        for name, part in OF_LAYER.items():
            yield layer.get_submodule(name), part


def _nodes(values: Any) -> dict[int, Any]:
    """The nodes that these come from, by id: an id stays theirs as long as they are held."""
    tensors = (x for x in tree_leaves(values) if isinstance(x, torch.Tensor))
    return {id(x.grad_fn): x.grad_fn for x in tensors if x.grad_fn is not None}


def _mark(outputs: Any, part: str, stop: dict[int, Any]) -> None:
    """Give the nodes between inputs and outputs a part, unless they have one already."""
    seen, coming = dict(stop), list(_nodes(outputs).values())
    while coming:
        node = coming.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if accumulates(node):
            continue
        node.metadata.setdefault(MARK, part)
        coming += [following for following, _ in node.next_functions if following is not None]


# Operators that make a tensor and write nothing, or that are views which do not say so.
NO_WORK = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "set_", "resize_", "is_pinned", "_pin_memory", "_local_scalar_dense", "lift_fresh",
}  # fmt: skip
# Those that read of their first tensor what they return, and no more.
SELECTING = {"embedding", "index", "index_select", "gather"}
# Those that write into a tensor without reading it first.
WRITING = {"copy_", "zero_", "fill_", "ones_", "normal_", "uniform_"}
# Those that write so much of a tensor as they are given values for.
SCATTERING = {"index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_"}


class WorkRecorder(TorchDispatchMode):
    """A context that records a step, entered before `InsideAttention`, which tells it of attention.

    work: of the operators and collectives so far. updating: whether the backward passes are over.
    """

    def __init__(
        self,
        parts: Parts,
        groups_by_axis: dict[str, list[dist.ProcessGroup]],
        memory: DeviceMemory | None = None,
    ):
        """groups_by_axis: `Mesh.groups_by_axis`. memory: is told of the collectives' buffers."""
        super().__init__()
        self.work = Work()
        self.updating = False
        self._parts, self._memory = parts, memory
        self._device = "cuda" if use_gpu() else "cpu"
        self._axis_of_group = {
            group.group_name: axis for axis, groups in groups_by_axis.items() for group in groups
        }
        self._formulas = FlopCounterMode(display=False).flop_registry
        self._times = 1
        self._attention: list[int] | None = None  # bytes and launches of the call that is running

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if operator.namespace == "c10d":
            call = call_of(operator, args)
            if call is not None:
                self._collective(call)
        elif operator.namespace != "prim" and not operator.is_view:
            self._operation(operator, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def repeating(self, times: int) -> Iterator[None]:
        """Inside, everything is done so many times."""
        self._times *= times
        try:
            yield
        finally:
            self._times //= times

    def attention(self, operator: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        """An operator of `megalong.attention.operators`, computed by a function that may launch
        kernels (`launched`) and call others."""
        before, self._attention = self._attention, [0, 0]
        try:
            result = compute(*args, **kwargs)
            nbytes, kernels = self._attention
        finally:
            self._attention = before
        flops = self._formulas[operator.overloadpacket](*args, **kwargs, out_val=result)
        self._add(operator, "attention", flops, nbytes, kernels, _factors(args))
        return result

    def launched(self, tensors: Any) -> None:
        """A kernel of attention starts, which reads or writes each of these."""
        seen = {id(x): x for x in tensors if isinstance(x, torch.Tensor)}
        if self._attention is not None:
            self._attention[0] += sum(map(_size, seen.values()))
            self._attention[1] += 1

    # ------------------------------------------------------------------------ one call

    def _operation(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = operator.overloadpacket.__name__
        if name in NO_WORK:
            return
        results = _tensors(result)
        inputs = _tensors((args, kwargs))
        if not any(x.device.type == self._device for x in (*results, *inputs)):
            if any(isinstance(x, FakeTensor) for x in (*results, *inputs)):  # of a training's state
                nbytes = _bytes(operator, name, args, kwargs, inputs, results)
                self._add(operator, "host", 0, nbytes, 0, results or inputs)
            return
        if name in ("copy_", "_to_copy") and inputs:
            source = inputs[-1]
            devices = source.device.type, (results or inputs)[0].device.type
            if devices[0] != devices[1]:
                target = TO_DEVICE if devices[1] == "cuda" else TO_HOST
                self._add(None, "memory", 0, _size(source), 0, results or inputs, name=target)
                return
        nbytes = _bytes(operator, name, args, kwargs, inputs, results)
        formula = self._formulas.get(operator.overloadpacket)
        attends = formula is not None or "attention" in name  # the CPU's kernels have no formula
        if self._attention is not None and attends:  # its formula is that of the whole call
            self._attention[0] += nbytes
            self._attention[1] += 1
        elif formula is None:
            self._add(operator, "memory", 0, nbytes, 1, results or inputs)
        else:
            flops = formula(*args, **kwargs, out_val=result)
            kind = "attention" if "attention" in name else "product"
            self._add(operator, kind, flops, nbytes, 1, _factors(args))

    def _add(
        self, operator: Any, kind: str, flops: int, nbytes: int, kernels: int, typed: Any,
        name: str | None = None,
    ) -> None:  # fmt: skip
        name = name or f"{operator.namespace}.{operator.overloadpacket.__name__}"
        [first, *_] = _tensors(typed)
        dtype = str(first.dtype).removeprefix("torch.")
        part = "optimizer" if self.updating else self._parts.now()
        if kind == "attention" or self._attention is not None:
            part = "attention"
        direction = self._direction()
        key = Operation(part, direction, kind, name, dtype, flops, nbytes, kernels)
        self.work.operations[key] += self._times

    def _direction(self) -> str:
        if self.updating:
            return "update"
        return "backward" if is_going_backward() else "forward"

    def _collective(self, call: Call) -> None:
        axis = self._axis_of_group.get(call.group.group_name, "other")
        if self._memory is not None:
            self._memory.carry(call.tensors, axis)
        if call.group.size() == 1:
            return
        ranks, direction = dist.get_process_group_ranks(call.group), self._direction()
        if call.peer is not None:
            me = dist.get_rank()
            peer = ranks[call.peer]
            # Activations go to the next stage, gradients to the one before; the ring of an
            # interleaved schedule is closed by a pair of which the last stage is the earlier one.
            following = ranks[(ranks.index(me) + 1) % len(ranks)] == peer
            if len(ranks) == 2:
                following = peer > me
            forward = following == (call.name == "send")
            direction = "forward" if forward else "backward"
            ranks = sorted((me, peer))
        key = Collective(axis, direction, call.name, call.bytes, tuple(sorted(ranks)))
        self.work.collectives[key] += self._times


def _factors(args: Any) -> torch.Tensor:
    """What is multiplied: of a product that adds to a sum, or returns one, in float32, too."""
    numbers = (x for x in _tensors(args) if x.is_floating_point())
    return min(numbers, key=lambda x: x.dtype.itemsize)


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor: less than its elements have, where it is expanded."""
    return min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes())


def _bytes(operator: Any, name: str, args: Any, kwargs: Any, inputs: Any, results: Any) -> int:
    """What is read, each tensor once, and what is written."""
    sizes = {id(x): _size(x) for x in inputs}
    if name in SELECTING and inputs:
        sizes[id(inputs[0])] = sum(map(_size, results))
    mutated = written_arguments(operator, args, kwargs)
    if not mutated:
        return sum(sizes.values()) + sum(map(_size, results))
    written: dict[int, int] = {}
    for value, is_result in mutated:
        for tensor in _tensors(value):
            written[id(tensor)] = _size(tensor)
            if name in WRITING or is_result:
                sizes.pop(id(tensor), None)
            elif name in SCATTERING:
                size = min(_size(inputs[-1]), _size(tensor))
                sizes[id(tensor)] = written[id(tensor)] = size
    return sum(sizes.values()) + sum(written.values())
