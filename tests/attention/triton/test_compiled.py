"""Every row of the table compiled for sm_80 and sm_90, without a GPU.

What ptxas reports is the limit: a change that makes a kernel spill, grow out of the shared memory
or lose its tensor-core instructions fails here. Bounds are the larger of the
values measured with triton 3.6 and 3.9.
"""

import json
from pathlib import Path

import pytest
import torch

from megalong.attention.triton import tile_sizes
from megalong.attention.triton.tile_sizes import (
    FILE_VARIABLE,
    SHARED_MEMORY,
    TileSizes,
    newest_that_fits,
    sizes_of,
)
from tests.launching import run_here

ITEMS = {d: [f"{kernel}:{d}" for kernel in ("forward", "dq", "dkdv")] for d in (16, 64, 128, 256)}
# Bytes of stack allowed, (sparse, base). Whatever is not here must not spill at all.
STACK = {
    (90, "bfloat16", "forward", 256): (0, 56),
    (90, "bfloat16", "dkdv", 128): (48, 0),
    (90, "bfloat16", "dkdv", 256): (112, 176),
    (80, "float32", "dq", 128): (8, 0),
    (80, "float32", "dkdv", 128): (72, 64),
    (90, "float32", "dq", 128): (56, 32),
    (90, "float32", "dkdv", 128): (80, 72),
}
# Instructions of the main loop, bfloat16.
LOOP = {
    (80, "forward", 64): 680, (80, "dq", 64): 370, (80, "dkdv", 64): 255,
    (80, "forward", 128): 505, (80, "dq", 128): 330, (80, "dkdv", 128): 430,
    (90, "forward", 64): 520, (90, "dq", 64): 300, (90, "dkdv", 64): 260,
    (90, "forward", 128): 410, (90, "dq", 128): 355, (90, "dkdv", 128): 350,
}  # fmt: skip


# Bytes of stack that kernels of rows in a band may have, outside of the main loop.
BANDED_STACK = {(80, "forward", 64): 16, (90, "dkdv", 128): 16}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(generation, dtype, items):
    """The lines that kernel_resources.py prints."""
    done = run_here(Path(__file__).with_name("kernel_resources.py"), generation, dtype, *items)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("generation", "dtype", "items"),
    [
        (80, "bfloat16", ITEMS[16]),
        (80, "bfloat16", ITEMS[64]),
        (90, "bfloat16", ITEMS[64] + ITEMS[128]),
        (90, "float16", ["forward:80"]),  # padded head_dim
        (90, "float32", ITEMS[64]),
        pytest.param(80, "bfloat16", ITEMS[128], marks=pytest.mark.long),
        pytest.param(80, "bfloat16", ITEMS[256], marks=pytest.mark.long),
        pytest.param(90, "bfloat16", ITEMS[256], marks=pytest.mark.long),
        pytest.param(80, "float32", ITEMS[64] + ITEMS[128], marks=pytest.mark.long),
        pytest.param(90, "float32", ITEMS[128], marks=pytest.mark.long),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_resources(generation, dtype, items):
    lines = compiled(generation, dtype, items)
    assert len(lines) == 2 * len(items)
    for line in lines:
        allowed = STACK.get((generation, dtype, line["kernel"], line["head_dim"]), (0, 0))
        assert line["stack"] <= allowed[line["variant"] == "base"], line
        assert line["shared"] <= SHARED_MEMORY[generation], line
        if dtype == "bfloat16" and line["head_dim"] in (64, 128):
            assert line["loops"] == 2 and line["loop_masking"] <= 12, line  # edges have their own
            assert line["loop_spills"] == 0, line  # those allowed above are outside of it
            assert line["loop"] <= LOOP[generation, line["kernel"], line["head_dim"]], line
        if generation == 90 and dtype != "float32":
            assert line["hgmma"] > 0, line
        else:
            assert line["hmma"] + line["hgmma"] > 0, line


@pytest.mark.parametrize("generation", [pytest.param(80, marks=pytest.mark.long), 90])
def test_rows_in_a_band_take_hardly_more_than_others(generation):
    """Their main loop is that of the other kernels; what a band adds is at its edges."""
    items = [f"banded-{item}" for item in ITEMS[64] + ITEMS[128]]
    for line in compiled(generation, "bfloat16", items):
        key = generation, line["kernel"].removeprefix("banded-"), line["head_dim"]
        assert line["stack"] <= BANDED_STACK.get(key, 0), line
        assert line["shared"] <= SHARED_MEMORY[generation], line
        assert line["loops"] == 2 and line["loop_masking"] <= 12, line
        assert line["loop_spills"] == 0 and line["loop"] <= 1.02 * LOOP[key], line
        assert line["hgmma" if generation == 90 else "hmma"] > 0, line


def test_documents_take_hardly_more():
    """What keeps them apart is at the edges; there is no load and no mask in the main loop."""
    items = ["documents-forward:128", "documents-dkdv:128"]
    for line in compiled(90, "bfloat16", items):
        kernel = line["kernel"].removeprefix("documents-")
        assert line["stack"] <= (80 if kernel == "dkdv" else 0), line
        assert line["shared"] <= SHARED_MEMORY[90], line
        assert line["loops"] == 2 and line["loop_masking"] <= 12, line
        assert line["loop_spills"] == 0 and line["loop"] <= 1.02 * LOOP[90, kernel, 128], line
        assert line["hgmma"] > 0, line


@pytest.mark.long
def test_rare_variants_compile():
    """The interpreter runs much that does not compile."""
    assert len(compiled(80, "bfloat16", ["rare:16"])) >= 30


NEWER = [(100, 227 * 1024, 90), (120, 99 * 1024, 80)]


def test_newer_gpus_take_lines_that_fit():
    """sm_100 has the shared memory of sm_90, sm_120 that of sm_89: neither has lines of its own."""
    assert newest_that_fits((8, 6), 99 * 1024) == 80
    assert newest_that_fits((9, 0), 227 * 1024) == 90
    for generation, shared, lines in NEWER:
        assert newest_that_fits(divmod(generation, 10), shared) == lines


@pytest.mark.long
def test_lines_compile_for_newer_gpus():
    for generation, shared, lines in NEWER:
        for line in compiled(generation, "bfloat16", ["forward:128"]):
            assert line["tile"] == list(sizes_of("forward", 128, torch.bfloat16, lines))
            assert line["shared"] <= shared, line


def test_lines_from_a_file(tmp_path, monkeypatch):
    """Its lines win, others stay, and a broken one is refused by name."""
    file = tmp_path / "tuned.json"
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    file.write_text('{"sm_90 half 128": [[64, 64, 4, 2], [64, 32, 4, 2], [32, 64, 4, 2]]}')
    found = sizes_of("dkdv", 100, torch.bfloat16, 90)
    assert found == TileSizes(32, 64, 4, 2)
    assert sizes_of("dkdv", 64, torch.bfloat16, 90) == TileSizes(32, 128, 8, 3)
    tile_sizes.table_with.cache_clear()
    file.write_text('{"sm_90 half 128": [[64, 64, 4]]}')
    with pytest.raises(ValueError, match=r"sm_90 half 128.* is no line of the table"):
        sizes_of("forward", 128, torch.bfloat16, 90)
