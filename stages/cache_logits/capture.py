"""Corpus rows through the engine to committed shards.

The engine runs in the caller's thread and is never drained between partitions. A second thread encodes (or
copies what an earlier cache knows), writes and commits; the queue between them is bounded, and an error on either
side stops the other and reaches the caller. The second may have others that share its work: a few sequences at a
time, and of a shard whose last sequence is there what its container divides. What comes of it is put together in
order, so that a shard has the same bytes however many they are.
"""

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.cache.commits import ShardCommit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.statistics import SequenceStatistics, TargetStatistics, measured
from pipeline.corpus import Corpus, TokenSequence
from pipeline.errors import CorpusError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts, ShardLayout
from pipeline.handover import Handover
from pipeline.lifecycle.reuse import KnownTargets
from pipeline.parallel import Threads
from pipeline.targets import SparseTargets
from stages.cache_logits.engine import Engine
from stages.cache_logits.scoring import Row, row_of, score_rows, store_rows

QUEUE_SEQUENCES = 256
"""Finished sequences that may wait for the writer."""
GROUP_TARGETS = 4096
"""Targets that are encoded together, by one thread: long calls of numpy, whose arrays (1 MB at K = 64) fit a cache."""

_OnCommit = Callable[[int, ShardCommit | None], None]


def _raise(partition: int, error: CorpusError) -> None:
    raise error


def capture(
    engine: Engine,
    corpus: Corpus,
    cache: CacheFolder,
    partitions: Iterable[int],
    known: KnownTargets | None = None,
    *,
    encoding_threads: int = 1,
    on_sequence: Callable[[TokenSequence, SparseTargets | None], None] = lambda sequence, targets: None,
    on_commit: _OnCommit = lambda partition, commit: None,
    on_unreadable: Callable[[int, CorpusError], None] = _raise,
) -> None:
    """Score the partitions and commit each as soon as its last sequence is there; what is `known` is copied.

    A partition is drawn from `partitions` when the engine has room for it, not before. `on_sequence` gets no targets of
    a sequence that was known. `on_commit` is called in the writer's thread once a partition is committed, with None if
    another process was faster; `on_unreadable` gets a partition whose rows cannot be read, and the rest goes on.
    """
    with Threads(encoding_threads) as threads, _Writer(cache, on_commit, threads) as writer:

        def rows() -> Iterator[Row]:
            for partition in partitions:
                try:
                    sequences = _read_rows(corpus, *cache.manifest.partitions[partition : partition + 2])
                except CorpusError as error:
                    on_unreadable(partition, error)
                    continue
                writer.begin(partition, cache.manifest.layout(ShardCounts.of(sequences)))
                for sequence in sequences:
                    yield row_of(sequence, known)

        def hand_over(row: Row) -> None:
            writer.put(row)
            on_sequence(row.sequence, row.scored())

        score_rows(engine, rows(), hand_over)


def _read_rows(corpus: Corpus, start: int, stop: int) -> list[TokenSequence]:
    sequences = list(corpus.rows(start, stop))
    for sequence in sequences:
        if not len(sequence.target_positions):
            raise CorpusError(f"{corpus.folder}: sequence {sequence.key.hex()} has no target; prepare it again.")
    return sequences


class _Writer:
    """Stores rows and commits shards in a thread of its own, in the order in which the shards were begun."""

    def __init__(self, cache: CacheFolder, on_commit: _OnCommit, threads: Threads) -> None:
        self._cache, self._on_commit, self._threads = cache, on_commit, threads
        self._rows: Handover[Row] = Handover(QUEUE_SEQUENCES)
        self._layouts: deque[tuple[int, ShardLayout]] = deque()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, exc_type: type | None, exc: BaseException | None, traceback: Any) -> None:
        self._rows.end()  # after what is queued: shards that are whole are committed, whatever has happened
        self._thread.join()
        if exc_type is None and self._failure is not None:
            raise self._failure

    def begin(self, partition: int, layout: ShardLayout) -> None:
        """Announce the next shard."""
        self._layouts.append((partition, layout))

    def put(self, row: Row) -> None:
        """Hand over the next row; raises what the thread has met."""
        if not self._rows.put(row) and self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        rows = iter(self._rows)
        try:
            for first in rows:
                partition, layout = self._layouts.popleft()
                rest = itertools.islice(rows, layout.counts.num_sequences - 1)
                self._write_shard(partition, layout, itertools.chain([first], rest))
        except BaseException as exc:
            self._failure = exc
        finally:
            self._rows.stop()

    def _write_shard(self, partition: int, layout: ShardLayout, rows: Iterator[Row]) -> None:
        """Write and commit a shard, unless its rows end before they are all there."""
        container, statistics, num_written = CONTAINERS[self._cache.manifest.container], TargetStatistics(layout), 0
        with self._cache.new_shard(partition) as path:
            writer = container.create(path, layout)
            try:
                for sequences in self._threads.map(functools.partial(encoded, layout), groups(rows)):
                    for columns, added in sequences:
                        statistics.add(added)
                        writer.append(columns)
                        num_written += 1
                if num_written < layout.counts.num_sequences:
                    return
                writer.close(self._threads)
            finally:
                writer.discard()
            commit = self._cache.commit(partition, path, layout.counts, statistics.to_dict())
        self._on_commit(partition, commit)


def groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in groups of GROUP_TARGETS targets or a row more."""
    group: list[Row] = []
    num_targets = 0
    for row in rows:
        group.append(row)
        num_targets += len(row.sequence.target_positions)
        if num_targets >= GROUP_TARGETS:
            yield group
            group, num_targets = [], 0
    if group:
        yield group


def encoded(layout: ShardLayout, rows: Sequence[Row]) -> list[tuple[dict[str, np.ndarray], SequenceStatistics]]:
    """The stored columns of every row, and what they add to the statistics of their shard."""
    sequences = store_rows(rows, layout)
    return [(stored.columns, added) for stored, added in zip(sequences, measured(sequences, layout))]
