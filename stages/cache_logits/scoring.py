"""Whole sequences through an engine: one request a document, one answer a sequence, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np

from pipeline.cache.sequence import StoredSequence
from pipeline.corpus import TokenSequence
from pipeline.errors import EngineError
from pipeline.formats.layout import ShardLayout
from pipeline.lifecycle.reuse import KnownTargets
from pipeline.targets import SparseTargets, concatenate, improper, kept
from stages.cache_logits.engine import Engine, Request


class Row(Protocol):
    """A sequence on its way into a shard."""

    @property
    def sequence(self) -> TokenSequence:
        """The sequence."""

    def requests(self) -> Iterator[Request]:
        """What an engine has to score of it; the key of a request is this row and the document's place in it."""

    def answer(self, document: int, targets: SparseTargets) -> None:
        """Take the targets of a document."""

    def is_whole(self) -> bool:
        """Whether every document is answered."""

    def scored(self) -> SparseTargets | None:
        """The targets of the whole sequence, once it is whole, all top k of each; None if no engine was asked."""

    def stored(self) -> StoredSequence | None:
        """The sequence as an earlier cache has it; None if an engine was asked."""


AnyRow = TypeVar("AnyRow", bound=Row)


class ScoredRow:
    """A sequence in flight: its documents come back one by one."""

    def __init__(self, sequence: TokenSequence) -> None:
        self.sequence = sequence
        self._documents: list[SparseTargets | None] = []
        self._num_open = 0
        self._targets: SparseTargets | None = None

    def requests(self) -> Iterator[Request]:
        """One request a document that has targets."""
        documents = list(documents_of(self.sequence))
        self._documents, self._num_open = [None] * len(documents), len(documents)
        for index, document in enumerate(documents):
            yield Request((self, index), *document)

    def answer(self, document: int, targets: SparseTargets) -> None:
        """Take the targets of a document; raises EngineError, which names the sequence, if they are no numbers."""
        problem = improper(targets)
        if problem:
            raise EngineError(
                f"sequence {self.sequence.key.hex()}, document {document + 1}: the teacher's targets are not finite: "
                f"{problem}; a body in float16 overflows where bfloat16 or float32 (--dtype) does not, and a damaged "
                "checkpoint does everywhere."
            )
        self._documents[document] = targets
        self._num_open -= 1

    def is_whole(self) -> bool:
        """Whether every document is answered."""
        return self._num_open == 0

    def scored(self) -> SparseTargets:
        """The targets of the whole sequence."""
        if self._targets is None:
            self._targets = concatenate([part for part in self._documents if part is not None])
        return self._targets

    def stored(self) -> None:
        """None: an engine was asked."""


@dataclass(frozen=True, eq=False)
class KnownRow:
    """A sequence whose targets an earlier cache holds."""

    sequence: TokenSequence
    known: KnownTargets
    place: int

    def requests(self) -> Iterator[Request]:
        """None."""
        yield from ()

    def answer(self, document: int, targets: SparseTargets) -> None:
        """Never called."""
        raise AssertionError("nothing was asked of this sequence")

    def is_whole(self) -> bool:
        """It is."""
        return True

    def scored(self) -> None:
        """None: no engine was asked."""

    def stored(self) -> StoredSequence:
        """The sequence as the earlier cache has it; raises CacheCorruptError."""
        return self.known.load(self.place, self.sequence.key)


def store_rows(rows: Sequence[Row], layout: ShardLayout) -> list[StoredSequence]:
    """The rows as a shard keeps them: encoded, or as an earlier cache has them."""
    scored = ((row.sequence, row.scored()) for row in rows)
    captured = [(sequence, kept(targets, layout.spec)) for sequence, targets in scored if targets is not None]
    encoded = iter(StoredSequence.encoded(captured, layout) if captured else ())
    return [next(encoded) if (stored := row.stored()) is None else stored for row in rows]


def row_of(sequence: TokenSequence, known: KnownTargets | None) -> Row:
    """The row of a sequence, which is scored unless an earlier cache knows it."""
    place = known.find_one(sequence.key) if known is not None else None
    return ScoredRow(sequence) if known is None or place is None else KnownRow(sequence, known, place)


def score_rows(engine: Engine, rows: Iterable[AnyRow], on_whole: Callable[[AnyRow], None]) -> None:
    """Every row to `on_whole` as soon as it and those before it are whole.

    Rows are drawn when the engine has room for their requests, and not before.
    """
    pending: deque[AnyRow] = deque()

    def hand_over() -> None:
        while pending and pending[0].is_whole():
            on_whole(pending.popleft())

    def requests() -> Iterator[Request]:
        for row in rows:
            pending.append(row)
            yield from row.requests()
            hand_over()  # of a known row nothing was asked

    for key, targets in engine.score(requests()):
        row, document = cast(tuple[Row, int], key)  # as `Row.requests` has made it
        row.answer(document, targets)
        hand_over()
    if pending:
        raise RuntimeError(f"the engine ended with {len(pending)} sequences unanswered")


def documents_of(sequence: TokenSequence) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
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
