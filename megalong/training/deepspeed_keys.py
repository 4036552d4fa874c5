"""Which keys of a DeepSpeed file DeepSpeed does not know.

DeepSpeed checks the names in those of its sections that are pydantic models; of the others, and at
the top, it takes what it knows and passes over the rest in silence. What it knows there is what it
looks for: it reads the settings here once, in a dictionary that takes notes.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from pydantic import ValidationError

from megalong.utils.errors import UserError, did_you_mean

# By `deepspeed.initialize`, before it makes its configuration.
_READ_ELSEWHERE = {"data_parallel_size", "sequence_parallel_size"}


def check_keys(settings: dict[str, Any], where: str) -> None:
    """Raise UserError where DeepSpeed does not know a key of `settings`, or refuses a value.

    settings: as `deepspeed.initialize` is given them. where: flag and file, for the message.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    noted = _Noting(settings)
    try:
        DeepSpeedConfig(noted)
    except ValidationError as error:
        raise UserError(_first_of(error, settings, where)) from error
    except Exception as error:
        line = " ".join(str(error).split())
        raise UserError(f"DeepSpeed refuses {where}: {line or type(error).__name__}") from error
    noted.taken_whole = False  # it is copied first, and then read
    for path, known in noted.passed_over():
        if path not in _READ_ELSEWHERE:
            raise UserError(_unknown(where, path, known))


class _Noting(dict):
    """A dictionary, with all that are in it, that knows which keys it was asked for."""

    def __init__(self, content: dict[str, Any]):
        super().__init__(
            {key: _Noting(v) if isinstance(v, dict) else v for key, v in content.items()}
        )
        self.asked: set[str] = set()
        self.taken_whole = False  # by somebody who may look at any of it later

    def passed_over(self, at: str = "") -> Iterator[tuple[str, set[str]]]:
        """The keys that nobody asked for, with the sections they are in, and what was asked for
        beside each; of a section that is switched off, for which nobody looked further, none."""
        if self.asked == {"enabled"} and dict.get(self, "enabled") is False:
            return
        for key, value in dict.items(self):
            if not self.taken_whole and self.asked and key not in self.asked:
                yield at + key, self.asked
            elif isinstance(value, _Noting):
                yield from value.passed_over(f"{at}{key}.")

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.taken_whole = True
        return super().__iter__()

    def keys(self) -> KeysView[str]:
        return KeysView(self)

    def values(self) -> ValuesView[Any]:
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:
        return ItemsView(self)

    def __copy__(self) -> _Noting:
        self.taken_whole = True
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noting:
        return self.__copy__()


def _first_of(error: ValidationError, settings: dict[str, Any], where: str) -> str:
    """What pydantic found first, in one line: a key that is not there, or its value."""
    found = error.errors()[0]
    place = tuple(str(part) for part in found["loc"])
    path = ".".join(_path_to(place, found["input"], settings) or place)
    if found["type"] == "extra_forbidden":
        return _unknown(where, path, _fields())
    return f"DeepSpeed refuses {where}: {path} is {found['input']!r}: {found['msg']}"


def _path_to(
    place: tuple[str, ...], value: Any, settings: dict[str, Any], at: tuple[str, ...] = ()
) -> tuple[str, ...] | None:
    """Where in the settings the value is, of which pydantic knows the place in a section."""
    for key, inner in settings.items():
        here = (*at, key)
        if here[-len(place) :] == place and inner == value:
            return here
        if isinstance(inner, dict) and (found := _path_to(place, value, inner, here)):
            return found
    return None


def _fields() -> set[str]:
    """The keys of all sections that are pydantic models."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models, names = [DeepSpeedConfigModel], set()
    for model in models:
        models += model.__subclasses__()
        for name, field in model.model_fields.items():
            names |= {name, field.alias or name}
    return names


def _unknown(where: str, path: str, known: set[str]) -> str:
    return f"{where}: DeepSpeed knows no {path}{did_you_mean(path.rpartition('.')[2], known)}"
