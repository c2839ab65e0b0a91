"""GPUs by their makers' data sheets: dense rates, without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """Memory, and the peak rates of matrix products in TFLOP a second."""

    memory_gb: float
    float32: float
    half: float
    """bfloat16 or float16, summed in float32."""
    fp8: float
    """That of half precision where there is none."""


DEVICES = {
    "a100": Device(memory_gb=80, float32=19.5, half=312, fp8=312),
    "h100": Device(memory_gb=80, float32=67, half=989, fp8=1979),
    "h200": Device(memory_gb=141, float32=67, half=989, fp8=1979),
    "b200": Device(memory_gb=180, float32=80, half=2250, fp8=4500),
    "l40s": Device(memory_gb=48, float32=91.6, half=362, fp8=733),
    "mi300x": Device(memory_gb=192, float32=163, half=1307, fp8=2615),
}
