"""The worker's loop: corpus rows through the engine to committed shards.

The engine runs in the caller's thread and is never drained between partitions. A second thread
encodes, writes and commits; the queue between them is bounded, and an error on either side stops
the other and reaches the caller.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.corpus import Corpus, TokenSequence
from pipeline.errors import CorpusError
from pipeline.manifest import CacheManifest
from pipeline.runs.commits import ShardCommit, commit_shard, partial_shard_path
from pipeline.shards.containers import CONTAINERS, ShardWriter
from pipeline.shards.layout import ShardLayout, encode, targets_of
from pipeline.targets import SparseTargets, concatenate, reconstruction_errors
from stages.cache_logits.engine import Engine, Request

QUEUE_SEQUENCES = 256
"""Finished sequences that may wait for the writer."""


@dataclass(eq=False)
class _Row:
    """A sequence in flight: its documents come back one by one."""

    sequence: TokenSequence
    documents: list[SparseTargets | None] = field(default_factory=list)

    def targets(self) -> SparseTargets | None:
        """The targets of the whole sequence once every document is there."""
        parts = [part for part in self.documents if part is not None]
        return concatenate(parts) if len(parts) == len(self.documents) else None


def capture(
    engine: Engine,
    corpus: Corpus,
    manifest: CacheManifest,
    folder: Path,
    partitions: Iterable[int],
    on_sequence: Callable[[TokenSequence, SparseTargets], None] = lambda sequence, targets: None,
    on_commit: Callable[[ShardCommit], None] = lambda commit: None,
) -> None:
    """Score the partitions and commit each as soon as its last sequence is there.

    `on_commit` is called in the writer's thread, with what this process has committed.
    """
    rows: deque[_Row] = deque()
    with _Writer(folder, manifest, on_commit) as writer:
        for (row, document), targets in engine.score(_requests(corpus, manifest, partitions, rows, writer)):
            row.documents[document] = targets
            while rows and (whole := rows[0].targets()) is not None:
                done = rows.popleft()
                writer.put(done.sequence, whole)
                on_sequence(done.sequence, whole)
        if rows:
            raise RuntimeError(f"the engine ended with {len(rows)} sequences unanswered")


def _requests(
    corpus: Corpus, manifest: CacheManifest, partitions: Iterable[int], rows: deque[_Row], writer: "_Writer"
) -> Iterator[Request]:
    """One request a document that has targets; registers rows and announces shards on the way."""
    for partition in partitions:
        start, stop = manifest.partitions[partition], manifest.partitions[partition + 1]
        sequences = list(corpus.rows(start, stop))
        writer.begin(partition, _layout(manifest, sequences))
        for sequence in sequences:
            row = _Row(sequence)
            documents = list(_documents(sequence))
            if not documents:
                raise CorpusError(f"{corpus.folder}: sequence {sequence.key.hex()} has no target; prepare it again.")
            row.documents = [None] * len(documents)
            rows.append(row)
            for index, document in enumerate(documents):
                yield Request((row, index), *document)


def _layout(manifest: CacheManifest, sequences: Sequence[TokenSequence]) -> ShardLayout:
    return manifest.layout(
        num_sequences=len(sequences),
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
        num_documents=sum(len(sequence.document_lengths) for sequence in sequences),
        num_targets=sum(len(sequence.target_positions) for sequence in sequences),
    )


def _documents(sequence: TokenSequence) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ids, target positions and their uniforms of every document of a sequence that has targets."""
    # Seeded by the content: a rerun, another batch or order makes the same draws (on as many ranks).
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(sequence.key, "little")))
    uniforms = generator.random(len(sequence.target_positions), dtype=np.float32)
    ends = np.cumsum(sequence.document_lengths)
    for start, end in zip(ends - sequence.document_lengths, ends):
        first, last = np.searchsorted(sequence.target_positions, (start, end))
        positions = sequence.target_positions[first:last] - np.int32(start)
        assert not len(positions) or positions[-1] < end - start - 1, "a label is the first token of a document"
        if len(positions):
            yield sequence.token_ids[start:end], positions, uniforms[first:last]


class _Writer:
    """Encodes and commits shards in a thread of its own, in the order in which they were begun."""

    def __init__(self, folder: Path, manifest: CacheManifest, on_commit: Callable[[ShardCommit], None]) -> None:
        self._folder, self._manifest, self._on_commit = folder, manifest, on_commit
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=QUEUE_SEQUENCES)
        self._layouts: deque[tuple[int, ShardLayout]] = deque()
        self._failure: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, exc_type: type | None, exc: BaseException | None, traceback: Any) -> None:
        if exc_type is not None:
            self._stopped.set()
        self._offer(None)
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
        if item is None or self._stopped.is_set():
            return False
        partition, layout = self._layouts.popleft()
        container = CONTAINERS[self._manifest.container]
        path = partial_shard_path(self._folder, partition, container.suffix)
        try:
            writer = container.create(path, layout)
            try:
                statistics = self._fill(writer, layout, item)
            finally:
                writer.discard()
            if statistics is None:
                return False
            commit = commit_shard(self._folder, partition, path, layout, statistics.to_dict())
            if commit is not None:
                self._on_commit(commit)
        finally:
            path.unlink(missing_ok=True)
        return True

    def _fill(self, writer: ShardWriter, layout: ShardLayout, item: Any) -> "_Statistics | None":
        """Write `item` and the rest of its shard's sequences; None if there are no more."""
        statistics = _Statistics(self._manifest.temperatures, self._manifest.max_kl_error)
        for remaining in reversed(range(layout.num_sequences)):
            sequence, targets = item
            columns = encode(layout, sequence, targets)
            statistics.add(targets, targets_of(columns, layout))
            writer.append(columns)
            item = self._queue.get() if remaining else None
            if remaining and (item is None or self._stopped.is_set()):
                return None
        writer.close()
        return statistics


class _Statistics:
    """Sums over the targets of a shard, for its commit record."""

    def __init__(self, temperatures: tuple[float, ...], max_kl_error: float) -> None:
        self._started = time.time()
        self._temperatures, self._max_kl_error = temperatures, max_kl_error
        self._sums = np.zeros((4, len(temperatures)))
        self._largest = np.zeros(len(temperatures))
        self._num_targets = 0

    def add(self, targets: SparseTargets, stored: SparseTargets) -> None:
        """Count the targets of one sequence, and what their stored form has lost."""
        kl, errors = reconstruction_errors(targets, stored)
        for index, temperature in enumerate(self._temperatures):
            values = (targets.entropy(temperature), targets.tail_mass(temperature), targets.label_logprobs(temperature))
            self._sums[:, index] += [value.sum(dtype=np.float64) for value in (*values, kl[:, index])]
        self._largest = np.maximum(self._largest, errors.max(axis=0, initial=0))
        self._num_targets += len(targets)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: sums and means a temperature, seconds from the first sequence to the last.

        Raises RuntimeError if the stored targets break the cache's promise.
        """
        names = ("sum_entropy", "sum_tail_mass", "sum_label_logprob")
        kl = self._sums[3] / max(1, self._num_targets)
        if (kl > self._max_kl_error * 1.001 + 1e-9).any():
            raise RuntimeError(
                f"rounding cost {kl.tolist()} nats; the bound is {self._max_kl_error}: a bug of the codec"
            )
        sums = dict(zip(names, self._sums[:3].tolist())) | {"mean_kl_error": kl.tolist()}
        sums["max_probability_error"] = self._largest.tolist()
        return sums | {"seconds": round(time.time() - self._started, 3)}
