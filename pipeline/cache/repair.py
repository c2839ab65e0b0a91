"""Dropping what `verify_cache` found damaged, so that the next `pipeline cache-logits` makes it again."""

import contextlib
from pathlib import Path

from pipeline.cache.commits import COMMITS, SHARDS, commit_path, list_shards, read_commit
from pipeline.cache.manifest import COPY, MANIFEST, TOKENIZER
from pipeline.cache.verify import VerifyReport
from pipeline.errors import CacheCorruptError
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_json, write_json
from pipeline.stores.store import Store


def repair_manifest(cache: str | Path | Store) -> bool:
    """Make a damaged or lost manifest again from its copy, or the copy from it; True if there is a manifest then."""
    folder, found = store_of(cache), {}
    for name in (MANIFEST, COPY):
        with contextlib.suppress(FileNotFoundError, CacheCorruptError):
            found[name] = read_json(folder / name, CacheCorruptError)
    for name in {MANIFEST, COPY} - found.keys() if found else ():
        write_json(folder / name, next(iter(found.values())))
    return bool(found)


def repair_cache(cache: str | Path | Store, report: VerifyReport) -> None:
    """Drop the damaged partitions, and the tokenizer if it is damaged; delete shards that no record names.

    A shard goes before its record: until the record is gone, no other process takes the partition, and
    a repair that is killed between the two leaves a missing shard, which the next one finds.
    """
    folder = store_of(cache)
    shards = list_shards(folder)
    for partition in range(report.num_partitions):
        for name in _useless(folder, partition, shards[partition], report):
            (folder / SHARDS / name).unlink(missing_ok=True)
    (folder / SHARDS).sync()
    for partition in report.damaged:
        commit_path(folder, partition).unlink(missing_ok=True)
    (folder / COMMITS).sync()
    if report.tokenizer_damaged:
        (folder / TOKENIZER).remove_tree()


def _useless(folder: Store, partition: int, shards: list[str], report: VerifyReport) -> list[str]:
    """Of the shards of a partition, those to drop; none of a missing one, whose writer may be about to commit."""
    if partition in report.damaged:
        return shards
    if partition in report.missing or len(shards) == 1:
        return []
    commit = read_commit(folder, partition)
    return [name for name in shards if commit is not None and name != commit.file]
