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

from pipeline.cache.folder import CacheFolder
from pipeline.cache.sequence import StoredSequence
from pipeline.cache.shard import StoredShard
from pipeline.cache.statistics import TargetStatistics, measured
from pipeline.errors import CacheCorruptError
from pipeline.files import hash_file
from pipeline.formats.containers import CONTAINERS, Container, Shard
from pipeline.formats.layout import ShardCounts, ShardLayout

BLOCK_TARGETS = 65_536
"""Targets that are held at a time."""

Columns = dict[str, np.ndarray]


def copy_shard(source: StoredShard, into: CacheFolder, partition: int, rows: np.ndarray | None = None) -> None:
    """Commit a copy of a shard as `partition` of another cache, unless another process was faster.

    With `rows`, rising numbers of the shard's sequences, those alone are copied.
    """
    original, container = source.file(), CONTAINERS[into.manifest.container]
    counts, statistics = source.layout.counts, source.commit.statistics
    with into.new_shard(partition) as partial:
        if rows is None and source.container == into.manifest.container:
            _copy_file(original, partial, source.commit.xxh3_128)
        else:
            with closing(source.open()) as shard:
                if rows is not None:
                    counts, statistics = _measure(shard, source, rows)
                layout = dataclasses.replace(source.layout, counts=counts)
                _write(shard, rows, partial, layout, container)
                _compare(shard, rows, partial, layout, container)
        into.commit(partition, partial, counts, statistics)


def sequences_of_shard(shard: Shard, layout: ShardLayout, rows: np.ndarray | None = None) -> Iterator[Columns]:
    """The stored columns of every sequence of a shard, or of `rows`, in order; a block of them is held at a time."""
    step = max(1, BLOCK_TARGETS * len(shard) // max(layout.counts.num_targets, 1))
    wanted = np.arange(len(shard)) if rows is None else rows
    for start in range(0, len(shard), step):
        inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + step)]
        if len(inside):
            first, last = int(inside[0]), int(inside[-1]) + 1
            yield from _split(shard.columns(first, last), inside - first, layout.ragged())


def _split(columns: Columns, rows: np.ndarray, ragged: dict[str, str]) -> Iterator[Columns]:
    counts = set(ragged.values())
    offsets = {name: np.concatenate([[0], np.cumsum(columns[name])]) for name in counts}
    for row in rows:
        bounds = {counted: slice(offsets[counted][row], offsets[counted][row + 1]) for counted in counts}
        own = slice(row, row + 1)
        yield {name: values[bounds[ragged[name]] if name in ragged else own] for name, values in columns.items()}


def _copy_file(source: Path, partial: Path, checksum: str) -> None:
    shutil.copyfile(source, partial)
    if hash_file(partial) != checksum:
        raise CacheCorruptError(f"{partial}: has another checksum than {source}; one of the disks is at fault.")


def _measure(shard: Shard, source: StoredShard, rows: np.ndarray) -> tuple[ShardCounts, dict[str, Any]]:
    """How much some sequences of a shard are, and their statistics."""
    heads = shard.heads()
    sums = {name: int(heads[name][rows].sum()) for name in ("num_tokens", "num_documents", "num_targets")}
    counts = ShardCounts(num_sequences=len(rows), **sums)
    layout = ShardLayout(counts=counts, spec=source.spec)
    statistics = TargetStatistics(layout)
    for row, columns in zip(rows, sequences_of_shard(shard, source.layout, rows)):
        targets = source.decode(columns, row).targets
        (added,) = measured([StoredSequence(columns=columns, targets=targets, source=source.commit)], layout)
        statistics.add(added)
    return counts, statistics.to_dict()


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
