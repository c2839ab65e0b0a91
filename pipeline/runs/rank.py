"""Which of several workers this process is: what it begins with, never what it may do."""

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """Worker `worker` of `workers`: it begins with that share of the partitions."""

    worker: int
    workers: int

    def share(self, num_partitions: int) -> range:
        """The slice that is this worker's own: neighbours in the corpus."""
        start, stop = (share * num_partitions // self.workers for share in (self.worker, self.worker + 1))
        return range(start, stop)

    def order(self, num_partitions: int) -> Iterator[int]:
        """All partitions: the own slice, and then the rest in an order of this worker's."""
        own = self.share(num_partitions)
        yield from own
        rest = [*range(own.start), *range(own.stop, num_partitions)]
        random.Random(self.worker).shuffle(rest)  # thieves that begin at one end would meet at every step
        yield from rest


def _array_size(environment: Mapping[str, str]) -> str | None:
    """Of the whole array: a later submission of some of its tasks must not shift the slices."""
    last = environment.get("SLURM_ARRAY_TASK_MAX")
    return str(int(last) + 1) if last is not None and last.isdigit() else None


_SOURCES = (
    ("PIPELINE_WORKER", None),
    ("SLURM_ARRAY_TASK_ID", _array_size),
    ("JOB_COMPLETION_INDEX", None),
    ("SLURM_PROCID", lambda environment: environment.get("SLURM_NTASKS")),
)
"""The variable with the worker's number, and where the launcher says how many there are."""


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank that a launcher has set: by hand, by a Slurm array, a Kubernetes Indexed Job, or srun.

    PIPELINE_WORKERS, where it is set, says how many workers there are.
    """
    for name, size in _SOURCES:
        if name not in environment:
            continue
        count = environment.get("PIPELINE_WORKERS") or (size(environment) if size else None)
        if count is None:
            raise ConfigError(f"{name} is set and PIPELINE_WORKERS is not; set it to the number of workers.")
        return make_rank(_number(name, environment[name]), _number("the number of workers", count))
    names = ", ".join(name for name, _ in _SOURCES)
    raise ConfigError(f"--worker-from-env: none of {names} is set; start the command by a launcher or give --worker.")


def make_rank(worker: int, workers: int) -> Rank:
    """The rank, checked."""
    if not 0 <= worker < workers:
        raise ConfigError(f"worker is {worker} of {workers} workers; it must lie from 0 to {workers - 1}.")
    return Rank(worker, workers)


def _number(name: str, value: str) -> int:
    if not value.isdigit():
        raise ConfigError(f"{name} is {value!r}; expected a whole number.")
    return int(value)
