"""Ids as small numbers: what follows a token, and what comes with a most probable id, repeats itself.

Shape suffixes: N positions, K stored entries of a position.

A shard learns two kinds of tables from all of its ids: for a token, the ids that are stored where it
is the last token of the text ("previous"); for an id, the ids that are stored where it is the most
probable ("first"). Each lists its ids by falling count. A position uses the table of one kind, whichever
makes it smaller, and an id's code is its place in that table, or TABLE_SIZE plus its place among all ids
of the shard by falling count. The first id of a position always goes by the previous token.

Decoding is one look-up in one array, the same for every entry: no entry waits for another one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.formats.ragged import starts_of
from pipeline.parallel import ALONE, Threads

TABLE_SIZE = 1024
"""Longest table."""
MIN_COUNT = 3
"""How often an id must come up in a context to be in its table: each entry costs about 14 bits."""
MIN_POSITIONS = 12
"""How often a context must come up to have a table."""
PREVIOUS, FIRST = 0, 1
NO_PLACE = -1
"""Stands where a row has no entry."""
CACHED_ROWS = 1024
PIECE_ROWS = 8192
"""Positions that a thread takes at a time."""
CONTEXTS_AT_ONCE = 16
"""Contexts whose tables are looked up together; one by one they are a hundred calls of numpy for a thousand targets."""


@dataclass(frozen=True)
class Tables:
    """The tables of one kind, one after the other."""

    tokens: np.ndarray
    """int32 [tables], rising."""
    sizes: np.ndarray
    """int32 [tables]"""
    entries: np.ndarray
    """int32: places in the vocabulary, of all tables."""


@dataclass(frozen=True)
class ContextModel:
    """What a shard knows about its ids."""

    vocabulary: np.ndarray
    """int32: every id of the shard, by falling count, then by id."""
    tables: tuple[Tables, Tables]
    """The tables of the two contexts, PREVIOUS and FIRST."""

    @cached_property
    def _flat(self) -> np.ndarray:
        """int32: ids by code, as if there were no tables; then those of all tables. The first are not used."""
        unused = np.zeros(TABLE_SIZE, np.int32)
        return np.concatenate([unused, self.vocabulary, *(self.vocabulary[kind.entries] for kind in self.tables)])

    @cached_property
    def _starts(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [contexts] of each kind: where the table of a context begins in `_flat`; 0 if it has none."""
        begin = TABLE_SIZE + len(self.vocabulary)
        found: list[np.ndarray] = []
        for kind in self.tables:
            starts = np.zeros(int(kind.tokens.max(initial=-1)) + 2, np.int32)
            starts[kind.tokens] = begin + np.cumsum(kind.sizes) - kind.sizes
            found.append(starts)
            begin += len(kind.entries)
        first, second = found
        return first, second

    @cached_property
    def _places(self) -> np.ndarray:
        """int32: the place of every id in the vocabulary."""
        return _inverse(self.vocabulary)

    def encode(
        self, ids_NK: np.ndarray, previous_N: np.ndarray, is_entry_NK: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32 [N, K] codes, and uint8 [N] the kind of table that each position uses.

        Where `is_entry_NK` is False the ids repeat others of the row: their codes decide nothing.
        """
        places = self._places[ids_NK]
        codes, others = (self._codes(kind, places, context) for kind, context in enumerate((previous_N, ids_NK[:, 0])))
        kinds = np.zeros(len(ids_NK), np.uint8)
        for rows in row_blocks(len(ids_NK)):
            of_entries = True if is_entry_NK is None else is_entry_NK[rows, 1:]
            kinds[rows] = _cost(others[rows], of_entries) < _cost(codes[rows], of_entries)
        is_first = kinds == FIRST
        codes[is_first, 1:] = others[is_first, 1:]
        return codes, kinds

    def decode(self, codes_NK: np.ndarray, kinds_N: np.ndarray, previous_N: np.ndarray) -> np.ndarray:
        """int32 [N, K]: the ids; IndexError or ValueError if the codes are none of this model."""
        first, starts = self._tables_of(codes_NK[:, 0], kinds_N, previous_N)
        places = codes_NK + (codes_NK < TABLE_SIZE) * starts[:, None]  # np.where takes ten times as long
        places[:, 0] = first
        return self._flat.take(places)

    def decode_ragged(
        self, codes_E: np.ndarray, counts_N: np.ndarray, kinds_N: np.ndarray, previous_N: np.ndarray
    ) -> np.ndarray:
        """int32 [E]: the same of rows that have `counts_N` codes each, one row after the other."""
        begins = starts_of(counts_N)
        first, starts = self._tables_of(codes_E[begins], kinds_N, previous_N)
        places = codes_E + (codes_E < TABLE_SIZE) * np.repeat(starts, counts_N)
        places[begins] = first
        return self._flat.take(places)

    def _tables_of(
        self, codes_N: np.ndarray, kinds_N: np.ndarray, previous_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32 [N], twice: the place in `_flat` of every row's first code; where the table of its others begins."""
        starts = self._starts_of(PREVIOUS, previous_N)
        first = codes_N + (codes_N < TABLE_SIZE) * starts
        is_first = kinds_N == FIRST
        starts[is_first] = self._starts_of(FIRST, self._flat.take(first[is_first]))
        return first, starts

    def _starts_of(self, kind: int, contexts_N: np.ndarray) -> np.ndarray:
        """int32 [N]: where the table of every context begins in `_flat`; 0 if it has none."""
        return self._starts[kind].take(contexts_N, mode="clip")

    def _codes(self, kind: int, places_NK: np.ndarray, contexts_N: np.ndarray) -> np.ndarray:
        """int32 [N, K]: the codes by the tables of one kind, those of a few contexts at a time."""
        tables, num_ids = self.tables[kind], len(self.vocabulary)
        codes = places_NK + np.int32(TABLE_SIZE)
        order, contexts, lengths = _groups(contexts_N)
        index = np.searchsorted(tables.tokens, contexts)
        has_table = np.append(tables.tokens, -1)[index] == contexts
        rows, index, lengths = order[np.repeat(has_table, lengths)], index[has_table], lengths[has_table]
        starts, ends = np.cumsum(tables.sizes) - tables.sizes, np.cumsum(lengths)
        without = np.arange(TABLE_SIZE, TABLE_SIZE + num_ids, dtype=np.int32)
        inverse = np.tile(without, CONTEXTS_AT_ONCE)
        for first in range(0, len(index), CONTEXTS_AT_ONCE):
            some = slice(first, first + CONTEXTS_AT_ONCE)
            sizes = tables.sizes[index[some]]
            within = _counting(sizes)
            entries = tables.entries[np.repeat(starts[index[some]], sizes) + within]
            listed = np.repeat(np.arange(len(sizes)) * num_ids, sizes) + entries
            inverse[listed] = within
            own = rows[ends[first] - lengths[first] : ends[some][-1]]
            begins = np.repeat(np.arange(len(sizes), dtype=np.int32) * np.int32(num_ids), lengths[some])
            codes[own] = inverse.take(places_NK[own] + begins[:, None])
            inverse[listed] = without[entries]
        return codes


def learn(
    ids_NK: np.ndarray, previous_N: np.ndarray, threads: Threads = ALONE, is_entry_NK: np.ndarray | None = None
) -> ContextModel:
    """The model of a shard's ids, where `is_entry_NK` is True if it is given, and of the tokens before them."""
    blocks = list(row_blocks(len(ids_NK), PIECE_ROWS))
    num_ids = int(ids_NK.max(initial=0)) + 1
    counts = np.zeros(num_ids, np.int64)

    def counted(rows: slice) -> np.ndarray:
        entries = ids_NK[rows].ravel() if is_entry_NK is None else ids_NK[rows][is_entry_NK[rows]]
        return np.bincount(entries, minlength=num_ids)

    for part in threads.map(counted, blocks):
        counts += part
    found = np.flatnonzero(counts)
    vocabulary = found[np.argsort(-counts[found], kind="stable")].astype(np.int32)
    places, inverse = np.empty(ids_NK.shape, np.int32), _inverse(vocabulary)
    for _ in threads.map(lambda rows: inverse.take(ids_NK[rows], out=places[rows], mode="clip"), blocks):
        pass
    if is_entry_NK is not None:
        places[~is_entry_NK] = NO_PLACE
    contexts = (previous_N, ids_NK[:, 0])
    first, second = (_learn_tables(places, contexts_N, threads) for contexts_N in contexts)
    return ContextModel(vocabulary, (first, second))


def row_blocks(num_rows: int, block_rows: int = CACHED_ROWS) -> Iterator[slice]:
    """All rows, in blocks: by default those that fit a CPU's cache."""
    return (slice(start, start + block_rows) for start in range(0, num_rows, block_rows))


def _cost(codes_NK: np.ndarray, of_entries: np.ndarray | bool) -> np.ndarray:
    """float32 [N]: about how many bits all but the first code of a position take."""
    return np.log2(codes_NK[:, 1:] + np.float32(4)).sum(axis=1, where=of_entries)


def _learn_tables(places_NK: np.ndarray, contexts_N: np.ndarray, threads: Threads) -> Tables:
    order, contexts, lengths = _groups(contexts_N)
    ends = np.cumsum(lengths)

    def learnt(piece: slice) -> list[np.ndarray]:
        own = zip((ends - lengths)[piece].tolist(), ends[piece].tolist())
        return [_frequent(places_NK[order[start:end]].ravel()) for start, end in own if end - start >= MIN_POSITIONS]

    entries = [table for tables in threads.map(learnt, _pieces(lengths)) for table in tables]
    sizes = np.array([len(table) for table in entries], np.int32)
    tokens = contexts[lengths >= MIN_POSITIONS][sizes > 0].astype(np.int32)
    return Tables(tokens, sizes[sizes > 0], np.concatenate([np.zeros(0, np.int32), *entries]))


def _pieces(lengths: np.ndarray) -> Iterator[slice]:
    """Contexts with about PIECE_ROWS positions in all, or one that has more: what is worth a thread's while."""
    piece_of = (np.cumsum(lengths) - lengths) // PIECE_ROWS
    bounds = np.flatnonzero(np.diff(piece_of, prepend=-1, append=-1))
    return map(slice, bounds[:-1].tolist(), bounds[1:].tolist())


def _frequent(places: np.ndarray) -> np.ndarray:
    """The TABLE_SIZE most frequent values that come up MIN_COUNT times or more, by falling count, then rising."""
    places.sort()
    places = places[np.searchsorted(places, NO_PLACE, side="right") :]
    starts = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1]]))
    counts = np.diff(starts, append=len(places))
    kept = np.flatnonzero(counts >= MIN_COUNT)
    kept = kept[np.argsort(-counts[kept], kind="stable")][:TABLE_SIZE]
    return places[starts[kept]]


