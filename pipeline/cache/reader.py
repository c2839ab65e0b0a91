"""Reading a cache: a map from an index to a sequence and its targets, whatever the container."""

import dataclasses
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.cache.commits import ShardCommit, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.index import REQUESTS, open_index
from pipeline.cache.manifest import MANIFEST, CacheManifest
from pipeline.cache.masking import without_documents
from pipeline.cache.pieces import Piece
from pipeline.cache.settings import VIEW_SUFFIX
from pipeline.cache.shard import StoredShard
from pipeline.cache.view import Selected, fingerprint, read_view
from pipeline.documents import printable
from pipeline.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, ConfigError
from pipeline.files import canonical_json
from pipeline.formats.containers import Shard
from pipeline.formats.layout import CachedSequence
from pipeline.parallel import map_in_threads
from pipeline.stores.places import store_of
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
        self.place = self.folder
        """What it is called by: for a view its file."""
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

    @property
    def records(self) -> Mapping[int, ShardCommit]:
        """The commit records of the partitions that are done, by partition, in order."""
        return {partition: self.record(partition) for partition in range(self.manifest.num_partitions)}

    def find(self, key: bytes) -> int | None:
        """The number of the sequence of a key; None if none of those that are done has it. Looks into every shard."""
        for partition in self.records:
            if len(rows := np.flatnonzero((self.opened(partition)[1].heads()["key"] == _bytes(key)).all(axis=1))):
                return int(self._starts[partition] + rows[0])
        return None

    def numbers_in(self, partition: int) -> tuple[int, int]:
        """First and last (exclusive) of the sequences that are in a partition."""
        return int(self._starts[partition]), int(self._starts[partition + 1])

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

    def pieces(self) -> list[Piece]:
        """What there is of every shard, in order."""
        return [Piece(shard) for shard in self.shards()]

    def largest_token_id(self) -> int:
        """Over all sequences; reads all of them where the manifest, of an older version, does not say."""
        recorded = self.manifest.largest_token_id
        return max(int(sequence.token_ids.max()) for sequence in self) if recorded is None else recorded


