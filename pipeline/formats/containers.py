"""The containers that shards can be kept in: one schema, one contract.

Both give back the same columns, bit for bit. Arrow is the fast twin, Zarr the small archive.
"""

import mmap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from pipeline.formats.layout import ShardLayout
from pipeline.parallel import ALONE, Threads
from pipeline.tables import Table


class ShardWriter(Protocol):
    """Writes the sequences of a shard, in order, to a file that is complete only after `close`."""

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Add the stored columns of one sequence."""

    def close(self, threads: Threads = ALONE) -> None:
        """Write what is pending; the same bytes, whoever shares the work."""

    def discard(self) -> None:
        """Let go of the file, finished or not; does nothing after `close`."""


class Shard(Protocol):
    """A finished shard. Opening raises CacheCorruptError if the file is torn or not of this layout."""

    def __len__(self) -> int: ...

    def columns(self, start: int, stop: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """The stored columns of sequences `start` to `stop`, or those of `names` alone."""

    def heads(self) -> dict[str, np.ndarray]:
        """What every sequence has one of: key [S, 16], num_tokens, num_documents, num_targets [S]; reads no targets."""

    def parts(self) -> dict[str, int]:
        """Bytes of every array in the file, by its name; directories, padding and schemas are none."""

    def checked_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the file's bytes, rising and apart, in which reading a sequence notices any change."""

    def close(self) -> None:
        """Release the file."""


@dataclass(frozen=True)
class Container:
    """A way to keep a shard in one file."""

    suffix: str
    create: Callable[[Path, ShardLayout], ShardWriter]
    open: Callable[[Path, ShardLayout], Shard]
    format_version: Callable[[ShardLayout], int]
    """Of the format that new shards need."""
    is_compressed: bool = False
    """Whether how much it takes is known only when it is written."""
    checks_columns: bool = False
    """Whether reading some of the columns checks them; otherwise a sequence's checksum does, over all of them."""


def structure_of(path: Path, shard: Shard) -> str:
    """xxh3-128 of the bytes of a shard outside its `checked_ranges`, as hex: directories, offsets, padding.

    With it, opening a shard and reading a sequence check every byte that they rely on, and no other.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        done = 0
        for start, stop in [*shard.checked_ranges(), (len(contents), len(contents))]:
            digest.update(contents[done:start])
            done = stop
    return digest.hexdigest()


CONTAINERS: Table[Container] = Table(
    {"arrow": "pipeline.formats.arrow:CONTAINER", "zarr": "pipeline.formats.zarr:CONTAINER"}
)
"""By the name that `--format` takes."""
