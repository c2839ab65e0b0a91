"""Sequences whose targets an earlier cache holds: a corpus that has grown is scored only where it is new.

A sequence is known by its key, which names its tokens, mask and document boundaries; its targets are
the same in any corpus, order and shard. They are copied as they are stored, and not rounded again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pipeline.cache.commits import SHARDS, ShardCommit, read_commit
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.reader import layout_of_commit, open_shard
from pipeline.corpus import Corpus, TokenSequence, comparable_keys
from pipeline.cpu import available_cores
from pipeline.documents import short
from pipeline.errors import CacheCorruptError, CacheMismatchError
from pipeline.formats.containers import Shard
from pipeline.formats.layout import decode
from pipeline.parallel import map_in_threads
from pipeline.stores.objects import Location
from pipeline.targets import SparseTargets

OPEN_SHARDS = 16
"""Shards of earlier caches that are kept open at the same time."""

REASONS = {
    "teacher": "another teacher, or another arithmetic, says something else",
    "tokenizer": "the ids stand for other tokens",
    "vocab_size": "other columns of the head took part in the sums",
    "padded_vocab_size": "it is another head",
    "top_k": "the tail's mass and draws belong to that k, and entries beyond it were not kept",
    "temperatures": "p_T needs the sum over the whole vocabulary at T, which was taken at those T alone",
    "tail_samples": "draws cannot be made from what is stored",
    "draw_temperature": "the draws were made from another distribution",
    "max_kl_error": "its values were rounded otherwise",
}
"""Why nothing of a cache can be reused, by what differs in its identity."""


@dataclass(frozen=True, kw_only=True)
class CopiedTargets(SparseTargets):
    """The targets of a sequence as an earlier cache stores them."""

    columns: dict[str, np.ndarray]
    """The sequence's stored columns, to be written as they are."""
    source: ShardCommit
    """The shard that they come from."""


@dataclass(frozen=True, kw_only=True)
class KnownSequence(TokenSequence):
    """A row of a corpus whose targets are known."""

    load: Callable[[], CopiedTargets]
    """Reads them; raises CacheCorruptError."""


class GrownCorpus(Corpus):
    """A corpus some of whose rows are in earlier caches: `rows` yields those as KnownSequence."""

    def __init__(self, folder: Path, known: "KnownTargets") -> None:
        super().__init__(folder)
        self._known = known

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[TokenSequence]:
        """Sequences `start` to `stop`, in order."""
        for sequence in super().rows(start, stop):
            place = self._known.find(np.frombuffer(sequence.key, np.uint8)[None])[0]
            if place < 0:
                yield sequence
            else:
                columns = {name: getattr(sequence, name) for name in ("token_ids", "loss_mask", "document_lengths")}
                yield KnownSequence(**columns, load=lambda place=place, key=sequence.key: self._known.load(place, key))

    def num_known_tokens(self) -> int:
        """Tokens of the rows that are known."""
        is_known = self._known.find(self.keys()) >= 0
        return int(self.lengths()[0][is_known].sum())


class KnownTargets:
    """The committed shards of earlier caches, finished or not, by the keys of their sequences.

    Keeps 24 bytes of memory a sequence. Not for several threads at once.
    """

    def __init__(self, folders: Sequence[Location], wanted: CacheManifest) -> None:
        """Raises CacheMismatchError, with the reason, if a cache holds other targets than are `wanted`."""
        self._shards: list[tuple[Location, CacheManifest, ShardCommit]] = []
        for folder in folders:
            manifest = CacheManifest.read(folder)
            _require_reusable(folder, manifest, wanted)
            commits = (read_commit(folder, partition) for partition in range(manifest.num_partitions))
            self._shards += [(folder, manifest, commit) for commit in commits if commit is not None]
        self._open: OrderedDict[int, Shard] = OrderedDict()
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

    def load(self, place: int, key: bytes) -> CopiedTargets:
        """The targets at a place that `find` returned for `key`."""
        index = int(np.searchsorted(self._starts, place, side="right")) - 1
        folder, manifest, commit = self._shards[index]
        row = int(place - self._starts[index])
        where = f"{folder / SHARDS / commit.file}: sequence {row}"
        columns = self._shard(index).columns(row, row + 1)
        sequence = decode(columns, layout_of_commit(manifest, commit), where)
        if sequence.key != key:
            raise CacheCorruptError(f"{where} has not the key that it had when the run began.")
        values = {field.name: getattr(sequence.targets, field.name) for field in fields(SparseTargets)}
        return CopiedTargets(columns=columns, source=commit, **values)

    def _shard(self, index: int) -> Shard:
        if index not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[index] = open_shard(*self._shards[index])
        self._open.move_to_end(index)
        return self._open[index]


def _keys(place: tuple[Location, CacheManifest, ShardCommit]) -> np.ndarray:
    with closing(open_shard(*place)) as shard:
        return np.array(shard.heads()["key"])  # a damaged one only hides its sequence


def _require_reusable(folder: Location, manifest: CacheManifest, wanted: CacheManifest) -> None:
    different = wanted.target_differences(manifest)
    if different:
        reasons = [
            f"{name} is {short(theirs, quoted=False)}, now {short(ours, quoted=False)} ({REASONS.get(name.partition('.')[0], 'other targets')})"
            for name, (ours, theirs) in different.items()
        ]
        raise CacheMismatchError(
            f"{folder}: nothing of it can be reused: {'; '.join(reasons)}; leave out --reuse, or ask for the same."
        )
