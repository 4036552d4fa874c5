"""Which part of the model an operator belongs to (`megalong.dry_run.work.PARTS`).

Forward, by the module that is running: hooks open and close its scope. Backward, by the module that
made the node of autograd's graph that is running: at the end of its scope a module marks the nodes
that came into being inside. What is one node with several parts in it (`megalong.model.chunked`)
has its functions for scopes, in both directions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from unittest import mock

import torch

from megalong.model.chunked.attention import TiledAttention
from megalong.model.chunked.mlp import TiledMLP
from megalong.model.stage import PipelineStage
from megalong.utils.torch_private import current_node, tree_leaves

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


def is_accumulating_weights() -> bool:
    """Whether the gradient of a parameter is being added to what there is of it, and what hangs on
    that done, such as DeepSpeed's hooks."""
    node = current_node()
    return node is not None and accumulates(node) and isinstance(node.variable, torch.nn.Parameter)


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
