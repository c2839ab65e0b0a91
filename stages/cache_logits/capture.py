"""The worker's loop: corpus rows through the engine to committed shards.

The engine runs in the caller's thread and is never drained between partitions. A second thread
encodes, writes and commits; the queue between them is bounded, and an error on either side stops
the other and reaches the caller.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pipeline.cache.commits import ShardCommit, commit_shard, partial_shard_path
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.statistics import TargetStatistics
from pipeline.corpus import Corpus, TokenSequence
from pipeline.errors import CorpusError
from pipeline.files import naming
from pipeline.formats.containers import CONTAINERS, ShardWriter
from pipeline.formats.layout import ShardLayout, encode, targets_of
from pipeline.lifecycle.reuse import CopiedTargets
from pipeline.stores.objects import Location
from pipeline.targets import SparseTargets
from stages.cache_logits.engine import Engine, Request
from stages.cache_logits.scoring import Row

QUEUE_SEQUENCES = 256
"""Finished sequences that may wait for the writer."""

_OnCommit = Callable[[int, ShardCommit | None], None]


def _raise(partition: int, error: CorpusError) -> None:
    raise error


def capture(
    engine: Engine,
    corpus: Corpus,
    manifest: CacheManifest,
    folder: Location,
    partitions: Iterable[int],
    on_sequence: Callable[[TokenSequence, SparseTargets], None] = lambda sequence, targets: None,
    on_commit: _OnCommit = lambda partition, commit: None,
    on_unreadable: Callable[[int, CorpusError], None] = _raise,
) -> None:
    """Score the partitions and commit each as soon as its last sequence is there.

    A partition is drawn from `partitions` when the engine has room for it, not before. `on_commit` is
    called in the writer's thread once a partition is committed, with None if another process was
    faster; `on_unreadable` gets a partition whose rows cannot be read, and the rest goes on.
    """
    rows: deque[Row] = deque()
    with _Writer(folder, manifest, on_commit) as writer:

        def hand_over() -> None:
            """Give the writer the sequences at the front that are whole."""
            while rows and (whole := rows[0].targets()) is not None:
                done = rows.popleft()
                writer.put(done.sequence, whole)
                on_sequence(done.sequence, whole)

        requests = _requests(corpus, manifest, partitions, rows, writer, hand_over, on_unreadable)
        for (row, document), targets in engine.score(requests):
            row.answer(document, targets)
            hand_over()
        if rows:
            raise RuntimeError(f"the engine ended with {len(rows)} sequences unanswered")


def _requests(
    corpus: Corpus,
    manifest: CacheManifest,
    partitions: Iterable[int],
    rows: deque[Row],
    writer: "_Writer",
    hand_over: Callable[[], None],
    on_unreadable: Callable[[int, CorpusError], None],
) -> Iterator[Request]:
    """One request a document that has targets; registers rows and announces shards on the way."""
    for partition in partitions:
        try:
            sequences = _read_rows(corpus, manifest.partitions[partition], manifest.partitions[partition + 1])
        except CorpusError as error:
            on_unreadable(partition, error)
            continue
        writer.begin(partition, _layout(manifest, sequences))
        for sequence in sequences:
            rows.append(Row(sequence))
            yield from rows[-1].requests()
            hand_over()  # a known sequence is whole at once


def _read_rows(corpus: Corpus, start: int, stop: int) -> list[TokenSequence]:
    sequences = list(corpus.rows(start, stop))
    for sequence in sequences:
        if not len(sequence.target_positions):
            raise CorpusError(f"{corpus.folder}: sequence {sequence.key.hex()} has no target; prepare it again.")
    return sequences


def _layout(manifest: CacheManifest, sequences: Sequence[TokenSequence]) -> ShardLayout:
    return manifest.layout(
        num_sequences=len(sequences),
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
        num_documents=sum(len(sequence.document_lengths) for sequence in sequences),
        num_targets=sum(len(sequence.target_positions) for sequence in sequences),
    )


class _Writer:
    """Encodes and commits shards in a thread of its own, in the order in which they were begun."""

    def __init__(self, folder: Location, manifest: CacheManifest, on_commit: _OnCommit) -> None:
        self._folder, self._manifest, self._on_commit = folder, manifest, on_commit
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=QUEUE_SEQUENCES)
        self._layouts: deque[tuple[int, ShardLayout]] = deque()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, exc_type: type | None, exc: BaseException | None, traceback: Any) -> None:
        self._offer(None)  # after what is queued: shards that are whole are committed, whatever has happened
        self._thread.join()
        if exc_type is None and self._failure is not None:
            raise self._failure

    def begin(self, partition: int, layout: ShardLayout) -> None:
        """Announce the next shard."""
        self._layouts.append((partition, layout))

    def put(self, sequence: TokenSequence, targets: SparseTargets) -> None:
        """Hand over the next sequence; raises what the thread has met."""
        self._offer((sequence, targets))
        if self._failure is not None:
            raise self._failure

    def _offer(self, item: Any) -> None:
        while self._thread.is_alive():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            while self._write_shard():
                pass
        except BaseException as exc:
            self._failure = exc

    def _write_shard(self) -> bool:
        """Write one shard from the queue; False at the end."""
        item = self._queue.get()
        if item is None:
            return False
        partition, layout = self._layouts.popleft()
        container = CONTAINERS[self._manifest.container]
        path = partial_shard_path(self._folder, partition, container.suffix)
        try:
            with naming(path):
                writer = container.create(path, layout)
                try:
                    statistics = self._fill(writer, layout, item)
                finally:
                    writer.discard()
                if statistics is None:
                    return False
                commit = commit_shard(self._folder, partition, path, layout, statistics.to_dict())
            self._on_commit(partition, commit)
        finally:
            path.unlink(missing_ok=True)
        return True

    def _fill(self, writer: ShardWriter, layout: ShardLayout, item: Any) -> TargetStatistics | None:
        """Write `item` and the rest of its shard's sequences; None if there are no more."""
        statistics = TargetStatistics(layout)
        for remaining in reversed(range(layout.num_sequences)):
            sequence, targets = item
            if isinstance(targets, CopiedTargets):
                columns = targets.columns
                statistics.add_copy(targets, targets.source)
            else:
                columns = encode(layout, sequence, targets)
                statistics.add(targets, targets_of(columns, layout))
            writer.append(columns)
            item = self._queue.get() if remaining else None
            if remaining and item is None:
                return None
        writer.close()
        return statistics