class CacheView(Cache):
    """The sequences of a view, numbered from 0, as a finished cache of their own.

    Its manifest is that of a cache with these sequences alone. `base` is the cache that holds them: shards,
    partitions and records are its own. A sequence is refused if its key is not the one that was selected.
    """

    def __init__(self, place: str | Path | Store) -> None:
        self.place = store_of(place)
        self.view = read_view(self.place)
        self.base = self._open_base()
        self.folder, self.commits = self.base.folder, self.base.commits
        try:
            self.selected = Selected.of(self.view, len(self.base))
            self.manifest = self._manifest()
        except ValueError as exc:
            raise CacheCorruptError(f"{self.place}: {exc}; select again.") from exc
        self.view = dataclasses.replace(self.view, rows="", keys="", document_counts=None, documents=None)  # megabytes
        self._starts = self.base._starts

    def _manifest(self) -> CacheManifest:
        """That of a cache of its sequences; raises ValueError for counts that cannot be."""
        view, selected, manifest = self.view, self.selected, self.base.manifest
        if not (0 < view.num_targets <= manifest.num_targets and view.num_tokens <= manifest.num_tokens):
            raise ValueError(f"{view.num_targets} targets of {view.num_tokens} tokens are none or more than there are")
        bounds = np.searchsorted(selected.rows, np.array(manifest.partitions))
        digest = xxhash.xxh3_128(selected.keys.tobytes())
        digest.update((view.documents or "").encode())
        return dataclasses.replace(
            manifest,
            corpus=xxhash.xxh3_128_hexdigest(canonical_json([manifest.corpus, digest.hexdigest()])),
            num_tokens=view.num_tokens,
            num_targets=view.num_targets,
            partitions=tuple(dict.fromkeys(bounds.tolist())),
        )

    def _open_base(self) -> Cache:
        name = self.view.cache
        path = self.place.path
        if "://" not in name and path is not None:
            name = os.path.join(path.absolute().parent, name)
        try:
            base = Cache(name)
        except (CacheIncompleteError, ConfigError) as exc:
            raise CacheMismatchError(
                f"{self.place}: selects from a cache that is not there, or not finished: {printable(str(exc))}"
            ) from exc
        if fingerprint(base.manifest) != self.view.fingerprint:
            raise CacheMismatchError(
                f"{self.place}: selects from {base.folder}, which holds another cache now; select again."
            )
        return base

    def __getitem__(self, index: int) -> CachedSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a view of {len(self)}")
        index = int(index) % len(self)
        row = int(self.selected.rows[index])
        sequence, kept = self.base[row], self.selected.documents_of(index)
        if sequence.key != self.selected.keys[index].tobytes():
            raise CacheMismatchError(
                f"{self.place}: sequence {row} of {self.folder} is not the one that was selected; select again."
            )
        if kept is None:
            return sequence
        if len(kept) != len(sequence.document_lengths):
            raise CacheCorruptError(
                f"{self.place}: sequence {index} has {len(sequence.document_lengths)} documents, {len(kept)} here."
            )
        return without_documents(sequence, kept)

    def pieces(self) -> list[Piece]:
        """What is selected of every shard that it selects from, in order."""
        return [self._piece(partition) for partition in self.partitions]

    @property
    def partitions(self) -> list[int]:
        """Those of the cache that hold selected sequences."""
        return np.unique(np.searchsorted(self._starts, self.selected.rows, side="right") - 1).tolist()

    def _piece(self, partition: int) -> Piece:
        selected, (first, stop) = self.selected, self.numbers_in(partition)
        rows = selected.rows[first:stop] - self._starts[partition]
        documents = None
        if selected.documents is not None and selected.starts is not None:
            documents = selected.documents[selected.starts[first] : selected.starts[stop]]
        return Piece(self.shard(partition), rows, documents, selected.keys[first:stop])

    def find(self, key: bytes) -> int | None:
        """The number of the sequence that has a key in the cache, with all of its documents; None if none has."""
        rows = np.flatnonzero((self.selected.keys == _bytes(key)).all(axis=1))
        return int(rows[0]) if len(rows) else None

    def numbers_in(self, partition: int) -> tuple[int, int]:
        """First and last (exclusive) of its sequences that are in a partition of the cache."""
        first, stop = np.searchsorted(self.selected.rows, self._starts[partition : partition + 2])
        return int(first), int(stop)

    def partition_of(self, index: int) -> int:
        """The partition of the cache that its sequence `index` is in."""
        return self.base.partition_of(int(self.selected.rows[index]))

    @property
    def records(self) -> Mapping[int, ShardCommit]:
        """The commit records of the partitions of the cache that it selects from."""
        return {partition: self.record(partition) for partition in self.partitions}

    def record(self, partition: int) -> ShardCommit:
        """The commit record of a partition of the cache."""
        return self.base.record(partition)

    def shard(self, partition: int) -> StoredShard:
        """The shard of a partition of the cache."""
        return self.base.shard(partition)

    def opened(self, partition: int) -> tuple[StoredShard, Shard]:
        """The shard of a partition of the cache and its open file."""
        return self.base.opened(partition)

    def shards(self) -> list[StoredShard]:
        """The shards that it selects from, in order."""
        return [self.shard(partition) for partition in self.partitions]

    def close(self) -> None:
        """Release all files."""
        self.base.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


class PartialCache(ReadableCache):
    """A cache that may be unfinished: the partitions that were done when it was opened."""

    def __init__(self, folder: str | Path | Store) -> None:
        super().__init__(folder)
        done = sorted(self.done() & set(range(self.manifest.num_partitions)))
        commits = map_in_threads(lambda partition: read_commit(self.folder, partition), done, REQUESTS)
        self._records = {commit.partition: commit for commit in commits if commit is not None}

    @property
    def records(self) -> Mapping[int, ShardCommit]:
        """The commit records of the partitions that are done, by partition, in order."""
        return self._records

    def record(self, partition: int) -> ShardCommit:
        """The commit record of a partition; raises CacheIncompleteError if it is not done."""
        if partition not in self._records:
            raise CacheIncompleteError(f"{self.folder}: partition {partition} is not captured yet.")
        return self._records[partition]


def _bytes(key: bytes) -> np.ndarray:
    return np.frombuffer(key, np.uint8)


def open_cache(path: str | Path | Store) -> Cache:
    """The finished cache in a folder or at a URL, or what a view selects of one; raises CacheError.

    CacheIncompleteError if partitions are missing.
    """
    return CacheView(path) if is_view(path) else Cache(path)


def readable_cache(path: str | Path | Store) -> ReadableCache:
    """What there is of a cache, finished or not, or what a view selects of a finished one."""
    return CacheView(path) if is_view(path) else PartialCache(path)


def whole_cache(path: str | Path | Store) -> Cache:
    """The finished cache in a folder or at a URL; raises ConfigError for a view."""
    if is_view(path):
        raise ConfigError(
            f"{path}: a view; this command takes the cache itself. `pipeline merge` copies what it selects."
        )
    return Cache(path)


def is_view(path: str | Path | Store) -> bool:
    """Whether a name is that of a view, a file, in the place of a cache."""
    return str(path).endswith(VIEW_SUFFIX)
