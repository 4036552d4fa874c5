"""Dry runs of one training step, feature after feature: device and host memory, executed FLOPs, and
the longest sequence that fits. To be run in a process that has been given a fake device.

A cell is one dry run: a shape, a rung, a number of layers and a length. All layers are alike, and a
tile of a sequence is like any other, so few layers and moderate lengths tell of all: bytes at the
peak are linear in the layers and, where a sequence has many tiles, in its tokens. What is told of a
length that was not run is run at that length afterwards, with the same few layers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import SHAPES, VOCABULARY

from megalong.config import Config
from megalong.config.arguments import config_from_values
from megalong.dry_run.work import MEMORY

GIB = 2**30
USABLE = 76 * GIB  # of a device of 80 GiB: the rest is for CUDA's context, NCCL and fragments
LAYERS = (2, 3)
# Weights, gradients and optimizer of 7B do not fit: ZeRO 3 over so many ranks, a sequence on each.
RANKS = {"7B": 8}

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
PIECES = ("linear_cross_entropy", "tiled_mlp", "tiled_attention", "offload_activations")
OFF, ON = {"memory_path": "off"}, {"memory_path": "on"}


def _with(count: int) -> dict[str, bool]:
    return dict.fromkeys(PIECES[:count], True)


# What is switched on. "on" is all four pieces; with full recomputation a layer leaves one tensor,
# its input, without it two, also the attention's output (and a float a head).
RUNGS: dict[str, dict[str, Any]] = {
    "plain": OFF,
    "full recomputation": {**OFF, **FULL},
    "+ linear cross entropy": {**OFF, **FULL, **_with(1)},
    "+ tiled MLP": {**OFF, **FULL, **_with(2)},
    "+ tiled attention: all on but offload": {**OFF, **FULL, **_with(3)},
    "+ offload: all on, one tensor a layer": {**ON, **FULL},
    "all on, two tensors a layer": ON,
    "all on but linear cross entropy": {**ON, **FULL, "linear_cross_entropy": False},
    "all on but tiled MLP": {**ON, **FULL, "tiled_mlp": False},
    "all on but tiled attention": {**ON, **FULL, "tiled_attention": False},
}
CONFIRMED = list(RUNGS)[:7]  # those whose longest sequence is run


@dataclass(frozen=True)
class Cell:
    """One dry run."""

    shape: str
    rung: str
    layers: int
    length: int

    @property
    def file(self) -> str:
        """The name of its file: letters, digits and dashes."""
        words = "".join(x if x.isalnum() else " " for x in self.rung).split()
        return f"{self.shape}-{'-'.join(words)}-{self.layers}-{self.length}.json"


@dataclass(frozen=True)
class Plan:
    """What is run: models by name (fields of the configuration), and three lengths.

    usable: bytes of the device that the longest sequence may take. step: tokens of which it is a
    multiple.
    """

    shapes: dict[str, dict[str, Any]]
    lengths: tuple[int, ...]
    usable: int = USABLE
    step: int = 4096
    vocabulary: int = VOCABULARY

    def cells(self, shape: str, rung: str) -> list[Cell]:
        """Those that a row of the table is made of."""
        few = [Cell(shape, rung, LAYERS[0], length) for length in self.lengths]
        more = [Cell(shape, rung, LAYERS[1], length) for length in self.lengths[:2]]
        return few + more


# At shorter ones the peak of a small model is elsewhere in the step, and the lines are other ones.
PLAN = Plan(SHAPES, (131_072, 262_144, 524_288))
TINY = Plan(  # to see that it works
    {
        "tiny": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "loss_chunk_size": 512,
            "tile_size": 512,
        }
    },
    (1024, 2048, 4096),
    usable=16 * 2**20,
    step=512,
    vocabulary=500,
)


class Cells:
    """Results of a plan's cells, each run once: kept in a folder, and found there again.

    done: called after each dry run.
    """

    def __init__(self, folder: Path, plan: Plan, done: Callable[[], object] = lambda: None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan, self.done = folder, plan, done

    def __getitem__(self, cell: Cell) -> dict[str, Any]:
        path = self.folder / cell.file
        if not path.exists():
            path.write_text(json.dumps(self._run(cell)) + "\n")
            self.done()
        return json.loads(path.read_text())

    def _run(self, cell: Cell) -> dict[str, Any]:
        from megalong.dry_run.step import dry_run  # imports torch

        ranks = RANKS.get(cell.shape, 1)
        config = configuration(
            self.plan.shapes[cell.shape]
            | RUNGS[cell.rung]
            | {"num_layers": cell.layers, "seq_length": cell.length, "global_batch_size": ranks}
            | ({"zero_stage": 3} if ranks > 1 else {}),
            ranks,
        )
        start = time.process_time()
        result = dry_run(config, self.plan.vocabulary, ranks=ranks, quick=True)
        flops: dict[str, dict[str, int]] = {}
        for (part, direction), count in result.flops.items():
            flops.setdefault(part, {})[direction] = count
        return {
            **vars(cell),
            "device": {kind: result.memory[kind] for kind in MEMORY},
            "host": result.host,
            "flops": flops,
            "cpu_seconds": round(time.process_time() - start, 1),
        }


def configuration(values: dict[str, Any], ranks: int = 1) -> Config:
    """A resolved configuration of one micro batch of one sequence."""
    common = {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "precision": "bf16",
        "make_vocab_size_divisible_by": 1,
        "data_path": "unread",
        "tokenizer_type": "ByteTokenizer",
    }
    return config_from_values(common | values).resolve(ranks)


def extended(low: dict, high: dict, field: str, value: int) -> dict[str, Any]:
    """Bytes of a cell, linear in one of its fields, from two cells that differ in it."""
    share = (value - low[field]) / (high[field] - low[field])
    return {
        **low,
        field: value,
        "device": {
            k: low["device"][k] + share * (high["device"][k] - low["device"][k]) for k in MEMORY
        },
        "host": low["host"] + share * (high["host"] - low["host"]),
    }


def whole(cells: Cells, shape: str, rung: str, length: int) -> dict[str, Any]:
    """Bytes of a cell with all layers of its shape."""
    layers, (first, second, _) = cells.plan.shapes[shape]["num_layers"], cells.plan.lengths

    def of_all_layers(at: int) -> dict[str, Any]:
        pair = (cells[Cell(shape, rung, few, at)] for few in LAYERS)
        return extended(*pair, "layers", layers)

    if length in (first, second):
        return of_all_layers(length)
    # What the further layers take is linear in the tokens.
    few = [cells[Cell(shape, rung, LAYERS[0], at)] for at in (first, second)]
    line, line_of_few = (
        extended(*pair, "length", length)
        for pair in ([of_all_layers(first), of_all_layers(second)], few)
    )
    found = cells[Cell(shape, rung, LAYERS[0], length)]
    return {
        **line,
        "device": {
            k: found["device"][k] + line["device"][k] - line_of_few["device"][k] for k in MEMORY
        },
        "host": found["host"] + line["host"] - line_of_few["host"],
    }


def row(cells: Cells, shape: str, rung: str) -> dict[str, Any]:
    """A rung with all its layers: bytes a token at each length, FLOPs, the longest sequence."""
    lengths = cells.plan.lengths
    at = {length: whole(cells, shape, rung, length) for length in lengths}
    *_, before, last = at.values()
    slope = {
        kind: (last["device"][kind] - before["device"][kind]) / (lengths[-1] - lengths[-2])
        for kind in MEMORY
    }
    host = (last["host"] - before["host"]) / (lengths[-1] - lengths[-2])
    layers = cells.plan.shapes[shape]["num_layers"] / LAYERS[0]
    flops = cells[Cell(shape, rung, LAYERS[0], lengths[-1])]["flops"]
    return {
        "shape": shape,
        "rung": rung,
        "ranks": RANKS.get(shape, 1),
        "usable": cells.plan.usable,
        "at": {
            length: {"device": total(cell), **cell["device"], "host": cell["host"]}
            for length, cell in at.items()
        },
        "bytes_per_token": {"device": sum(slope.values()), **slope, "host": host},
        "flops_per_token": {
            part: {
                way: count / lengths[-1] * (1 if part == "logits" else layers)
                for way, count in ways.items()
            }
            for part, ways in flops.items()
        },
        "longest": longest(cells, shape, rung, before, last),
    }


def total(cell: dict[str, Any]) -> float:
    return sum(cell["device"].values())


def longest(cells: Cells, shape: str, rung: str, before: dict, last: dict) -> dict[str, Any]:
    """The longest sequence of all layers that fits, from the line through two lengths; and, of the
    rungs in `CONFIRMED`, one dry run, of few layers, at that length, beside what the line says of
    it. A shorter one, where it turns out not to fit."""
    plan = cells.plan
    slope = (total(last) - total(before)) / (last["length"] - before["length"])
    few = [cells[Cell(shape, rung, LAYERS[0], length)] for length in plan.lengths[-2:]]
    tokens = int(last["length"] + (plan.usable - total(last)) / slope) // plan.step * plan.step
    while tokens > 0:
        at_length = extended(before, last, "length", tokens)
        sequence = {"tokens": tokens, "device": total(at_length), "host": at_length["host"]}
        if rung not in CONFIRMED:
            return sequence
        expected = total(extended(*few, "length", tokens))
        found = total(cells[Cell(shape, rung, LAYERS[0], tokens)])
        sequence["device"] += found - expected
        if sequence["device"] <= plan.usable:
            return {**sequence, "error": found / expected - 1}
        excess = sequence["device"] - plan.usable
        tokens -= math.ceil(excess / slope / plan.step) * plan.step
    return {"tokens": 0}
