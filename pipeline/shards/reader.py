"""Reading a cache: a map from an index to a sequence and its targets, whatever the container."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import CacheCorruptError
from pipeline.files import hash_file
from pipeline.manifest import CacheManifest
from pipeline.runs.commits import SHARDS, ShardCommit
from pipeline.shards.containers import CONTAINERS, Shard
from pipeline.shards.index import open_index
from pipeline.shards.layout import CachedSequence, ShardLayout, decode

OPEN_SHARDS = 64
"""Shards that a reader keeps open at the same time."""


class Cache:
    """A finished cache, in the order of its corpus: `len(cache)` sequences, `cache[i]` a CachedSequence.

    A shard's checksum is checked when a process first reads from it; damage raises
    CacheCorruptError that names the file. Can be pickled; safe to use from forked workers, not
    from several threads at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = CacheManifest.read(folder)
        self.commits = open_index(folder, self.manifest)
        self._starts = np.array(self.manifest.partitions)
        self._checked: set[int] = set()
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.num_sequences

    def __getitem__(self, index: int) -> CachedSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a cache of {len(self)}")
        index = int(index) % len(self)
        partition = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, row = self.shard(partition), index - int(self._starts[partition])
        where = str(self.folder / SHARDS / self.commits[partition].file)
        return decode(shard.columns(row, row + 1), self.manifest.temperatures, where)

    def __iter__(self) -> Iterator[CachedSequence]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": OrderedDict(), "_checked": set()}

    def shard(self, partition: int) -> Shard:
        """The open shard of a partition, its checksum checked."""
        if partition not in self._shards:
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.popitem(last=False)[1].close()
            self._shards[partition] = self._open(partition)
        self._shards.move_to_end(partition)
        return self._shards[partition]

    def close(self) -> None:
        """Release all files."""
        while self._shards:
            self._shards.popitem()[1].close()

    def _open(self, partition: int) -> Shard:
        commit = self.commits[partition]
        path = self.folder / SHARDS / commit.file
        if partition not in self._checked:
            check_shard_file(path, commit)
            self._checked.add(partition)
        shard = CONTAINERS[self.manifest.container].open(path, layout_of_commit(self.manifest, commit))
        if len(shard) != commit.num_sequences:
            raise CacheCorruptError(f"{path}: holds {len(shard)} sequences; its commit says {commit.num_sequences}.")
        return shard


def open_cache(path: str | Path) -> Cache:
    """The finished cache in the folder `path`; raises CacheIncompleteError if partitions are missing."""
    return Cache(Path(path))


def check_shard_file(path: Path, commit: ShardCommit) -> None:
    """Raise CacheCorruptError unless the file is, byte for byte, the one that was committed."""
    if not path.is_file():
        raise CacheCorruptError(f"{path}: missing, although it was committed; `pipeline verify` names all damage.")
    size = path.stat().st_size
    if size != commit.bytes:
        raise CacheCorruptError(
            f"{path}: {size} bytes; {commit.bytes} were committed: the file is truncated or foreign."
        )
    if hash_file(path) != commit.xxh3_128:
        raise CacheCorruptError(f"{path}: its checksum is not the committed one; bytes of the file have changed.")


def layout_of_commit(manifest: CacheManifest, commit: ShardCommit) -> ShardLayout:
    """The layout of a committed shard."""
    return manifest.layout(
        num_sequences=commit.num_sequences,
        num_tokens=commit.num_tokens,
        num_documents=commit.num_documents,
        num_targets=commit.num_targets,
    )
