"""Compile kernels for a GPU that is not there, and count what ptxas made of them.

    python tests/attention/triton/kernel_resources.py 90 bfloat16 forward:64 banded-dq:128 \\
        documents-dkdv:128 rare:64 ...

prints one line of JSON for each variant of each kernel and head_dim, as tile_sizes.py has them:
registers, bytes of stack (spills), shared memory, the tensor-core instructions found, and the
instructions of the main loop (`main_loop`). It needs no GPU, only the ptxas and cuobjdump inside
the triton package. Not under TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megalong.attention.triton.backward_kernels import (
        delta_kernel,
        dkdv_kernel,
        dq_kernel,
    )
    from megalong.attention.triton.forward_kernel import forward_kernel
    from megalong.attention.triton.tile_sizes import (
        SHARED_MEMORY,
        TileSizes,
        newest_that_fits,
        padded_head_dim,
        sizes_of,
        splits,
    )

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHARED_OF = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 120: 99 * 1024}  # others: 227 KiB
VARIANTS = {
    "forward": [
        ("sparse", forward_kernel, {"MERGE": False}),
        ("base", forward_kernel, {"MERGE": True}),
    ],
    "dq": [("sparse", dq_kernel, {"MERGE": False}), ("base", dq_kernel, {"MERGE": True})],
    "dkdv": [("sparse", dkdv_kernel, {"MERGE": False}), ("base", dkdv_kernel, {"MERGE": True})],
}
# What training seldom or never runs, but must compile. "ones": Triton turns an integer argument
# that is 1 (a stride, and whatever VARYING leaves out) into a constant, which has other methods.
ROWS = {"GATHERED": True, "CAUSAL": False}
VARIANTS["rare"] = [
    ("delta", delta_kernel, {}),
    ("forward-no-base", forward_kernel, {"MERGE": True, "ATTENDS": False}),
    ("dq-no-base", dq_kernel, {"MERGE": True, "ATTENDS": False}),
    ("dkdv-no-base", dkdv_kernel, {"MERGE": True, "ATTENDS": False}),
    ("forward-gathered", forward_kernel, {"MERGE": True, **ROWS}),
    ("dq-gathered", dq_kernel, {"MERGE": True, **ROWS}),
    ("dkdv-gathered", dkdv_kernel, {"MERGE": True, **ROWS}),
]
# Rows that see a range of key rows: windows, and the columns of sparse attention.
for name in ("forward", "dq", "dkdv"):
    _, kernel, _ = VARIANTS[name][0]
    VARIANTS[f"banded-{name}"] = [("banded", kernel, {"MERGE": True, "BANDED": True, **ROWS})]
# Documents kept apart, where attention is causal: "ends" are those of each row's range that the
# kernel reads. Ranges with both ends are seldom.
BOTH = {"ends": ("start_ptr", "stop_ptr")}
for name, end in (("forward", "start_ptr"), ("dq", "start_ptr"), ("dkdv", "stop_ptr")):
    VARIANTS[f"documents-{name}"] = [
        (kind, kernel, {**constants, "ends": (end,)}) for kind, kernel, constants in VARIANTS[name]
    ]
    _, kernel, _ = VARIANTS[name][0]
    bidirectional = {"MERGE": False, "CAUSAL": False, **BOTH}
    VARIANTS["rare"].append((f"{name}-bidirectional-documents", kernel, bidirectional))
    banded = {"MERGE": True, "BANDED": True, **ROWS, **BOTH}
    VARIANTS["rare"].append((f"{name}-banded-ranges", kernel, banded))
for kind, kernel, constants in [
    item for name in ("forward", "dq", "dkdv") for item in VARIANTS[name]
]:
    for causal in (True, False):
        for gathered in (True, False):
            name = f"{kernel.__name__}-{kind}-ones-{causal}-{gathered}"
            options = {"CAUSAL": causal, "GATHERED": gathered, "ONES": True}
            VARIANTS["rare"].append((name, kernel, {**constants, **options}))
ACCUMULATED = {"lse_ptr", "partial_lse_ptr", "delta_ptr", "partial_dk_ptr", "partial_dv_ptr"}
TABLES = {"branch_ptr": "i64"} | dict.fromkeys(
    ("tile_ptr", "offset_ptr", "class_ptr", "band_ptr", "start_ptr", "stop_ptr"), "i32"
)


def compile_kernel(kernel, generation: int, dtype: str, constants: dict, warps: int, stages: int):
    """The compiled kernel, with arguments typed and aligned as real launches have them."""
    signature, attributes = {}, {}
    for number, name in enumerate(kernel.arg_names):
        aligned = name.endswith(("_ptr", "_batch", "_row", "_head"))
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            share = name == "partial_ptr" and kernel is not forward_kernel
            wide = name in ACCUMULATED or share
            signature[name] = "*" + TABLES.get(name, "fp32" if wide else SHORT[dtype])
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if aligned and name not in constants:
            attributes[number,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)


def resources(compiled) -> dict:
    """Registers, spilled bytes, shared memory and tensor-core instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option):
            command = [str(TOOLS / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage")).groups()
        assembly = dump("-sass")
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "hgmma": len(re.findall(r"\bHGMMA\.", assembly)),
        "hmma": len(re.findall(r"\bHMMA\.", assembly)),
        "local": len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        **main_loop(assembly),
    }


def main_loop(assembly: str) -> dict:
    """The instructions of the loop that most tiles run through.

    A loop is what lies between a branch backwards and its target, without another such branch
    inside; of those with tensor-core instructions the main one is the shortest for each of them:
    tiles at an edge also compute a mask. Of its instructions, "tensor" multiply matrices, "masking"
    compare or select, "memory" read or write any kind of memory, "spills" the stack.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", assembly)
    code = [(int(address, 16), text) for address, text in lines]
    ends = [
        (int(found[1], 16), address)
        for address, text in code
        if (found := re.match(r"BRA\b.*?0x([0-9a-f]+)", text)) and int(found[1], 16) < address
    ]
    loops = []
    for start, stop in ends:
        inside = any(start <= a and b < stop for a, b in ends if (a, b) != (start, stop))
        body = [text for address, text in code if start <= address <= stop]
        tensor = sum(text.startswith(("HMMA", "HGMMA")) for text in body)
        if tensor and not inside:
            kinds = {
                "loop": len(body),
                "loop_tensor": tensor,
                "loop_masking": count(body, "ISETP", "FSEL", "SEL", "UISETP", "USEL", "PLOP3"),
                "loop_memory": count(body, "LD", "ST", "UTMALDG"),
                "loop_spills": count(body, "LDL", "STL"),
            }
            loops.append((len(body) / tensor, kinds))
    return {**min(loops, key=lambda loop: loop[0])[1], "loops": len(loops)} if loops else {}


def count(body: list[str], *names: str) -> int:
    return sum(text.startswith(names) for text in body)


def resources_of(name: str, head_dim: int, dtype: str, generation: int, chosen: TileSizes):
    """One dictionary for each variant of a kernel, or of "rare", in given tile sizes."""
    defaults = {
        "CAUSAL": True, "ATTENDS": True, "GATHERED": False, "BANDED": False,
        "SPLIT": splits(head_dim, getattr(torch, dtype), generation),
        "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "ACC": triton.language.float32,
        "PRECISION": "tf32x3" if dtype == "float32" else "ieee",
    }  # fmt: skip
    for variant, kernel, variant_constants in VARIANTS[name]:
        constants = {**defaults, **variant_constants}
        ends = constants.pop("ends", ())
        absent = [end for end in ("start_ptr", "stop_ptr") if end not in ends]
        absent += [] if ends else ["range_heads"]
        if constants.pop("ONES", False):
            integers = [a for a in kernel.arg_names if not a.endswith("_ptr") and a.islower()]
            constants |= dict.fromkeys(integers, 1)
            del constants["scale"]
        constants |= dict.fromkeys(absent)
        constants = {key: x for key, x in constants.items() if key in kernel.arg_names}
        compiled = compile_kernel(kernel, generation, dtype, constants, chosen.warps, chosen.stages)
        line = {"kernel": name, "head_dim": head_dim, "variant": variant, "tile": chosen}
        yield {**line, **resources(compiled)}


def main(generation: str, dtype: str, *wanted: str) -> None:
    """A generation that the table does not know (100, 120) takes the lines that would run on it."""
    number = int(generation)
    lines = newest_that_fits(divmod(number, 10), SHARED_OF.get(number, SHARED_MEMORY[90]))
    for item in wanted:
        name, head_dim = item.split(":")[0], int(item.split(":")[1])
        size = "forward" if name == "rare" else name.split("-")[-1]
        chosen = sizes_of(size, head_dim, getattr(torch, dtype), lines)
        for line in resources_of(name, head_dim, dtype, number, chosen):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
