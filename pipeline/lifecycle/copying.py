"""Copying cached sequences into new shards as they are stored: nothing is rounded again.

A copy is read back and compared with its source before it is committed.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.commits import ShardCommit, commit_shard, partial_shard_path
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.reader import layout_of_commit, open_shard, shard_file
from pipeline.cache.statistics import TargetStatistics
from pipeline.errors import CacheCorruptError
from pipeline.files import hash_file, naming
from pipeline.formats.containers import CONTAINERS, Container, Shard
from pipeline.formats.layout import RAGGED, ShardLayout, decode

BLOCK_TARGETS = 65_536
"""Targets that are held at a time."""

Columns = dict[str, np.ndarray]


def copy_shard(source: Path, commit: ShardCommit, folder: Path, partition: int, rows: np.ndarray | None = None) -> None:
    """Commit a copy of a shard of `source` as `partition` of the cache in `folder`, unless another process was faster.

    With `rows`, rising numbers of the shard's sequences, those alone are copied.
    """
    theirs, name = CacheManifest.read(source), CacheManifest.read(folder).container
    original = shard_file(source, commit)
    layout, statistics = layout_of_commit(theirs, commit), commit.statistics
    partial = partial_shard_path(folder, partition, CONTAINERS[name].suffix)
    try:
        with naming(partial):
            if rows is None and name == theirs.container:
                _copy_file(original, partial, commit.xxh3_128)
            else:
                with closing(open_shard(source, theirs, commit)) as shard:
                    if rows is not None:
                        layout, statistics = _measure(shard, layout, rows, commit)
                    _write(shard, rows, partial, layout, CONTAINERS[name])
                    _compare(shard, rows, partial, layout, CONTAINERS[name])
            commit_shard(folder, partition, partial, layout, statistics)
    finally:
        partial.unlink(missing_ok=True)


def sequences_of_shard(shard: Shard, layout: ShardLayout, rows: np.ndarray | None = None) -> Iterator[Columns]:
    """The stored columns of every sequence of a shard, or of `rows`, in order; a block of them is held at a time."""
    step = max(1, BLOCK_TARGETS * len(shard) // max(layout.num_targets, 1))
    wanted = np.arange(len(shard)) if rows is None else rows
    for start in range(0, len(shard), step):
        inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + step)]
        if len(inside):
            first, last = int(inside[0]), int(inside[-1]) + 1
            yield from _split(shard.columns(first, last), inside - first)


def _split(columns: Columns, rows: np.ndarray) -> Iterator[Columns]:
    counts = set(RAGGED.values())
    offsets = {name: np.concatenate([[0], np.cumsum(columns[name])]) for name in counts}
    for row in rows:
        bounds = {counted: slice(offsets[counted][row], offsets[counted][row + 1]) for counted in counts}
        own = slice(row, row + 1)
        yield {name: values[bounds[RAGGED[name]] if name in RAGGED else own] for name, values in columns.items()}


def _copy_file(source: Path, partial: Path, checksum: str) -> None:
    shutil.copyfile(source, partial)
    if hash_file(partial) != checksum:
        raise CacheCorruptError(f"{partial}: has another checksum than {source}; one of the disks is at fault.")


def _measure(
    shard: Shard, layout: ShardLayout, rows: np.ndarray, commit: ShardCommit
) -> tuple[ShardLayout, dict[str, Any]]:
    """The layout and the statistics of some sequences of a shard."""
    heads = shard.heads()
    sums = {name: int(heads[name][rows].sum()) for name in ("num_tokens", "num_documents", "num_targets")}
    part = dataclasses.replace(layout, num_sequences=len(rows), **sums)
    statistics = TargetStatistics(part)
    for columns in sequences_of_shard(shard, layout, rows):
        statistics.add_copy(decode(columns, layout, commit.file).targets, commit)
    return part, statistics.to_dict()


def _write(shard: Shard, rows: np.ndarray | None, partial: Path, layout: ShardLayout, container: Container) -> None:
    writer = container.create(partial, layout)
    try:
        for columns in sequences_of_shard(shard, layout, rows):
            writer.append(columns)
        writer.close()
    finally:
        writer.discard()


def _compare(shard: Shard, rows: np.ndarray | None, partial: Path, layout: ShardLayout, container: Container) -> None:
    """Raise CacheCorruptError unless the new file gives back every byte of what was to be copied."""
    copy = container.open(partial, layout)
    try:
        wanted = sequences_of_shard(shard, layout, rows)
        found = sequences_of_shard(copy, layout)
        for index, (ours, theirs) in enumerate(zip(wanted, found, strict=True)):
            for name in layout.columns():
                if ours[name].tobytes() != theirs[name].tobytes():
                    raise CacheCorruptError(
                        f"{partial}: column {name!r} of sequence {index} was read back with other values; "
                        "the disk or the container's library is at fault."
                    )
    finally:
        copy.close()
