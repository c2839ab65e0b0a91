"""The Triton row kernel compiled for GPUs that are not here: what ptxas says of every variant, as JSON lines.

python -m tests.support.kernel_builds
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stages.train_student.divergences import DIVERGENCES
from stages.train_student.row_kernel import BLOCK, _rows

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
"""A100, H100 and B200."""
TOP_K = 64
POINTERS = {"labels_ptr": "*i64", "ids_ptr": "*i64", "is_entry_ptr": "*i1"}
SCALARS = {"stride": "i64", "gradient_stride": "i64", "V": "i32", "width": "i32", "K": "i32"} | dict.fromkeys(
    ("hard_weight", "soft_weight", "inverse_T", "softcap"), "fp32"
)
ALIGNED = ("stride", "gradient_stride", "width")
"""Multiples of 16 by the padding of the rows; V is one for most models, and for 50,257 or 32,001 it is not."""


def variants() -> Iterator[dict[str, Any]]:
    """The constants of every kernel that a training may launch."""
    full = {"SLOTS": TOP_K, "BLOCK": BLOCK, "HAS_TARGETS": True, "HAS_LEVEL": False, "HAS_SOFTCAP": False}
    full |= {"DIVERGENCE": "forward", "HAS_GRADIENT": True}
    yield from (full | {"DIVERGENCE": name} for name in DIVERGENCES)
    for name in ("HAS_LEVEL", "HAS_SOFTCAP"):
        yield full | {name: True}
    yield full | {"HAS_GRADIENT": False}
    yield full | {"HAS_TARGETS": False, "SLOTS": 1}


def builds() -> Iterator[dict[str, Any]]:
    """Every variant at any vocabulary with a gradient in bfloat16; one with each of the others."""
    yield from ({"gradient": "bf16", "is_V_aligned": False} | constants for constants in variants())
    first = next(variants())
    yield {"gradient": "bf16", "is_V_aligned": True} | first
    yield {"gradient": "fp32", "is_V_aligned": False} | first


def build(architecture: int, gradient: str, is_V_aligned: bool, **constants: Any) -> dict[str, int]:
    """Registers, spilled bytes, vector loads and stores, and barriers of a variant."""
    pointers = POINTERS | {"gradient_ptr": f"*{gradient}"}
    names = {name: SCALARS.get(name) or pointers.get(name, "*fp32") for name in _rows.arg_names}
    signature = names | dict.fromkeys(constants, "constexpr")
    multiples = (*ALIGNED, "V") if is_V_aligned else ALIGNED
    aligned = (name for name in names if name.endswith("_ptr") or name in multiples)
    attributes = {(_rows.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=_rows, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = next(path for name in ("ptxas-blackwell", "ptxas") if (path := folder / name).exists())
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"--gpu-name={ARCHITECTURES[architecture]}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {name: int(re.search(pattern, told)[1]) for name, pattern in PATTERNS.items()}
    counted = {
        "vector_loads": "ld.global.v4",
        "vector_stores": "st.global.v4",
        "barriers": "bar.sync",
        "rounded": "cvt.rn.bf16",
    }
    return found | {name: ptx.count(instruction) for name, instruction in counted.items()}


PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}


if __name__ == "__main__":
    for architecture in ARCHITECTURES:
        for variant in builds():
            print(json.dumps({"architecture": architecture} | variant | build(architecture, **variant)))
