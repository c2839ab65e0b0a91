"""Copying cached sequences into new shards as they are stored: nothing is rounded again.

A copy is read back and compared with its source before it is committed.
"""

import dataclasses
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.cache.folder import CacheFolder
from pipeline.cache.pieces import COUNTS, Piece, sequences_of_shard
from pipeline.cache.sequence import StoredSequence
from pipeline.cache.statistics import TargetStatistics, measured
from pipeline.errors import CacheCorruptError
from pipeline.files import hash_file
from pipeline.formats.containers import CONTAINERS, Container, Shard
from pipeline.formats.layout import ShardCounts, ShardLayout


def copy_piece(piece: Piece, into: CacheFolder, partition: int) -> None:
    """Commit a copy of a shard, or of some of it, as `partition` of another cache, unless another was faster."""
    source, container = piece.shard, CONTAINERS[into.manifest.container]
    original, counts, statistics = source.file(), source.layout.counts, source.commit.statistics
    with into.new_shard(partition) as partial:
        if piece.is_whole and source.container == into.manifest.container:
            _copy_file(original, partial, source.commit.xxh3_128)
        else:
            with closing(source.open()) as shard:
                if not piece.is_whole:
                    counts, statistics = _measure(shard, piece)
                layout = dataclasses.replace(source.layout, counts=counts)
                _write(shard, piece, partial, layout, container)
                _compare(shard, piece, partial, layout, container)
        into.commit(partition, partial, counts, statistics)


def _copy_file(source: Path, partial: Path, checksum: str) -> None:
    shutil.copyfile(source, partial)
    if hash_file(partial) != checksum:
        raise CacheCorruptError(f"{partial}: has another checksum than {source}; one of the disks is at fault.")


def _measure(shard: Shard, piece: Piece) -> tuple[ShardCounts, dict[str, Any]]:
    """How much a piece is, and its statistics."""
    source, heads = piece.shard, piece.heads()
    counts = ShardCounts(num_sequences=len(heads["key"]), **{name: int(heads[name].sum()) for name in COUNTS})
    layout = ShardLayout(counts=counts, spec=source.spec)
    statistics = TargetStatistics(layout)
    rows = range(len(shard)) if piece.rows is None else piece.rows
    for row, columns in zip(rows, piece.sequences(shard)):
        targets = source.decode(columns, row).targets
        (added,) = measured([StoredSequence(columns=columns, targets=targets, source=source.commit)], layout)
        statistics.add(added)
    return counts, statistics.to_dict()


def _write(shard: Shard, piece: Piece, partial: Path, layout: ShardLayout, container: Container) -> None:
    writer = container.create(partial, layout)
    try:
        for columns in piece.sequences(shard):
            writer.append(columns)
        writer.close()
    finally:
        writer.discard()


def _compare(shard: Shard, piece: Piece, partial: Path, layout: ShardLayout, container: Container) -> None:
    """Raise CacheCorruptError unless the new file gives back every byte of what was to be copied."""
    copy = container.open(partial, layout)
    try:
        wanted = piece.sequences(shard)
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
