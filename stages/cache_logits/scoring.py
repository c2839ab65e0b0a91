"""Whole sequences through an engine: one request a document, one answer a sequence."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.corpus import TokenSequence
from pipeline.errors import EngineError
from pipeline.lifecycle.reuse import KnownSequence
from pipeline.targets import SparseTargets, concatenate, improper
from stages.cache_logits.engine import Engine, Request


@dataclass(eq=False)
class Row:
    """A sequence in flight: its documents come back one by one."""

    sequence: TokenSequence
    documents: list[SparseTargets | None] = field(default_factory=list)

    def requests(self) -> Iterator[Request]:
        """One request a document that has targets, none of a known sequence; its key is this row and the document's
        place in it."""
        documents = [] if isinstance(self.sequence, KnownSequence) else list(documents_of(self.sequence))
        self.documents = [None] * len(documents)
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
        self.documents[document] = targets

    def targets(self) -> SparseTargets | None:
        """The targets of the whole sequence once every document is there; read from its cache if it is known."""
        if isinstance(self.sequence, KnownSequence):
            return self.sequence.load()
        parts = [part for part in self.documents if part is not None]
        return concatenate(parts) if len(parts) == len(self.documents) else None


def score_sequences(
    engine: Engine, sequences: Iterable[TokenSequence]
) -> Iterator[tuple[TokenSequence, SparseTargets]]:
    """Every sequence with its targets, in order."""
    rows: deque[Row] = deque()

    def requests() -> Iterator[Request]:
        for sequence in sequences:
            rows.append(Row(sequence))
            yield from rows[-1].requests()

    for (row, document), targets in engine.score(requests()):
        row.answer(document, targets)
        while rows and (whole := rows[0].targets()) is not None:
            yield rows.popleft().sequence, whole
    if rows:
        raise RuntimeError(f"the engine ended with {len(rows)} sequences unanswered")


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
