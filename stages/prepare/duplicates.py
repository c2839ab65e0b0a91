"""Which keys are there twice, over all units, exactly and in bounded memory.

Every unit has its keys sorted on disk. A range of keys, a bucket, is a stretch of each of them: one task reads those
stretches, sorts them together, and writes down all but the first of equal keys. First is first in the input, whatever
the order of work. Memory is that of MERGE_KEYS keys, whatever their number: a bucket with more is done in parts.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.errors import CorpusError
from pipeline.stores.store import Store
from stages.prepare.staging import ENTRY_BYTES, FinishedTask, StagedFile, read_keys, write_staged

BUCKET_BYTES = 1 << 30
"""Input for each bucket: some hundred thousand documents, or a few million short ones."""
MOST_BUCKETS = 256
MERGE_KEYS = 1 << 22
"""Keys that are sorted at once: about 50 bytes each."""
KEY_SPACE = 1 << 64
"""Of the half of a key that decides its bucket."""


def num_buckets(input_bytes: int, num_units: int) -> int:
    """Into how many buckets the keys go: none if there is one unit, which has looked for its own duplicates."""
    return 0 if num_units == 1 else min(max(input_bytes // BUCKET_BYTES, 1), MOST_BUCKETS)


def find_duplicates(
    folder: Store, task: int, bucket: int, buckets: int, units: Sequence[StagedFile], merge_keys: int = MERGE_KEYS
) -> FinishedTask:
    """Write down all but the first of equal keys of a bucket; the order of `units` is that of the input."""
    paths = [unit.on_this_machine(folder, check=False) for unit in units]
    count = sum(unit.bytes for unit in units) // ENTRY_BYTES // buckets  # about: keys are spread evenly
    parts = buckets * max(-(-count // merge_keys), 1)
    borders = [KEY_SPACE * part // parts for part in range(parts + 1)]
    mine = slice(bucket * parts // buckets, (bucket + 1) * parts // buckets + 1)
    repeated = np.concatenate([_repeated(paths, first, stop) for first, stop in pairwise(borders[mine])])
    repeated = repeated[np.lexsort((repeated[:, 1], repeated[:, 0]))]

    def write(path: Path) -> None:
        path.write_bytes(np.ascontiguousarray(repeated.T, "<u4").tobytes())

    staged = write_staged(folder, task, "duplicates", write) if len(repeated) else None
    return FinishedTask(duplicates=staged, statistics={"duplicates": len(repeated)})


class Duplicates:
    """What the buckets have found: places of duplicates by unit."""

    def __init__(self, folder: Store, buckets: Sequence[FinishedTask]) -> None:
        files = [bucket.duplicates for bucket in buckets if bucket.duplicates is not None]
        self._buckets = [_read(file.on_this_machine(folder)) for file in files]

    def of(self, unit: int) -> np.ndarray:
        """int64 [n]: places of a unit's duplicates among its keys, rising."""
        found = [np.zeros(0, np.int64)]
        for units, places in self._buckets:
            first, stop = np.searchsorted(units, [unit, unit + 1])
            found.append(places[first:stop].astype(np.int64))
        return np.sort(np.concatenate(found))

    def units(self) -> list[int]:
        """Units that have any, rising."""
        return sorted({int(unit) for units, _ in self._buckets for unit in np.unique(units)})


def _repeated(paths: Sequence[Path], first: int, stop: int) -> np.ndarray:
    """uint32 [n, 2]: unit and place of all but the first of equal keys in a range."""
    found = [read_keys(path, first, stop) for path in paths]
    unit = np.repeat(np.arange(len(paths), dtype=np.uint32), [len(places) for _, _, places in found])
    high, low, place = (np.concatenate(column) for column in zip(*found))
    del found
    order = np.lexsort((low, high))  # stable, and a unit has a key once: equal ones stay in the units' order
    high, low = high[order], low[order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    chosen = order[1:][same]
    return np.stack([unit[chosen], place[chosen]], axis=1)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Units and places, uint32 [n] each, mapped."""
    content = np.memmap(str(path), "<u4", "r")
    if len(content) % 2:
        raise CorpusError(f"{path}: not a file of duplicates; prepare the corpus again.")
    return content[: len(content) // 2], content[len(content) // 2 :]
