"""A shard, or some of its sequences and their documents: what a cache or a view of one is made of, shard by shard.

Shape suffixes: S sequences, D documents.
"""

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from pipeline.cache.masking import Columns, mask_documents, renamed
from pipeline.cache.shard import StoredShard
from pipeline.errors import CacheCorruptError, CacheMismatchError
from pipeline.formats.containers import CONTAINERS, Shard
from pipeline.formats.layout import ShardLayout, checksum_of

BLOCK_TARGETS = 65_536
"""Targets that are held at a time."""
COUNTS = ("num_tokens", "num_documents", "num_targets")
NAMED_BY = ("key", "token_ids", "loss_mask", "document_lengths", *COUNTS)
"""Columns of which a sequence's key is made, and those that count their rows."""


@dataclass(frozen=True)
class Piece:
    """Sequences of one shard; can be pickled and sent to other processes."""

    shard: StoredShard
    rows: np.ndarray | None = None
    """int64 [S]: rising numbers of the sequences; None takes all."""
    documents: np.ndarray | None = None
    """bool [D], of all documents of these sequences: False where no label counts; None counts all."""
    keys: np.ndarray | None = None
    """uint8 [S, 16]: what the sequences' keys in the shard must be; None if nothing is known of them."""

    @property
    def is_whole(self) -> bool:
        """Whether it is the shard as it is."""
        return self.rows is None and self.documents is None

    def heads(self) -> Columns:
        """What every sequence has one of: key, num_tokens, num_documents, num_targets."""
        with closing(self.shard.open()) as shard:
            if self.documents is None:
                rows = slice(None) if self.rows is None else self.rows
                heads = {name: np.array(values[rows]) for name, values in shard.heads().items()}
                self._require_keys(heads["key"], 0)
                return heads
            found = [renamed(own) | {"num_targets": own["num_targets"]} for own in self.sequences(shard, NAMED_BY)]
        return {name: np.concatenate([own[name] for own in found]) for name in ("key", *COUNTS)}

    def some(self, kept_S: np.ndarray, num_documents_S: np.ndarray) -> "Piece":
        """Those of its sequences that are kept; `num_documents_S` is that of all its sequences."""
        if kept_S.all():
            return self
        rows = np.arange(len(kept_S)) if self.rows is None else self.rows
        documents = None if self.documents is None else self.documents[np.repeat(kept_S, num_documents_S)]
        return Piece(self.shard, rows[kept_S], documents, None if self.keys is None else self.keys[kept_S])

    def sequences(self, shard: Shard, names: Collection[str] | None = None) -> Iterator[Columns]:
        """The stored columns of every sequence, or those of `names`, in order; a block of them is held at a time."""
        for columns in self.blocks(shard, names):
            for own in split(columns, self.shard.layout):
                yield own if self.documents is None or names is not None else renamed(own)

    def blocks(self, shard: Shard, names: Collection[str] | None = None) -> Iterator[Columns]:
        """The stored columns of consecutive sequences together, about BLOCK_TARGETS targets of the shard at a time.

        Of `names` alone, if given, with `key` and what counts their rows among them; raises CacheCorruptError if a byte
        of those has changed. Keys and checksums are those of whole sequences.
        """
        sequences = documents = 0
        for first, last, inside in _blocks(len(shard), self.shard.layout, self.rows):
            columns = self._read(shard, first, last, names)
            if len(inside) < last - first:
                columns = _take(columns, inside - first, self.shard.layout)
            self._require_keys(columns["key"], sequences)
            sequences += len(inside)
            if self.documents is not None:
                count = int(columns["num_documents"].sum())
                kept = self.documents[documents : documents + count]
                columns = mask_documents(columns, kept, self.shard.layout)
                documents += count
            yield columns

    def _require_keys(self, found: np.ndarray, start: int) -> None:
        """Raise CacheMismatchError if these are not the keys from `start` on."""
        if self.keys is not None and not np.array_equal(found, self.keys[start : start + len(found)]):
            raise CacheMismatchError(f"{self.shard.place}: sequences are not those that were selected; select again.")

    def _read(self, shard: Shard, first: int, last: int, names: Collection[str] | None) -> Columns:
        if names is None:
            return shard.columns(first, last)
        if CONTAINERS[self.shard.container].checks_columns:
            return shard.columns(first, last, names)
        columns = shard.columns(first, last)
        for row, own in enumerate(split(columns, self.shard.layout), start=first):
            if checksum_of(own) != own["checksum"][0]:
                raise CacheCorruptError(
                    f"{self.shard.where(row)}: the sequence does not match its checksum; the shard is damaged."
                )
        return {name: columns[name] for name in names}


def sequences_of_shard(shard: Shard, layout: ShardLayout) -> Iterator[Columns]:
    """The stored columns of every sequence of a shard, in order; a block of them is held at a time."""
    for first, last, _ in _blocks(len(shard), layout, None):
        yield from split(shard.columns(first, last), layout)


def _blocks(count: int, layout: ShardLayout, rows: np.ndarray | None) -> Iterator[tuple[int, int, np.ndarray]]:
    """First and last (exclusive) sequence of every block, and those of `rows` that are in it, if there are any."""
    step = max(1, BLOCK_TARGETS * count // max(layout.counts.num_targets, 1))
    wanted = np.arange(count) if rows is None else rows
    for start in range(0, count, step):
        inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + step)]
        if len(inside):
            yield int(inside[0]), int(inside[-1]) + 1, inside


def split(columns: Columns, layout: ShardLayout) -> Iterator[Columns]:
    """The columns of each of several sequences."""
    counted_by = layout.ragged()
    counts = set(counted_by.values()) & columns.keys()
    ends = {name: np.concatenate([[0], np.cumsum(columns[name])]) for name in counts}
    for row in range(len(columns["num_tokens"])):
        bounds = {counted: slice(offsets[row], offsets[row + 1]) for counted, offsets in ends.items()}
        own = slice(row, row + 1)
        yield {
            name: values[bounds[counted_by[name]] if name in counted_by else own] for name, values in columns.items()
        }


def _take(columns: Columns, rows: np.ndarray, layout: ShardLayout) -> Columns:
    """The columns of some of several sequences."""
    is_taken = np.zeros(len(columns["num_tokens"]), bool)
    is_taken[rows] = True
    counted_by = layout.ragged()
    taken = {name: np.repeat(is_taken, columns[name]) for name in set(counted_by.values()) & columns.keys()}
    return {
        name: values[taken[counted_by[name]] if name in counted_by else is_taken] for name, values in columns.items()
    }
