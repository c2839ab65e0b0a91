"""The Triton kernels compiled for GPUs that are not here: what ptxas says of every variant, as JSON lines.

python -m tests.support.kernel_builds rows|reduction
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stages.cache_logits import reduction_kernel
from stages.cache_logits.draws import MOST_CANDIDATES
from stages.train_student import row_kernel
from stages.train_student.divergences import DIVERGENCES

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
"""A100, H100 and B200."""
TOP_K, VOCAB_SIZE = 64, 102_400
TYPES = {"labels_ptr": "*i64", "ids_ptr": "*i64", "is_entry_ptr": "*i1", "chosen_ptr": "*i32"}
TYPES |= dict.fromkeys(("stride", "gradient_stride", "tail_stride"), "i64")
TYPES |= dict.fromkeys(("V", "width", "K", "L", "first_id"), "i32")
TYPES |= dict.fromkeys(("hard_weight", "soft_weight", "inverse_T", "softcap"), "fp32")
ALIGNED = ("stride", "gradient_stride", "tail_stride", "width")
"""Multiples of 16 by the padding of the rows; V is one for most models, and for 50,257 or 32,001 it is not."""
PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}


@dataclass(frozen=True)
class Variant:
    """A kernel with the constants and the types with which a run may launch it."""

    function: Any
    constants: dict[str, Any]
    num_warps: int = 8
    logits: str = "fp32"
    gradient: str = "bf16"
    is_V_aligned: bool = False


def rows() -> Iterator[Variant]:
    """The kernel of the fused loss: all at any vocabulary, with a gradient in bfloat16; one with each of the others."""
    full = {"SLOTS": TOP_K, "BLOCK": row_kernel.BLOCK, "HAS_TARGETS": True, "HAS_LEVEL": False, "HAS_SOFTCAP": False}
    full |= {"HAS_TAIL": False}
    full |= {"DIVERGENCE": "forward", "HAS_GRADIENT": True}
    changes = [{"DIVERGENCE": name} for name in DIVERGENCES] + [{"HAS_LEVEL": True}, {"HAS_SOFTCAP": True}]
    changes += [{"HAS_TAIL": True}]
    changes += [{"HAS_GRADIENT": False}, {"HAS_TARGETS": False, "SLOTS": 1}]
    yield from (Variant(row_kernel._rows, full | change) for change in changes)
    yield Variant(row_kernel._rows, full, is_V_aligned=True)
    yield Variant(row_kernel._rows, full, gradient="fp32")


def reduction() -> Iterator[Variant]:
    """Those of the capture: the first at any vocabulary, the second, which reads a twentieth, at most models'."""
    for logits, slots in itertools.product(("fp32", "bf16"), (1, TOP_K, MOST_CANDIDATES)):
        lane = reduction_kernel.lane_width(slots)
        both = {"LOG2_E": reduction_kernel._LOG2_E, "LANE": lane}
        for temperatures in ((2.0, 1.0), (3.0, 1.0)) if slots > 1 else ():
            lanes = both | {"TEMPERATURES": temperatures, "BLOCK": reduction_kernel.BLOCK}
            yield Variant(reduction_kernel._lanes, lanes, reduction_kernel.LANE_WARPS, logits)
        for drawn in (-1, 0):
            select = both | {"TEMPERATURES": (2.0, 1.0), "PLACES": (0, 1), "DRAWN": drawn, "SLOTS": slots}
            select |= {"WIDTH": 2 * slots + 5, "ALL_LANES": triton.next_power_of_2(VOCAB_SIZE // lane)}
            num_warps = reduction_kernel.select_warps(slots, lane)
            yield Variant(reduction_kernel._select, select, num_warps, logits, is_V_aligned=True)


def build(architecture: int, variant: Variant) -> dict[str, int]:
    """Registers, spilled bytes, vector loads and stores, and barriers of a variant."""
    function = variant.function
    types = TYPES | {"logits_ptr": f"*{variant.logits}", "gradient_ptr": f"*{variant.gradient}"}
    names = {name: types.get(name, "*fp32") for name in function.arg_names}
    signature = names | dict.fromkeys(variant.constants, "constexpr")
    multiples = (*ALIGNED, "V") if variant.is_V_aligned else ALIGNED
    aligned = (name for name in names if name.endswith("_ptr") or name in multiples)
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=variant.constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": variant.num_warps}).asm["ptx"]
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


if __name__ == "__main__":
    for architecture in ARCHITECTURES:
        for variant in {"rows": rows, "reduction": reduction}[sys.argv[1]]():
            described = vars(variant) | {"architecture": architecture, "kernel": variant.function.__name__}
            del described["function"], described["constants"]
            print(json.dumps(described | variant.constants | build(architecture, variant)), flush=True)
