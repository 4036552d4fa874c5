"""Attention on fake tensors with the memory that it takes on the way.

To fake tensors an operator is its results. What its launches hand to one another (the partial
results of dilated branches) is made by the code that launches, so that code runs, and launches
nothing.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec
from typing import Any
from unittest import mock

from megalong.attention.operators import IMPLEMENTATIONS
from megalong.torch_private import FakeTensor, TorchDispatchMode


def forget_tables() -> None:
    """Have attention make the tables on the device anew that it keeps for later calls, so that what
    a run holds and does is not less for the runs that came before it in this process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megalong.attention."):
            for function in list(vars(module).values()):
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


class NoKernels(TorchDispatchMode):
    """Runs what attention's operators are made of, without the kernels; modes that are entered
    before see its tensors. To be entered inside a FakeTensorMode.

    recorder: is told of each operator and of each launch (`megalong.planning.recorder`)."""

    def __init__(self, recorder: Any = None) -> None:
        super().__init__()
        self._recorder = recorder
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> NoKernels:
        if find_spec("triton") is not None:
            from megalong.attention.triton import launch

            self._patches.enter_context(mock.patch.object(launch, "launch", self._launch))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        ours = operator.namespace == "megalong" and name in IMPLEMENTATIONS
        if not ours or not isinstance(args[0], FakeTensor):
            return operator(*args, **(kwargs or {}))
        compute = IMPLEMENTATIONS[name]
        with _InParts():
            if self._recorder is None:
                return compute(*args, **(kwargs or {}))
            return self._recorder.attention(operator, args, kwargs or {}, compute)

    def _launch(self, kernel: Any, programs: int, device: Any, *arguments: Any, **_: Any) -> None:
        if programs and self._recorder is not None:
            self._recorder.launched(arguments)


class _InParts(TorchDispatchMode):
    """Takes composite operators (`.to` is one) apart, as autograd does above the modes: they know
    the parts."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, result = kwargs or {}, NotImplemented
        if operator.namespace == "aten":
            with self:
                result = operator.decompose(*args, **kwargs)
        return operator(*args, **kwargs) if result is NotImplemented else result
