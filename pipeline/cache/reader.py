"""Reading a cache: a map from an index to a sequence and its targets, whatever the container."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.commits import ShardCommit, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.index import REQUESTS, open_index
from pipeline.cache.manifest import MANIFEST
from pipeline.cache.shard import StoredShard
from pipeline.errors import CacheCorruptError, CacheIncompleteError
from pipeline.formats.containers import Shard
from pipeline.formats.layout import CachedSequence
from pipeline.parallel import map_in_threads
from pipeline.stores.store import Store

OPEN_SHARDS = 64
"""Shards that a reader keeps open at the same time."""


class ReadableCache(CacheFolder, ABC):
    """A cache of which sequences are read: `len(cache)` are planned, `cache[i]` is a CachedSequence.

    What is read is checked, and only that: a shard's structure when it is opened, a sequence against its
    checksum whenever it is read; damage raises CacheCorruptError that names the file. Can be pickled;
    safe to use from forked workers, not from several threads at once. A copy of a shard in an object store is
    checked to the byte when it is first opened, and fetched again if it is damaged.
    """

    def __init__(self, folder: str | Path | Store) -> None:
        super().__init__(folder)
        self._starts = np.array(self.manifest.partitions)
        self._open: OrderedDict[int, tuple[StoredShard, Shard]] = OrderedDict()
        self._whole_copies: set[int] = set()

    @abstractmethod
    def record(self, partition: int) -> ShardCommit:
        """The commit record of a partition; raises CacheIncompleteError if it is not done."""

    def __len__(self) -> int:
        return self.manifest.num_sequences

    def __getitem__(self, index: int) -> CachedSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a cache of {len(self)}")
        index = int(index) % len(self)
        partition = self.partition_of(index)
        row = index - int(self._starts[partition])
        stored, shard = self.opened(partition)
        sequence = stored.decode(shard.columns(row, row + 1), row)
        self._require_vocabulary(sequence, stored.where(row))
        return sequence

    def partition_of(self, index: int) -> int:
        """The partition that sequence `index` is in."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _require_vocabulary(self, sequence: CachedSequence, where: str) -> None:
        """Raise CacheCorruptError if an id is none: it would index a model's table. Below 0 is far above as uint32."""
        targets, size, largest = sequence.targets, self.manifest.vocab_size, self.manifest.largest_token_id
        tokens = size if largest is None else min(largest + 1, size)
        for ids, limit in (
            (sequence.token_ids, tokens),
            (targets.ids, size),
            (targets.draws + 1, size + 1),
        ):  # -1: none
            if ids.size and int(ids.view(np.uint32).max()) >= limit:
                raise CacheCorruptError(f"{where}: an id of {limit} or above, which the manifest rules out.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_whole_copies": set()}

    def shard(self, partition: int) -> StoredShard:
        """The shard of a partition."""
        return StoredShard.of(self.folder, self.manifest, self.record(partition))

    def close(self) -> None:
        """Release all files."""
        while self._open:
            self._open.popitem()[1][1].close()

    def opened(self, partition: int) -> tuple[StoredShard, Shard]:
        """The shard of a partition and its open file, which stays open until others need the room."""
        if partition not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1][1].close()
            is_new_copy = self.folder.path is None and partition not in self._whole_copies
            stored = self.shard(partition)
            self._open[partition] = stored, stored.open(check=is_new_copy)
            self._whole_copies.add(partition)
        self._open.move_to_end(partition)
        return self._open[partition]


class Cache(ReadableCache):
    """A finished cache, in the order of its corpus."""

    def __init__(self, folder: str | Path | Store) -> None:
        super().__init__(folder)
        self.commits = open_index(self.folder, self.manifest)
        for name in ("num_tokens", "num_targets"):  # partitions may be missing from the manifest itself
            found, expected = int(self.commits.column(name).sum()), getattr(self.manifest, name)
            if found != expected:
                where = self.folder / MANIFEST
                raise CacheCorruptError(f"{where}: {name} is {expected}; its partitions have {found}.")

    def record(self, partition: int) -> ShardCommit:
        """The commit record of a partition."""
        return self.commits[partition]

    def batch(self, indexes: Iterable[int]) -> list[CachedSequence]:
        """The sequences at `indexes`, in that order; read in the order of the files."""
        indexes = list(indexes)
        found = {index: self[index] for index in sorted(set(indexes), key=lambda index: index % max(len(self), 1))}
        return [found[index] for index in indexes]

    def __iter__(self) -> Iterator[CachedSequence]:
        return (self[index] for index in range(len(self)))

    def shards(self) -> list[StoredShard]:
        """All shards, in order."""
        return [StoredShard.of(self.folder, self.manifest, commit) for commit in self.commits]

    def largest_token_id(self) -> int:
        """Over all sequences; reads all of them where the manifest, of an older version, does not say."""
        recorded = self.manifest.largest_token_id
        return max(int(sequence.token_ids.max()) for sequence in self) if recorded is None else recorded


class PartialCache(ReadableCache):
    """A cache that may be unfinished: the partitions that were done when it was opened."""

    def __init__(self, folder: str | Path | Store) -> None:
        super().__init__(folder)
        done = sorted(self.done() & set(range(self.manifest.num_partitions)))
        commits = map_in_threads(lambda partition: read_commit(self.folder, partition), done, REQUESTS)
        self.records = {commit.partition: commit for commit in commits if commit is not None}
        """The commit records by partition, in order."""

    def record(self, partition: int) -> ShardCommit:
        """The commit record of a partition; raises CacheIncompleteError if it is not done."""
        if partition not in self.records:
            raise CacheIncompleteError(f"{self.folder}: partition {partition} is not captured yet.")
        return self.records[partition]


def open_cache(path: str | Path | Store) -> Cache:
    """The finished cache in a folder or at a URL; raises CacheIncompleteError if partitions are missing."""
    return Cache(path)
