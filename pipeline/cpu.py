"""What one processor can do and another cannot: asked here, and taken for granted nowhere.

Knows nothing of torch, so that the command line can ask before anything is loaded.
"""

import contextlib
import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

FLAGS = Path("/proc/cpuinfo")
"""Where Linux lists what the CPU can do."""
PRODUCTS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""The flags of x86 and ARM any of which multiplies matrices of a type in hardware; float32 needs none."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Any of these in the environment says how a thread of OpenMP waits for the others."""
SPINS = "1000"
"""Rounds, microseconds, that a thread of torch's OpenMP (GNU's) spins before it sleeps; its own default is 300,000.

On a quiet machine as fast as that, where threads that sleep at once lose 50 microseconds at every product; on a busy
one 15 to 30 times faster.
"""


def has_products(dtype: str) -> bool:
    """Whether this CPU multiplies matrices of `dtype` in hardware; without, torch takes loops 30 to 200 times slower.

    Read from the CPU's flags and not from a clock, so that a machine always gives the same answer.
    """
    if dtype not in PRODUCTS:
        return True
    return FLAGS.is_file() and not PRODUCTS[dtype].isdisjoint(FLAGS.read_text().split())


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those it may run on, or a container's share of their time if that is less."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Cores' worth of time that this process's groups may use: of cgroups v2, whose limits nest, and of v1."""
    lines = own.read_text().splitlines() if own.is_file() else []
    paths = [PurePosixPath(line.split(":", 2)[2]) for line in lines if line.count(":") >= 2]
    folders = {cgroups / parent.relative_to("/") for path in paths for parent in (path, *path.parents)}
    for folder in {*folders, cgroups}:
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" is none
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError):
            group = cgroups / "cpu" / folder.relative_to(cgroups)
            quota_us = int((group / "cpu.cfs_quota_us").read_text())  # -1 is none
            if quota_us > 0:
                yield quota_us / int((group / "cpu.cfs_period_us").read_text())


def prepare_threads(environment: MutableMapping[str, str] = os.environ, cores: int | None = None) -> None:
    """What the threads of OpenMP are told where the user has told them nothing: their number, and how long to spin.

    OpenMP sees the cores, but not a container's share of their time. And a thread that spins while it waits for another
    takes the core from it as soon as anything else runs on the machine. Has to be called before torch is imported;
    processes that are started later inherit it.
    """
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS
    cores = available_cores() if cores is None else cores
    if cores < len(os.sched_getaffinity(0)):
        environment.setdefault("OMP_NUM_THREADS", str(cores))


def slow_products(dtype: str, instead: str) -> list[str]:
    """A line for a user whose computation in `dtype` crawls on this CPU, with what to do instead; else none."""
    if has_products(dtype):
        return []
    return [f"this CPU has no products of {dtype} matrices: they take loops 30 to 200 times slower; {instead}"]
