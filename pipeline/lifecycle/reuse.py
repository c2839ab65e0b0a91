"""Sequences whose targets an earlier cache holds: a corpus that has grown is scored only where it is new.

A sequence is known by its key, which names its tokens, mask and document boundaries; its targets are
the same in any corpus, order and shard. They are copied as they are stored, and not rounded again.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.sequence import StoredSequence
from pipeline.cache.shard import StoredShard
from pipeline.corpus import Corpus, comparable_keys
from pipeline.cpu import available_cores
from pipeline.documents import short
from pipeline.errors import CacheCorruptError, CacheMismatchError
from pipeline.formats.containers import Shard
from pipeline.parallel import map_in_threads
from pipeline.stores.store import Store

OPEN_SHARDS = 16
"""Shards of earlier caches that are kept open at the same time."""

REASONS = {
    "teacher": "another teacher, or another arithmetic, says something else",
    "tokenizer": "the ids stand for other tokens",
    "vocab_size": "other columns of the head took part in the sums",
    "padded_vocab_size": "it is another head",
    "top_k": "the tail's mass and draws belong to that k, and entries beyond it were not kept",
    "top_p": "entries beyond that mass were not kept, or others would be",
    "top_p_temperature": "the mass was counted at another temperature",
    "min_k": "entries beyond that number were not kept, or others would be",
    "temperatures": "p_T needs the sum over the whole vocabulary at T, which was taken at those T alone",
    "tail_samples": "draws cannot be made from what is stored",
    "draw_temperature": "the draws were made from another distribution",
    "tail_rank": "a sketch is made where the hidden states are",
    "sketch": "its coefficients belong to another basis",
    "max_kl_error": "its values were rounded otherwise",
}
"""Why nothing of a cache can be reused, by what differs in its identity."""


class KnownTargets:
    """The committed shards of earlier caches, finished or not, by the keys of their sequences.

    Keeps 24 bytes of memory a sequence.
    """

    def __init__(self, folders: Sequence[Store], wanted: CacheManifest) -> None:
        """Raises CacheMismatchError, with the reason, if a cache holds other targets than are `wanted`."""
        self._shards: list[StoredShard] = []
        for cache in map(CacheFolder, folders):
            _require_reusable(cache, wanted)
            self._shards += cache.committed()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._reading = threading.Lock()
        """Held while a shard is read: neither the list of open ones nor they are for several threads at once."""
        parts = map_in_threads(_keys, self._shards, available_cores())
        self._starts = np.cumsum([0, *map(len, parts)])
        merged = comparable_keys(np.concatenate([np.zeros((0, 16), np.uint8), *parts]))
        self._order = np.argsort(merged, kind="stable")
        self._sorted = merged[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64 [S]: where the sequences of uint8 [S, 16] keys are; -1 for those that are not known."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        wanted = comparable_keys(keys)
        index = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[index] == wanted, self._order[index], -1)

    def find_one(self, key: bytes) -> int | None:
        """Where the sequence of a key is; None if it is not known."""
        place = int(self.find(np.frombuffer(key, np.uint8)[None])[0])
        return None if place < 0 else place

    def num_tokens_of(self, corpus: Corpus) -> int:
        """Tokens of the rows of a corpus that are known."""
        is_known = self.find(corpus.keys()) >= 0
        return int(corpus.lengths()[0][is_known].sum())

    def load(self, place: int, key: bytes) -> StoredSequence:
        """The sequence at a place that `find` returned for `key`; raises CacheCorruptError."""
        index = int(np.searchsorted(self._starts, place, side="right")) - 1
        stored, row = self._shards[index], int(place - self._starts[index])
        with self._reading:
            columns = self._opened(index).columns(row, row + 1)
        sequence = stored.decode(columns, row)
        if sequence.key != key:
            raise CacheCorruptError(f"{stored.where(row)} has not the key that it had when the run began.")
        return StoredSequence(columns=columns, targets=sequence.targets, source=stored.commit)

    def _opened(self, index: int) -> Shard:
        if index not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[index] = self._shards[index].open()
        self._open.move_to_end(index)
        return self._open[index]


def _keys(stored: StoredShard) -> np.ndarray:
    with closing(stored.open()) as shard:
        return np.array(shard.heads()["key"])  # a damaged one only hides its sequence


def _require_reusable(cache: CacheFolder, wanted: CacheManifest) -> None:
    different = wanted.target_differences(cache.manifest)
    if different:
        reasons = [
            f"{name} is {short(theirs, quoted=False)}, now {short(ours, quoted=False)} "
            f"({REASONS.get(name.partition('.')[0], 'other targets')})"
            for name, (ours, theirs) in different.items()
        ]
        raise CacheMismatchError(
            f"{cache.folder}: nothing of it can be reused: {'; '.join(reasons)}; "
            "leave out --reuse, or ask for the same."
        )
