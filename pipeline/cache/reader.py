"""Reading a cache: a map from an index to a sequence and its targets, whatever the container."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.commits import SHARDS, ShardCommit
from pipeline.cache.index import open_index
from pipeline.cache.manifest import MANIFEST, CacheManifest
from pipeline.errors import CacheCorruptError
from pipeline.files import hash_file
from pipeline.formats.containers import CONTAINERS, Shard, structure_of
from pipeline.formats.layout import CachedSequence, ShardLayout, decode
from pipeline.stores.copies import local_copy
from pipeline.stores.objects import Location, ObjectPath, location

OPEN_SHARDS = 64
"""Shards that a reader keeps open at the same time."""


class Cache:
    """A finished cache, in the order of its corpus: `len(cache)` sequences, `cache[i]` a CachedSequence.

    What is read is checked, and only that: a shard's structure when it is opened, a sequence against its
    checksum whenever it is read; damage raises CacheCorruptError that names the file. Can be pickled;
    safe to use from forked workers, not from several threads at once. A copy of a shard in an object store is
    checked to the byte when it is first opened, and fetched again if it is damaged.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.manifest = CacheManifest.read(folder)
        self.commits = open_index(folder, self.manifest)
        for name in ("num_tokens", "num_targets"):  # partitions may be missing from the manifest itself
            found, expected = int(self.commits.column(name).sum()), getattr(self.manifest, name)
            if found != expected:
                raise CacheCorruptError(f"{folder / MANIFEST}: {name} is {expected}; its partitions have {found}.")
        self._starts = np.array(self.manifest.partitions)
        self._shards: OrderedDict[int, tuple[Shard, ShardLayout, str]] = OrderedDict()
        self._whole_copies: set[int] = set()

    def __len__(self) -> int:
        return self.manifest.num_sequences

    def __getitem__(self, index: int) -> CachedSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a cache of {len(self)}")
        index = int(index) % len(self)
        partition = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[partition])
        shard, layout, where = self._open(partition)
        sequence = decode(shard.columns(row, row + 1), layout, f"{where}: sequence {row}")
        self._require_vocabulary(sequence, f"{where}: sequence {row}")
        return sequence

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

    def batch(self, indexes: Iterable[int]) -> list[CachedSequence]:
        """The sequences at `indexes`, in that order; read in the order of the files."""
        indexes = list(indexes)
        found = {index: self[index] for index in sorted(set(indexes), key=lambda index: index % max(len(self), 1))}
        return [found[index] for index in indexes]

    def __iter__(self) -> Iterator[CachedSequence]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": OrderedDict(), "_whole_copies": set()}

    def shard(self, partition: int) -> Shard:
        """The open shard of a partition, its structure checked."""
        return self._open(partition)[0]

    def largest_token_id(self) -> int:
        """Over all sequences; reads all of them where the manifest, of an older version, does not say."""
        recorded = self.manifest.largest_token_id
        return max(int(sequence.token_ids.max()) for sequence in self) if recorded is None else recorded

    def close(self) -> None:
        """Release all files."""
        while self._shards:
            self._shards.popitem()[1][0].close()

    def _open(self, partition: int) -> tuple[Shard, ShardLayout, str]:
        if partition not in self._shards:
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.popitem(last=False)[1][0].close()
            commit = self.commits[partition]
            is_new_copy = isinstance(self.folder, ObjectPath) and partition not in self._whole_copies
            shard = open_shard(self.folder, self.manifest, commit, check=is_new_copy)
            self._whole_copies.add(partition)
            where = str(self.folder / SHARDS / commit.file)
            self._shards[partition] = shard, layout_of_commit(self.manifest, commit), where
        self._shards.move_to_end(partition)
        return self._shards[partition]


def open_shard(folder: Location, manifest: CacheManifest, commit: ShardCommit, *, check: bool = False) -> Shard:
    """A committed shard; raises CacheCorruptError unless its size and structure, with `check` every byte, are as
    they were committed."""
    where, path = folder / SHARDS / commit.file, shard_file(folder, commit, check=check)
    first, stop = manifest.partitions[commit.partition : commit.partition + 2]
    if commit.num_sequences != stop - first:
        raise CacheCorruptError(f"{where}: {commit.num_sequences} sequences; the manifest plans {stop - first}.")
    shard = CONTAINERS[manifest.container].open(path, layout_of_commit(manifest, commit))
    if len(shard) != commit.num_sequences:
        raise CacheCorruptError(f"{where}: holds {len(shard)} sequences; its commit says {commit.num_sequences}.")
    if structure_of(path, shard) != commit.structure:
        raise CacheCorruptError(f"{where}: its structure is not the committed one; bytes of the file have changed.")
    heads = shard.heads()
    for name in ("num_tokens", "num_documents", "num_targets"):
        if heads[name].min(initial=0) < 0 or heads[name].sum(dtype=np.int64) != getattr(commit, name):
            raise CacheCorruptError(f"{where}: {name} of its sequences do not add up to those of its commit.")
    if (longest := int(heads["num_tokens"].max(initial=0))) > manifest.sequence_length:
        raise CacheCorruptError(f"{where}: a sequence of {longest} tokens; the longest has {manifest.sequence_length}.")
    return shard


def open_cache(path: str | Location) -> Cache:
    """The finished cache in a folder or at a URL; raises CacheIncompleteError if partitions are missing."""
    return Cache(location(path) if isinstance(path, str) else path)


def shard_file(folder: Location, commit: ShardCommit, *, check: bool = True) -> Path:
    """A committed shard as a file of this machine, as long as it was committed; with `check`, the same to the byte.

    Raises CacheCorruptError. Of an object store it is a copy, downloaded unless it is there.
    """
    path = folder / SHARDS / commit.file
    if not isinstance(path, ObjectPath):
        _check_file(path, commit, check)
        return path

    def is_whole(copy: Path) -> bool:
        return copy.stat().st_size == commit.bytes and (not check or hash_file(copy) == commit.xxh3_128)

    try:
        return local_copy(path, commit.xxh3_128, commit.bytes, is_whole)
    except FileNotFoundError:
        raise CacheCorruptError(f"{path}: missing, although it was committed; `pipeline verify` names all.") from None
    except ValueError as exc:
        raise CacheCorruptError(f"{exc}; the shard is damaged.") from exc


def _check_file(path: Path, commit: ShardCommit, every_byte: bool) -> None:
    if not path.is_file():
        raise CacheCorruptError(f"{path}: missing, although it was committed; `pipeline verify` names all damage.")
    size = path.stat().st_size
    if size != commit.bytes:
        raise CacheCorruptError(
            f"{path}: {size} bytes; {commit.bytes} were committed: the file is truncated or foreign."
        )
    if every_byte and hash_file(path) != commit.xxh3_128:
        raise CacheCorruptError(f"{path}: its checksum is not the committed one; bytes of the file have changed.")


def layout_of_commit(manifest: CacheManifest, commit: ShardCommit) -> ShardLayout:
    """The layout of a committed shard."""
    return manifest.layout(
        num_sequences=commit.num_sequences,
        num_tokens=commit.num_tokens,
        num_documents=commit.num_documents,
        num_targets=commit.num_targets,
    )
