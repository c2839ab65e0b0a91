"""Rows of different lengths: flat in a shard, one after the other, and padded in memory.

Shape suffixes: N rows, K places of a row, E entries of all rows.
"""

import numpy as np


def require_counts(counts_N: np.ndarray, num_entries: int, width: int) -> None:
    """Raise ValueError unless the rows have 1 to `width` entries each, and `num_entries` in all."""
    if counts_N.min(initial=1) < 1 or counts_N.max(initial=1) > width:
        raise ValueError(f"rows of {counts_N.min()} to {counts_N.max()} entries; 1 to {width} are possible")
    if counts_N.sum(dtype=np.int64) != num_entries:
        raise ValueError(f"rows of {counts_N.sum(dtype=np.int64)} entries in all, of which {num_entries} are there")


def is_entry(counts_N: np.ndarray, width: int) -> np.ndarray:
    """bool [N, K]: which places of padded rows hold entries: the first of each row."""
    return np.arange(width, dtype=np.int32) < counts_N[:, None]


def padded(values_E: np.ndarray, is_entry_NK: np.ndarray, filling_N1: np.ndarray | float) -> np.ndarray:
    """[N, K]: the rows side by side, and the filling of each where it has no entry."""
    filled = np.empty(is_entry_NK.shape, values_E.dtype)
    filled[:] = filling_N1
    filled[is_entry_NK] = values_E
    return filled


def starts_of(counts_N: np.ndarray) -> np.ndarray:
    """int64 [N]: where each row begins among all entries."""
    ends = np.cumsum(counts_N, dtype=np.int64)
    return ends - counts_N
