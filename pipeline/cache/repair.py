"""Dropping what `verify_cache` found damaged, so that the next `pipeline cache-logits` makes it again."""

import contextlib
from collections import defaultdict

from pipeline.cache.commits import COMMITS, SHARDS, commit_path, read_commit
from pipeline.cache.manifest import COPY, MANIFEST, TOKENIZER
from pipeline.cache.verify import VerifyReport
from pipeline.errors import CacheCorruptError
from pipeline.files import list_names, numbers_in, read_json, remove_tree, sync_folder, write_json
from pipeline.stores.objects import Location


def repair_manifest(folder: Location) -> bool:
    """Make a damaged or lost manifest again from its copy, or the copy from it; True if there is a manifest then."""
    found = {}
    for name in (MANIFEST, COPY):
        with contextlib.suppress(FileNotFoundError, CacheCorruptError):
            found[name] = read_json(folder / name, CacheCorruptError)
    for name in {MANIFEST, COPY} - found.keys() if found else ():
        write_json(folder / name, next(iter(found.values())))
    return bool(found)


def repair_cache(folder: Location, report: VerifyReport) -> None:
    """Drop the damaged partitions, and the tokenizer if it is damaged; delete shards that no record names.

    A shard goes before its record: until the record is gone, no other process takes the partition, and
    a repair that is killed between the two leaves a missing shard, which the next one finds.
    """
    shards = _published(folder)
    for partition in range(report.num_partitions):
        for path in _useless(folder, partition, shards[partition], report):
            path.unlink(missing_ok=True)
    if (folder / SHARDS).is_dir():
        sync_folder(folder / SHARDS)
    for partition in report.damaged:
        commit_path(folder, partition).unlink(missing_ok=True)
    if (folder / COMMITS).is_dir():
        sync_folder(folder / COMMITS)
    if report.tokenizer_damaged:
        remove_tree(folder / TOKENIZER)


def _useless(folder: Location, partition: int, shards: list[Location], report: VerifyReport) -> list[Location]:
    """Of the shards of a partition, those to drop; none of a missing one, whose writer may be about to commit."""
    if partition in report.damaged:
        return shards
    if partition in report.missing or len(shards) == 1:
        return []
    commit = read_commit(folder, partition)
    return [path for path in shards if commit is not None and path.name != commit.file]


def _published(folder: Location) -> dict[int, list[Location]]:
    shards: dict[int, list[Location]] = defaultdict(list)
    for name in sorted(list_names(folder / SHARDS)):
        for (partition,) in numbers_in([name], r"(\d{5,15})-.*"):
            shards[partition].append(folder / SHARDS / name)
    return shards
