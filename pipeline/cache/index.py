"""The index of a complete cache: every commit record as a row of one memory-mapped Arrow file.

    CACHE/index.arrow    an Arrow IPC stream, then the xxh3-128 of all bytes before it

Opening 10,000 shards through their records takes seconds; through the index, milliseconds. The
records stay the only truth: the index is made from them by whoever first opens the complete cache,
carries a stamp of the manifest and of every record it was made from, and is made again where it is
absent, damaged or stale. Builders may race: each publishes a whole file, and all are equal.
In an object store there is none: the records are read, many at the same time.
"""

import contextlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.cache.commits import COMMITS, ShardCommit, read_commit
from pipeline.cache.manifest import MANIFEST, CacheManifest
from pipeline.documents import Count, document_of, parse_json
from pipeline.errors import CacheCorruptError, CacheIncompleteError
from pipeline.files import hash_file, remove_partials
from pipeline.ipc import stream_batches
from pipeline.parallel import map_in_threads
from pipeline.stores.local_store import LocalStore
from pipeline.stores.store import Store

INDEX = "index.arrow"
SEAL_BYTES = 16
REQUESTS = 32
"""Records of an object store that are read at the same time."""

SCHEMA = pa.schema(
    [
        pa.field(field.name, pa.int64() if field.type == Count else pa.string(), nullable=False)
        for field in fields(ShardCommit)
    ]
)
"""A column a field of ShardCommit; `statistics` as JSON."""


class CommitIndex(Sequence[ShardCommit]):
    """The commit records of a complete cache, in the order of the partitions; each is made when asked for."""

    def __init__(self, table: pa.Table, where: str) -> None:
        self._table, self._where = table.combine_chunks(), where

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, partition: Any) -> Any:
        if isinstance(partition, slice):
            return [self[index] for index in range(*partition.indices(len(self)))]
        (row,) = self._table.slice(range(len(self))[partition], 1).to_pylist()
        row["statistics"] = parse_json(row["statistics"], self._where, CacheCorruptError)
        commit = document_of(ShardCommit, row, self._where, CacheCorruptError)
        if commit.partition != partition % len(self):
            raise CacheCorruptError(f"{self._where}: row {partition} is the record of partition {commit.partition}.")
        return commit

    def column(self, name: str) -> np.ndarray:
        """int64 [partitions]: one number of every record."""
        return self._table.column(name).to_numpy()


def open_index(folder: Store, manifest: CacheManifest) -> CommitIndex:
    """The records of the complete cache in `folder`; raises CacheIncompleteError if partitions are missing."""
    local = folder.path
    if local is None:
        return CommitIndex(_collect(folder, manifest, REQUESTS), str(folder / COMMITS))
    path, stamp = LocalStore(local / INDEX), _stamp(local)
    table = _read(path, stamp)
    if table is None or table.num_rows != manifest.num_partitions:
        table = _collect(folder, manifest, workers=1)
        with contextlib.suppress(OSError):  # a read-only folder or a full disk: the records serve as well
            _write(path, table, stamp)
    return CommitIndex(table, str(path))


def _stamp(folder: Path) -> str:
    """Changes with the manifest and with the name, size or modification time of any commit record."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / COMMITS) as entries:
        found = sorted((entry.name, entry.stat()) for entry in entries if entry.name.endswith(".json"))
    lines = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in found]
    return xxhash.xxh3_128_hexdigest("\n".join([hash_file(folder / MANIFEST), *lines]).encode())


def _read(path: Path, stamp: str) -> pa.Table | None:
    """The table of a whole index with this stamp, memory-mapped; None if there is none."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        contents = pa.memory_map(str(path)).read_buffer()
    except (OSError, pa.ArrowInvalid):
        return None
    body = contents.slice(0, max(0, contents.size - SEAL_BYTES))
    if xxhash.xxh3_128_digest(body) != contents.slice(body.size).to_pybytes():
        return None
    schema = SCHEMA.with_metadata({"stamp": stamp})
    try:
        return pa.Table.from_batches(stream_batches(body, schema), schema)
    except (pa.ArrowException, OSError, ValueError, struct.error):
        return None


def _collect(folder: Store, manifest: CacheManifest, workers: int) -> pa.Table:
    commits = map_in_threads(lambda partition: read_commit(folder, partition), range(manifest.num_partitions), workers)
    missing = [partition for partition, commit in enumerate(commits) if commit is None]
    if missing:
        raise CacheIncompleteError(
            f"{folder / MANIFEST}: {len(missing)} of {len(commits)} partitions are not captured yet "
            f"(first: {missing[0]}); run the same `pipeline cache-logits` command again to continue."
        )
    rows = [asdict(commit) | {"statistics": json.dumps(commit.statistics)} for commit in commits if commit is not None]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _write(path: LocalStore, table: pa.Table, stamp: str) -> None:
    remove_partials(path.parent, path.name)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.with_metadata({"stamp": stamp})) as writer:
        writer.write_table(table)
    body = sink.getvalue()
    path.write(body.to_pybytes() + xxhash.xxh3_128_digest(body))
