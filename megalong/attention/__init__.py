"""Dilated attention: tensors in, tensors out. Imports nothing else of megalong.

The names below are imported when they are first asked for: patterns are integers, and who wants
nothing else (the configuration, `--help`) does not wait for torch.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalong.attention.dense import dense_attention
    from megalong.attention.dilated import dilated_attention
    from megalong.attention.pattern import DilatedPattern
    from megalong.attention.reference import dilated_attention_reference

# The backends: their names, and the modules with the four functions that `operators` describes.
BACKENDS = MappingProxyType(
    {
        "triton": "megalong.attention.triton",
        "sdpa": "megalong.attention.sdpa",
        "reference": "megalong.attention.reference",
    }
)
AUTO = ("triton", "sdpa")  # what "auto" tries, in this order

__all__ = ["DilatedPattern", "dense_attention", "dilated_attention", "dilated_attention_reference"]

_MODULES = MappingProxyType(
    {
        "DilatedPattern": "pattern",
        "dense_attention": "dense",
        "dilated_attention": "dilated",
        "dilated_attention_reference": "reference",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
