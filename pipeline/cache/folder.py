"""The folder of a cache, finished or not: it comes into being in one step, and is filled shard by shard."""

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.cache.commits import (
    COMMITS,
    SHARDS,
    ShardCommit,
    commit_path,
    list_commits,
    list_shards,
    new_shard_name,
    owner_of_shard,
    read_commit,
)
from pipeline.cache.manifest import MANIFEST, TOKENIZER, CacheManifest
from pipeline.cache.shard import StoredShard
from pipeline.documents import short
from pipeline.errors import CacheMismatchError
from pipeline.files import PARTIAL, hash_file, naming, remove_partials
from pipeline.formats.containers import CONTAINERS, structure_of
from pipeline.formats.layout import ShardCounts
from pipeline.processes import owner_is_dead
from pipeline.sketch import SKETCH, FittedSketch, TailSketch, read_contents, sketch_name
from pipeline.stores.places import store_of
from pipeline.stores.sealed import write_json
from pipeline.stores.store import Store


class CacheFolder:
    """What is there of a cache: its manifest, and the partitions that are done."""

    def __init__(self, folder: str | Path | Store) -> None:
        """Raises CacheError if no cache is there, or its manifest is damaged."""
        self.folder = store_of(folder)
        self.manifest = CacheManifest.read(self.folder)

    @classmethod
    def begin(
        cls,
        folder: str | Path | Store,
        manifest: CacheManifest,
        tokenizer: Path | Store,
        sketch: bytes | None = None,
    ) -> "CacheFolder":
        """Make the cache's folder, or check that it holds this very cache; raises CacheError.

        `tokenizer` is copied into it, again if `pipeline verify --repair` has dropped the copy. `sketch` is the file
        that the manifest names.
        """
        place = store_of(folder)
        with tempfile.TemporaryDirectory() as scratch:
            source = store_of(tokenizer).as_folder(Path(scratch) / TOKENIZER)
            if not (place / MANIFEST).is_file():
                _require_free(place)
                place.build(lambda new: _fill(new, manifest, source, sketch))
            found = cls(place)
            found.manifest.require_equal(manifest, place)
            for name in (SHARDS, COMMITS):  # also those that copying has lost while they were empty
                (place / name).mkdir(exist_ok=True)
            if not (place / TOKENIZER).is_dir():
                (place / TOKENIZER).build(lambda new: _copy(source, new))
        return found

    def sketch_contents(self) -> bytes | None:
        """The file of the tail sketch, checked against its hash; None without one."""
        checksum = self.manifest.sketch
        return None if checksum is None else read_contents(self.folder, checksum)

    @cached_property
    def sketch(self) -> TailSketch | None:
        """What makes the teacher's tail of stored coefficients; None of a cache that has none."""
        fitted = self.fitted_sketch()
        return None if fitted is None else fitted.decoder

    def fitted_sketch(self) -> FittedSketch | None:
        """All of the tail sketch; None without one."""
        contents = self.sketch_contents()
        if contents is None or self.manifest.sketch is None:
            return None
        where = self.folder / sketch_name(self.manifest.sketch)
        return FittedSketch.from_bytes(contents, where, self.manifest.vocab_size, self.manifest.tail_rank)

    def done(self) -> set[int]:
        """The partitions that are committed, from one listing."""
        return list_commits(self.folder)

    def todo(self) -> list[int]:
        """The partitions that are not committed, from one listing."""
        done = self.done()
        return [partition for partition in range(self.manifest.num_partitions) if partition not in done]

    def committed(self) -> Iterator[StoredShard]:
        """The shards of the partitions that are done; reads every record."""
        for partition in range(self.manifest.num_partitions):
            commit = read_commit(self.folder, partition)
            if commit is not None:
                yield StoredShard.of(self.folder, self.manifest, commit)

    @contextlib.contextmanager
    def new_shard(self, partition: int) -> Iterator[Path]:
        """Where an attempt at a partition's shard is written; what `commit` has not published is gone at the end."""
        name = new_shard_name(partition, CONTAINERS[self.manifest.container].suffix)
        partial = (self.folder / SHARDS).workshop() / (name + PARTIAL)
        try:
            with naming(partial):
                yield partial
        finally:
            partial.unlink(missing_ok=True)

    def commit(
        self, partition: int, partial: Path, counts: ShardCounts, statistics: dict[str, Any]
    ) -> ShardCommit | None:
        """Publish a closed shard and its record; None if another process has committed the partition before."""
        final = self.folder / SHARDS / partial.name.removesuffix(PARTIAL)
        with closing(CONTAINERS[self.manifest.container].open(partial, self.manifest.layout(counts))) as shard:
            structure = structure_of(partial, shard)
        commit = ShardCommit(
            partition=partition,
            file=final.name,
            bytes=partial.stat().st_size,
            xxh3_128=hash_file(partial),
            structure=structure,
            statistics=statistics,
            **asdict(counts),
        )
        final.publish(partial)
        if write_json(commit_path(self.folder, partition), asdict(commit), first_wins=True):
            return commit
        final.unlink(missing_ok=True)  # a repair may have been here
        return None

    def remove_leftovers(self) -> int:
        """Delete what dead processes of this host left behind; returns how many files went."""
        workshop = (self.folder / SHARDS).workshop()
        left = [path for path in workshop.glob(f"*{PARTIAL}") if owner_is_dead(owner_of_shard(path.name))]
        for path in left:
            path.unlink(missing_ok=True)
        local = self.folder.path  # what they have published elsewhere, `pipeline verify --repair` deletes
        if local is None:
            return len(left)
        return len(left) + self._remove_uncommitted() + sum(remove_partials(local / name) for name in ("", COMMITS))

    def _remove_uncommitted(self) -> int:
        done, removed = self.done(), []
        for partition, names in list_shards(self.folder).items():
            if partition not in done:
                removed += names
            elif len(names) > 1:  # a single one is what the record names; reading thousands of records takes long
                winner = read_commit(self.folder, partition)
                removed += [name for name in names if winner is not None and name != winner.file]
        removed = [name for name in removed if owner_is_dead(owner_of_shard(name))]
        for name in removed:
            (self.folder / SHARDS / name).unlink(missing_ok=True)
        return len(removed)


def _require_free(place: Store) -> None:
    """Raise CacheMismatchError if something else is there."""
    of_ours = (TOKENIZER, SKETCH)  # left by a process that was killed before it wrote the manifest
    foreign = [name for name in place.names() if not name.startswith(of_ours) or place.path is not None]
    if (foreign or place.is_file()) and not (place / MANIFEST).is_file():  # another process may just have made it
        what = f" but {short(foreign[0], quoted=False)}" if foreign else ""
        raise CacheMismatchError(f"{place}: exists and holds no cache{what}; choose another --out or empty it.")


def _fill(folder: Store, manifest: CacheManifest, tokenizer: Path, sketch: bytes | None) -> None:
    """What a cache must have to be one; its manifest declares it."""
    (folder / TOKENIZER).mkdir()
    _copy(tokenizer, folder / TOKENIZER)
    if sketch is not None and manifest.sketch is not None:
        (folder / sketch_name(manifest.sketch)).write(sketch)
    manifest.write(folder)


def _copy(source: Path, target: Store) -> None:
    """Copy the files of a folder, and of those in it where a store has folders."""
    for path in sorted(source.iterdir()):
        if path.is_dir():
            (target / path.name).mkdir(exist_ok=True)
            _copy(path, target / path.name)
        else:
            (target / path.name).write(path.read_bytes(), lasting=False)
