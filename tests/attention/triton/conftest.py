"""Fixtures of the files that run in Triton's interpreter."""

import pytest


@pytest.fixture(scope="session")
def quick_device_functions():
    """Patch `triton.language` once per module, not once per call of a device function.

    The interpreter repeats that at every call, which triples the time of small kernels.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(function, *args, **kwargs):
        module = id(function.fn.__globals__)
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
