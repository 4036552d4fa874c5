"""Triton's interpreter without what it repeats at every call, and without what it drops.

It patches `triton.language` once per call of a device function, which triples the time of small
kernels; and for every sum and product of integers it computes in 64 bits whether they overflow,
which it then tells nobody, as it does not run with `debug`: a third of the time.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Inside, `triton.language` is patched once per module, and nothing is computed for nobody."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patched = set()

    def call(function, *args, **kwargs):
        module = id(function.fn.__globals__)
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    assert not interpreter.InterpreterOptions().debug
    with (
        mock.patch.object(interpreter.InterpretedFunction, "__call__", call),
        mock.patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None),
    ):
        yield
