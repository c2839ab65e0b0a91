"""How the work of a capture is divided: partitions are ranges of corpus rows."""

import numpy as np


def plan_partitions(sequence_tokens: np.ndarray, partition_tokens: int) -> tuple[int, ...]:
    """Row boundaries of partitions that hold at most `partition_tokens` tokens, or one longer sequence.

    `sequence_tokens` is int [rows]. The same corpus and size give the same plan.
    """
    ends = np.cumsum(sequence_tokens)
    boundaries = [0]
    while boundaries[-1] < len(ends):
        start = boundaries[-1]
        used = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, used + partition_tokens, side="right"))
        boundaries.append(max(stop, start + 1))
    return tuple(boundaries)
