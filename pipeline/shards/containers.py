"""The containers that shards can be kept in: one schema, one contract."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.shards.arrow import ArrowShard, ArrowShardWriter
from pipeline.shards.layout import ShardLayout
from pipeline.shards.zarr import ZarrShard, ZarrShardWriter


class ShardWriter(Protocol):
    """Writes the sequences of a shard, in order, to a file that is complete only after `close`."""

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Add the stored columns of one sequence."""

    def close(self) -> None:
        """Write what is pending."""

    def discard(self) -> None:
        """Let go of the file, finished or not; does nothing after `close`."""


class Shard(Protocol):
    """A finished shard. Opening raises CacheCorruptError if the file is torn or not of this layout."""

    def __len__(self) -> int: ...

    def columns(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The stored columns of sequences `start` to `stop`."""

    def heads(self) -> dict[str, np.ndarray]:
        """What every sequence has one of: key [S, 16], num_tokens, num_documents, num_targets [S]; reads no targets."""

    def close(self) -> None:
        """Release the file."""


@dataclass(frozen=True)
class Container:
    """A way to keep a shard in one file."""

    suffix: str
    create: Callable[[Path, ShardLayout], ShardWriter]
    open: Callable[[Path, ShardLayout], Shard]


CONTAINERS = {
    "arrow": Container(".arrow", ArrowShardWriter, ArrowShard),
    "zarr": Container(".zarr.zip", ZarrShardWriter, ZarrShard),
}
"""By the name that `--format` takes."""
