"""Which sequences of a cache are read for figures, and what share of it they are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.cache.reader import ReadableCache
from pipeline.errors import CacheIncompleteError
from pipeline.formats.layout import CachedSequence
from pipeline.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sequences of a few shards."""

    cache: ReadableCache
    numbers: list[int]
    """Of the sequences, rising."""
    partitions: list[int]
    """That they are in."""

    @classmethod
    def draw(cls, cache: ReadableCache, count: int, num_shards: int, seed: int) -> "Sample":
        """`count` sequences (0: all), all alike likely, of `num_shards` shards that are all alike likely.

        Of more shards if these hold too few: what is drawn from is whole shards, since one of an object store is
        fetched as a whole. Raises CacheIncompleteError if nothing is done.
        """
        if not cache.records:
            raise CacheIncompleteError(f"{cache.folder}: no partition is captured yet; there is nothing to read.")
        random = np.random.default_rng(seed)
        shuffled = random.permutation(list(cache.records)).tolist()
        ranges = {partition: cache.numbers_in(partition) for partition in shuffled}
        sizes = np.cumsum([stop - first for first, stop in ranges.values()])
        enough = int(np.searchsorted(sizes, count)) + 1 if count else len(shuffled)
        chosen = sorted(shuffled[: max(enough, num_shards if count else 0)])
        there = np.concatenate([np.arange(*ranges[partition]) for partition in chosen])
        taken = there if count == 0 or count >= len(there) else random.choice(there, count, replace=False)
        numbers = np.sort(taken).tolist()
        return cls(cache=cache, numbers=numbers, partitions=sorted({cache.partition_of(number) for number in numbers}))

    def read(self, reporter: Reporter) -> Iterator[tuple[int, CachedSequence]]:
        """Every sequence with its number, shard by shard."""
        with reporter.progress("read", len(self.numbers), "sequences") as progress:
            for number in self.numbers:
                yield number, self.cache[number]
                progress.advance(1)

    def described(self) -> str:
        """What share of the cache it is."""
        manifest, records = self.cache.manifest, self.cache.records
        whole = len(self.numbers) == manifest.num_sequences
        which = "all" if whole else f"{len(self.numbers):,} of"
        size = sum(records[partition].bytes for partition in self.partitions)
        return (
            f"{which} {manifest.num_sequences:,} sequences, in {len(self.partitions):,} of "
            f"{manifest.num_partitions:,} shards ({size / 1e6:,.1f} MB)"
        )
