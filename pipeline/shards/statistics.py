"""What a commit record says of the targets of its shard."""

import time
from typing import Any

import numpy as np

from pipeline.targets import SparseTargets


class TargetStatistics:
    """Sums over the targets of a shard, for its commit record."""

    def __init__(self, temperatures: tuple[float, ...]) -> None:
        self._started = time.time()
        self._temperatures = temperatures
        self._sums = np.zeros((3, len(temperatures)))

    def add(self, targets: SparseTargets) -> None:
        """Count the targets of one sequence."""
        for index, temperature in enumerate(self._temperatures):
            values = (targets.entropy(temperature), targets.tail_mass(temperature), targets.label_logprobs(temperature))
            self._sums[:, index] += [value.sum(dtype=np.float64) for value in values]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: sums a temperature, seconds from the first sequence to the last."""
        names = ("sum_entropy", "sum_tail_mass", "sum_label_logprob")
        return dict(zip(names, self._sums.tolist())) | {"seconds": round(time.time() - self._started, 3)}
