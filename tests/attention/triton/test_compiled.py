"""Every configuration of the table compiled for sm_80 and sm_90, without a GPU.

What ptxas reports is the limit: a change that makes a kernel spill, grow out of the shared memory
or lose its tensor-core instructions fails here. Bounds are the larger of the
values measured with triton 3.6 and 3.9.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ITEMS = [f"{kernel}:{d}" for d in (64, 128, 256) for kernel in ("forward", "dq", "dkdv")]
# Bytes of shared memory of a block: what sm_86 and sm_89 have too, and what sm_90 has.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
# Bytes of stack allowed, (sparse, base). Whatever is not here must not spill at all.
STACK = {
    (80, "bfloat16", "dkdv", 64): (96, 56),
    (90, "bfloat16", "forward", 256): (0, 56),
    (90, "bfloat16", "dkdv", 128): (24, 72),
    (90, "bfloat16", "dkdv", 256): (104, 176),
    (80, "float32", "dq", 128): (8, 0),
    (80, "float32", "dkdv", 128): (72, 64),
    (90, "float32", "dq", 128): (72, 16),
    (90, "float32", "dkdv", 128): (88, 72),
}


def compiled(generation, dtype, items, folder):
    """The lines of compile_kernels.py, in a process where nothing is interpreted or cached."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(generation), dtype, *items]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("generation", "dtype", "items"),
    [
        (80, "bfloat16", ITEMS),
        (90, "bfloat16", ITEMS),
        (80, "float32", ITEMS[:6]),
        (90, "float32", ITEMS[:6]),
        (90, "float16", ["forward:80"]),  # padded head_dim
        (80, "bfloat16", ["forward:16", "dq:16", "dkdv:16"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_resources(generation, dtype, items, tmp_path):
    lines = compiled(generation, dtype, items, tmp_path)
    assert len(lines) == 2 * len(items)
    for line in lines:
        allowed = STACK.get((generation, dtype, line["kernel"], line["head_dim"]), (0, 0))
        assert line["stack"] <= allowed[line["variant"] == "base"], line
        assert line["shared"] <= SHARED[generation], line
        if generation == 90 and dtype != "float32":
            assert line["hgmma"] > 0, line
        else:
            assert line["hmma"] + line["hgmma"] > 0, line


def test_rare_variants_compile(tmp_path):
    """The interpreter runs much that does not compile."""
    assert len(compiled(80, "bfloat16", ["rare:16"], tmp_path)) >= 30
