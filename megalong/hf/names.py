"""From megalong's parameters to Transformers' tensors and back, by the one table of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megalong.config import ModelConfig
from megalong.model.parameters import Packing, parameters, sizes, used_rows
from megalong.model.tensor_slices import join_parts, split_parts
from megalong.utils.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One tensor of megalong: its name and shape, and those of Transformers that it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: dict[str, tuple[int, ...]]
    packing: Packing
    model: ModelConfig

    def to_huggingface(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raises UserError where the tensor does not have its shape."""
        check_shape(self.name, self.shape, whole.shape)
        heights = [shape[0] for shape in self.parts.values()]
        used = whole[: sum(heights)]  # without what fills up the vocabulary
        parts = split_parts(used, heights, self.packing, self.model)
        return dict(zip(self.parts, parts, strict=True))

    def to_megalong(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """parts: the tensors that `self.parts` names. Rows that fill up the vocabulary are zero.
        Raises UserError on a wrong shape."""
        for name, shape in self.parts.items():
            check_shape(name, shape, parts[name].shape)
        ordered = [parts[name] for name in self.parts]
        if self.packing is Packing.PADDED:
            missing = self.shape[0] - len(ordered[0])
            return torch.nn.functional.pad(ordered[0], (0, 0, 0, missing))
        return join_parts(ordered, self.packing, self.model)


def entries(model: ModelConfig, vocab_size: int, rows_there: int | None = None) -> list[Entry]:
    """Every tensor of a model, module by module.

    model: resolved. vocab_size: the tokenizer's. rows_there: of the vocabulary on Transformers'
    side; None: as many as an export has.
    """
    here = parameters(model, model.vocabulary_rows(vocab_size))
    there = sizes(model, used_rows(model, vocab_size) if rows_there is None else rows_there)
    found = []
    for parameter in here:
        row, layer = parameter.row, parameter.layer
        parts = {part.name.format(layer): part.size(there) for part in row.parts_of(model)}
        found.append(Entry(parameter.name, parameter.shape, parts, row.packing, model))
    return found


def check_shape(name: str, expected: Iterable[int], found: Iterable[int]) -> None:
    """Raise UserError unless a tensor has the shape that the configuration gives it."""
    if tuple(expected) != tuple(found):
        raise UserError(
            f"{name} has shape {tuple(found)}, and the configuration says {tuple(expected)}: the"
            " configuration is not that of these weights"
        )


def check_vocabulary(
    where: str, table: Iterable[Entry], ids: int, found: dict[str, tuple[int, ...]]
) -> None:
    """Raise UserError where the rows of the embedding are not those for a tokenizer of `ids` ids;
    `where`: the checkpoint, found: its shapes by name."""
    for entry in table:
        rows = found.get(entry.name, entry.shape)[0]
        if "model.embed_tokens.weight" in entry.parts and rows != entry.shape[0]:
            raise UserError(
                f"--tokenizer-model: a tokenizer of {ids:,} ids is not that of {where}, whose"
                f" vocabulary has {rows:,} rows: leave the flag out, or give the training's own"
            )


def check_names(where: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise UserError unless exactly the expected tensors are there; `where`: the file."""
    expected, found = set(expected), set(found)
    for problem, names in (("has no", expected - found), ("has an unknown", found - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{where} {problem} tensor {', '.join(sorted(names)[:3])}{more}: not a model that"
                " megalong has"
            )
