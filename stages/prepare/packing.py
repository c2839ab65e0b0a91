"""From documents to rows of at most `sequence_length` tokens.

A row's first token has nothing before it and is never a label; nor is the first of an isolated piece.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

import numpy as np

from pipeline.corpus import TokenSequence
from stages.prepare.tokens import Document

WINDOW_ROWS = 256
"""Rows' worth of short pieces that are packed together: bounds memory and how far a document moves."""


class Packer(ABC):
    """Takes documents in order and gives rows; `counts` says what was cut (if isolated) and dropped."""

    def __init__(self, sequence_length: int) -> None:
        self.counts: Counter[str] = Counter(cut_documents=0, dropped_pieces=0, dropped_tokens=0)
        self._length = sequence_length

    @abstractmethod
    def add(self, document: Document) -> Iterator[TokenSequence]:
        """The rows that `document` completes."""

    def flush(self) -> Iterator[TokenSequence]:
        """The rows that are left at the end."""
        return iter(())

    def _pieces(self, document: Document) -> Iterator[Document]:
        """The pieces of an isolated document that hold a label."""
        sizes = piece_lengths(len(document.token_ids), self._length)
        self.counts["cut_documents"] += len(sizes) > 1
        start = 0
        for size in sizes:
            loss_mask = _without_first(document.loss_mask[start : start + size])
            if self._is_useful(loss_mask):
                yield Document(document.token_ids[start : start + size], loss_mask)
            start += size

    def _is_useful(self, loss_mask: np.ndarray) -> bool:
        if loss_mask.any():
            return True
        self.counts["dropped_pieces"] += 1
        self.counts["dropped_tokens"] += len(loss_mask)
        return False


class SinglePacker(Packer):
    """One piece of a document a row."""

    def add(self, document: Document) -> Iterator[TokenSequence]:
        """The document's pieces."""
        return (_row([piece]) for piece in self._pieces(document))


class IsolatedPacker(Packer):
    """Short pieces share rows, the longest first, each where it leaves the least room."""

    def __init__(self, sequence_length: int) -> None:
        super().__init__(sequence_length)
        self._window: list[Document] = []
        self._window_tokens = 0

    def add(self, document: Document) -> Iterator[TokenSequence]:
        """Full pieces at once; all rows of the window when it is full."""
        for piece in self._pieces(document):
            if len(piece.token_ids) == self._length:
                yield _row([piece])
                continue
            self._window.append(piece)
            self._window_tokens += len(piece.token_ids)
            if self._window_tokens >= WINDOW_ROWS * self._length:
                yield from self.flush()

    def flush(self) -> Iterator[TokenSequence]:
        """The rows of the window."""
        window, self._window, self._window_tokens = self._window, [], 0
        lengths = np.array([len(piece.token_ids) for piece in window], np.int64)
        return (_row([window[index] for index in row]) for row in best_fit(lengths, self._length))


class CrossingPacker(Packer):
    """Documents end to end, cut at exactly `sequence_length`; attention crosses their borders."""

    def __init__(self, sequence_length: int) -> None:
        super().__init__(sequence_length)
        self._pending: list[Document] = []
        self._pending_tokens = 0

    def add(self, document: Document) -> Iterator[TokenSequence]:
        """All rows that are full."""
        self._pending.append(document)
        self._pending_tokens += len(document.token_ids)
        if self._pending_tokens >= self._length:
            yield from self._cut(self._pending_tokens - self._pending_tokens % self._length)

    def flush(self) -> Iterator[TokenSequence]:
        """The last row, which may be shorter."""
        return self._cut(self._pending_tokens)

    def _cut(self, stop: int) -> Iterator[TokenSequence]:
        if not self._pending:
            return
        token_ids = np.concatenate([document.token_ids for document in self._pending])
        labels = np.concatenate([document.loss_mask for document in self._pending])
        self._pending = [Document(token_ids[stop:], labels[stop:])] if stop < len(token_ids) else []
        self._pending_tokens = len(token_ids) - stop
        for start in range(0, stop, self._length):
            loss_mask = _without_first(labels[start : min(start + self._length, stop)])
            if self._is_useful(loss_mask):
                yield _row([Document(token_ids[start : start + len(loss_mask)], loss_mask)])


def piece_lengths(num_tokens: int, longest: int) -> list[int]:
    """Lengths of at most `longest` that add up to `num_tokens`; the last is not 1 if that can be helped."""
    full, rest = divmod(num_tokens, longest)
    lengths = [longest] * full + [rest] * (rest > 0)
    if full and rest == 1 and longest > 2:
        lengths[-2:] = [longest - 1, 2]
    return lengths


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of the pieces in each row by best-fit decreasing; rows and pieces in input order."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist()):
        place = bisect_left(room, (length, 0))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left - length > 1:  # no piece has one token
            insort(room, (left - length, row))
    return sorted(sorted(row) for row in rows)


def _without_first(loss_mask: np.ndarray) -> np.ndarray:
    if not loss_mask[0]:
        return loss_mask
    loss_mask = loss_mask.copy()
    loss_mask[0] = False
    return loss_mask


def _row(pieces: list[Document]) -> TokenSequence:
    if len(pieces) == 1:
        token_ids, loss_mask = pieces[0].token_ids, pieces[0].loss_mask
    else:
        token_ids = np.concatenate([piece.token_ids for piece in pieces])
        loss_mask = np.concatenate([piece.loss_mask for piece in pieces])
    lengths = np.array([len(piece.token_ids) for piece in pieces], np.int32)
    return TokenSequence(token_ids=token_ids, loss_mask=loss_mask, document_lengths=lengths)
