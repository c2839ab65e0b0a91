"""How format version 2 has ids as small numbers, which this version reads and no longer writes.

Shape suffixes: N positions, K stored entries of a position.

A shard has two kinds of tables: for a token, the ids that are stored where it is the last token of the text
("previous"); for an id, the ids that are stored where it is the most probable ("first"). A position uses the table
of one kind, and an id's code is its place in that table, or TABLE_SIZE plus its place among all ids of the shard.
The first id of a position always goes by the previous token.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TABLE_SIZE = 1024
"""Longest table."""
PREVIOUS, FIRST = 0, 1


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
    """int32: every id of the shard."""
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

    def decode(self, codes_NK: np.ndarray, contexts_N2: np.ndarray) -> np.ndarray:
        """int32 [N, K]: the ids; IndexError or ValueError if the codes are none of this model.

        `contexts_N2` are the kind of table and the previous token of every position.
        """
        kinds_N, previous_N = contexts_N2.T
        starts = self._starts_of(PREVIOUS, previous_N)
        in_table = codes_NK < TABLE_SIZE
        first = codes_NK[:, 0] + in_table[:, 0] * starts
        is_first = kinds_N == FIRST
        starts[is_first] = self._starts_of(FIRST, self._flat.take(first[is_first]))
        places = codes_NK + in_table * starts[:, None]  # np.where takes ten times as long
        places[:, 0] = first
        return self._flat.take(places)

    def _starts_of(self, kind: int, contexts_N: np.ndarray) -> np.ndarray:
        """int32 [N]: where the table of every context begins in `_flat`; 0 if it has none."""
        return self._starts[kind].take(contexts_N, mode="clip")