def _counting(sizes: np.ndarray) -> np.ndarray:
    """From 0 to each of the sizes, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _groups(contexts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions, by their contexts; every context, rising; and how many positions have it."""
    order = np.argsort(contexts_N, kind="stable")
    ordered = contexts_N[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
    return order, ordered[starts], np.diff(starts, append=len(ordered))


def _inverse(vocabulary: np.ndarray) -> np.ndarray:
    """int32: the place of every id in the vocabulary; 0 for those that are not in it."""
    places = np.zeros(int(vocabulary.max(initial=0)) + 1, np.int32)
    places[vocabulary] = np.arange(len(vocabulary), dtype=np.int32)
    return places


def code_differences(codes_NK: np.ndarray, inside_NK: np.ndarray) -> np.ndarray:
    """Codes that rise inside each run, each but a run's first less the one before it."""
    differences = codes_NK.copy()
    differences[:, 1:] -= codes_NK[:, :-1] * inside_NK[:, 1:]
    return differences


def sum_differences(differences_NK: np.ndarray, inside_NK: np.ndarray) -> np.ndarray:
    """int32: the codes of `code_differences`; `inside_NK` is False where a run begins, as every row does.

    One sum goes through all rows, and what it was before an entry's run is taken off: it may overflow, for what is
    left does not.
    """
    begins = ~inside_NK.reshape(-1)
    sums = np.cumsum(differences_NK.reshape(-1), dtype=np.int32)
    before = sums.take(np.flatnonzero(begins) - 1)
    before[:1] = 0
    begins[:1] = False  # runs are numbered from 0
    runs = np.cumsum(begins.astype(np.int32), dtype=np.int32)
    sums -= before.take(runs, mode="wrap")  # the fastest mode; none is outside
    return sums.reshape(differences_NK.shape)
