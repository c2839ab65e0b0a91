"""A committed shard: where it lies, what it must hold, and how it is opened."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.commits import SHARDS, ShardCommit
from pipeline.cache.manifest import CacheManifest
from pipeline.errors import CacheCorruptError
from pipeline.formats.containers import CONTAINERS, Shard, structure_of
from pipeline.formats.layout import CachedSequence, ShardLayout, decode
from pipeline.stores.store import Store
from pipeline.targets import TargetSpec


@dataclass(frozen=True)
class StoredShard:
    """One shard of a cache, known by its record; can be pickled and sent to other processes."""

    place: Store
    """The file, wherever it is."""
    container: str
    spec: TargetSpec
    commit: ShardCommit
    num_sequences: int
    """Sequences of the partition, as the manifest plans."""
    sequence_length: int
    """Longest sequence of the cache, tokens."""

    @classmethod
    def of(cls, folder: Store, manifest: CacheManifest, commit: ShardCommit) -> "StoredShard":
        """The shard that a record of the cache in `folder` names."""
        first, stop = manifest.partitions[commit.partition : commit.partition + 2]
        place = folder / SHARDS / commit.file
        return cls(place, manifest.container, manifest.spec, commit, stop - first, manifest.sequence_length)

    @functools.cached_property
    def layout(self) -> ShardLayout:
        """How much it holds, and what of every position."""
        return ShardLayout(counts=self.commit.counts, spec=self.spec)

    def file(self, *, check: bool = True) -> Path:
        """A file of this machine, as long as it was committed; with `check`, the same to the byte.

        Raises CacheCorruptError. Of an object store it is a copy, downloaded unless it is there.
        """
        commit = self.commit
        try:
            return self.place.as_file(commit.xxh3_128, commit.bytes, check=check)
        except FileNotFoundError:
            raise CacheCorruptError(
                f"{self.place}: missing, although it was committed; `pipeline verify` names all damage."
            ) from None
        except ValueError as exc:
            raise CacheCorruptError(f"{exc}; the shard is damaged.") from exc

    def open(self, *, check: bool = False) -> Shard:
        """The open file; raises CacheCorruptError unless its size and structure, with `check` every byte, are as they
        were committed."""
        commit, where, path = self.commit, self.place, self.file(check=check)
        if commit.num_sequences != self.num_sequences:
            raise CacheCorruptError(
                f"{where}: {commit.num_sequences} sequences; the manifest plans {self.num_sequences}."
            )
        shard = CONTAINERS[self.container].open(path, self.layout)
        if len(shard) != commit.num_sequences:
            raise CacheCorruptError(f"{where}: holds {len(shard)} sequences; its commit says {commit.num_sequences}.")
        if structure_of(path, shard) != commit.structure:
            raise CacheCorruptError(f"{where}: its structure is not the committed one; bytes of the file have changed.")
        heads = shard.heads()
        for name in ("num_tokens", "num_documents", "num_targets"):
            if heads[name].min(initial=0) < 0 or heads[name].sum(dtype=np.int64) != getattr(commit, name):
                raise CacheCorruptError(f"{where}: {name} of its sequences do not add up to those of its commit.")
        if (longest := int(heads["num_tokens"].max(initial=0))) > self.sequence_length:
            raise CacheCorruptError(f"{where}: a sequence of {longest} tokens; the longest has {self.sequence_length}.")
        return shard

    def where(self, row: int) -> str:
        """A sequence of it, for a message."""
        return f"{self.place}: sequence {row}"

    def decode(self, columns: dict[str, np.ndarray], row: int) -> CachedSequence:
        """The sequence of the given columns; raises CacheCorruptError unless they are as they were written."""
        return decode(columns, self.layout, self.where(row))
