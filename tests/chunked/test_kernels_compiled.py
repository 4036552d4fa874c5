"""The kernels compiled for sm_80 and sm_90, without a GPU: no spills, 16 bytes at a time."""

import importlib.util
import re
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megalong.model.chunked.triton import kernels
from megalong.model.chunked.triton.kernels import BLOCK, WARPS

ROTATE = kernels.rotate_kernel
ACTIVATE, BACKWARD = kernels.activate_kernel, kernels.activate_backward_kernel
READ, DIFFERENTIATE = kernels.read_kernel, kernels.differentiate_kernel
READING = {"BLOCK_V": kernels.READ_BLOCK, "ACC": tl.float32}
DIFFERENTIATING = {"BLOCK_V": BLOCK, "ACC": tl.float32}
WIDE = ("angles_ptr", "logits_ptr", "lse_ptr", "target_ptr", "grad_loss_ptr")


def rotation(pairs, inverse=False):
    block_p = triton.next_power_of_2(pairs)
    constants = {"INVERSE": inverse, "HEADS": kernels.HEADS, "PAIRS": pairs, "ACC": tl.float32}
    return {**constants, "BLOCK_P": block_p, "BLOCK_R": BLOCK // block_p}


def activation(function, gated, features=2048):
    block_f, block_r = kernels.blocks(features)
    constants = {"FUNCTION": function, "GATED": gated, "ACC": tl.float32}
    return {**constants, "BLOCK_F": block_f, "BLOCK_R": block_r}


def compiled(kernel, constants, generation, dtype, *, integers="i32", aligned=True):
    """integers: the type of strides; "ones" makes every integer 1, as Triton does with those that
    are, among them a batch of one. aligned: pointers and strides are multiples of 16."""
    signature, attributes, constants = {}, {}, dict(constants)
    for number, name in enumerate(kernel.arg_names):
        pointer, stride = name.endswith("_ptr"), "_" in name
        if integers == "ones" and not pointer and name.islower():
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif pointer:
            wide = name in WIDE and dtype != "fp64"
            signature[name] = "*i64" if name == "labels_ptr" else "*fp32" if wide else f"*{dtype}"
        else:
            signature[name] = integers if stride else "i32"
        if aligned and name not in constants and (stride or name in ("features", "columns")):
            attributes[number,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    warps = kernels.READ_WARPS if kernel is READ else WARPS
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)


@pytest.fixture(scope="module")
def resources():
    place = Path(__file__).parents[1] / "attention" / "triton" / "kernel_resources.py"
    spec = importlib.util.spec_from_file_location("kernel_resources", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.resources


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


CASES = {
    "rotation-32": (ROTATE, rotation(32), 90, "bf16"),
    "rotation-40-inverse": (ROTATE, rotation(40, True), 80, "fp16"),
    "swiglu": (ACTIVATE, activation("silu", True), 90, "bf16"),
    "swiglu-backward": (BACKWARD, activation("silu", True), 90, "bf16"),
    "swiglu-backward-float32": (BACKWARD, activation("silu", True), 80, "fp32"),
    "gelu": (ACTIVATE, activation("gelu", False), 80, "bf16"),
    "gelu-backward": (BACKWARD, activation("gelu", False), 90, "bf16"),
    "logits": (READ, READING, 90, "fp32"),
    "logits-backward": (DIFFERENTIATE, DIFFERENTIATING, 90, "bf16"),
    "logits-backward-float32": (DIFFERENTIATE, DIFFERENTIATING, 90, "fp32"),
}


# Label, its logit twice, logsumexp; label, logsumexp, the loss's gradient: numbers of a whole row.
SINGLE = {READ: 4, DIFFERENTIATE: 3}


@pytest.mark.parametrize("name", CASES)
def test_resources(name, resources):
    kernel = compiled(*CASES[name])
    found = resources(kernel)
    assert found["stack"] == found["local"] == 0, found
    assert found["shared"] == (4 * kernels.READ_WARPS if CASES[name][0] is READ else 0)
    assert found["registers"] <= 64, found
    # Not a byte of what is large is read or written in smaller pieces.
    pieces = re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"])
    assert sum(".v4.b32" not in piece for piece in pieces) == SINGLE.get(CASES[name][0], 0)


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [(ROTATE, rotation(3)), (ACTIVATE, activation("silu", True, 7)),
     (BACKWARD, activation("gelu", False, 1)), (READ, READING), (DIFFERENTIATE, DIFFERENTIATING)],
)  # fmt: skip
@pytest.mark.parametrize(
    "options", [{"integers": "ones"}, {"integers": "i64"}, {"aligned": False}], ids=str
)
def test_rare_variants_compile(kernel, constants, options, resources):
    found = resources(compiled(kernel, constants, 80, "bf16", **options))
    assert found["stack"] == found["local"] == 0, found


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [(ROTATE, rotation(32)), (ACTIVATE, activation("silu", True)),
     (BACKWARD, activation("gelu", True)), (READ, READING), (DIFFERENTIATE, DIFFERENTIATING)],
)  # fmt: skip
def test_float64_compiles(kernel, constants):
    compiled(kernel, {**constants, "ACC": tl.float64}, 90, "fp64")
