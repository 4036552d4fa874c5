"""What attention's operators do inside: their launches, and the memory that they take on the way.

To other modes such an operator is one call, and to fake tensors its results alone. What its
launches hand to one another (the partial results of dilated branches) is made by the code that
launches, so that code runs in sight of them: on fake tensors it launches nothing.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

from megalong.attention.operators import IMPLEMENTATIONS
from megalong.utils.torch_private import FakeTensor, TorchDispatchMode


def forget_tables() -> None:
    """Have attention make the tables on the device anew that it keeps for later calls, so that what
    a run holds and does is not less for the runs that came before it in this process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megalong.attention."):
            for function in list(vars(module).values()):
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


class InsideAttention(TorchDispatchMode):
    """Runs what attention's operators are made of, so that modes that are entered before see it.

    recorder: is told of each operator and of each launch (`megalong.dry_run.recorder`)."""

    def __init__(self, recorder: Any = None) -> None:
        super().__init__()
        self._recorder = recorder
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> InsideAttention:
        if find_spec("triton") is not None:
            from megalong.attention.triton import launch

            start = partial(self._launch, launch.launch)
            self._patches.enter_context(mock.patch.object(launch, "launch", start))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        ours = operator.namespace == "megalong" and name in IMPLEMENTATIONS
        if not ours or not self._opens(args[0]):
            return operator(*args, **(kwargs or {}))
        compute = IMPLEMENTATIONS[name]
        with _InParts():
            if self._recorder is None:
                return compute(*args, **(kwargs or {}))
            return self._recorder.attention(operator, args, kwargs or {}, compute)

    def _opens(self, tensor: torch.Tensor) -> bool:
        return True

    def _launch(self, start: Any, kernel: Any, programs: int, device: Any, *args: Any, **names):
        if programs and self._recorder is not None:
            self._recorder.launched(args)
        self._start(start, kernel, programs, device, *args, **names)

    def _start(self, start: Any, *launch: Any, **names: Any) -> None:
        start(*launch, **names)


class NoKernels(InsideAttention):
    """The same of fake tensors, without the kernels. To be entered inside a FakeTensorMode."""

    def _opens(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor)

    def _start(self, *_: Any, **__: Any) -> None:
        """There is nothing to compute with."""


class _InParts(TorchDispatchMode):
    """Takes composite operators (`.to` is one) apart, as autograd does above the modes: they know
    the parts."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, result = kwargs or {}, NotImplemented
        if operator.namespace == "aten":
            with self:
                result = operator.decompose(*args, **kwargs)
        return operator(*args, **kwargs) if result is NotImplemented else result
