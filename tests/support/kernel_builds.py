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
SCALARS = {"stride": "i64", "V": "i32", "K": "i32"} | dict.fromkeys(
    ("hard_weight", "soft_weight", "inverse_T", "softcap"), "fp32"
)
ALIGNED = ("stride", "V")
"""Multiples of 16 for the vocabularies of most models."""


def variants() -> Iterator[dict[str, Any]]:
    """The constants of every kernel that a training may launch."""
    full = {"SLOTS": TOP_K, "BLOCK": BLOCK, "HAS_TARGETS": True, "HAS_LEVEL": False, "HAS_SOFTCAP": False}
    full |= {"DIVERGENCE": "forward", "HAS_GRADIENT": True}
    yield from (full | {"DIVERGENCE": name} for name in DIVERGENCES)
    for name in ("HAS_LEVEL", "HAS_SOFTCAP"):
        yield full | {name: True}
    yield full | {"HAS_GRADIENT": False}
    yield full | {"HAS_TARGETS": False, "SLOTS": 1}


def build(architecture: int, constants: dict[str, Any]) -> dict[str, int]:
    """Registers, spilled bytes and vector loads of a variant."""
    names = {name: SCALARS.get(name) or POINTERS.get(name, "*fp32") for name in _rows.arg_names}
    signature = names | dict.fromkeys(constants, "constexpr")
    aligned = (name for name in names if name.endswith("_ptr") or name in ALIGNED)
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
    return found | {"vector_loads": ptx.count("ld.global.v4"), "vector_stores": ptx.count("st.global.v4")}


PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}


if __name__ == "__main__":
    for architecture in ARCHITECTURES:
        for constants in variants():
            print(json.dumps({"architecture": architecture} | constants | build(architecture, constants)))
