"""Commit records: the only statement that a partition is done.

A writer publishes its shard under a name of its own and then links a commit record that names
the shard and its checksum. The first record of a partition wins; a shard without a record is
never read.
"""

import re
import secrets
from collections import defaultdict
from dataclasses import dataclass

from pipeline.documents import Count, FileName, Hash
from pipeline.errors import CacheCorruptError
from pipeline.formats.layout import ShardCounts
from pipeline.processes import owner_name
from pipeline.stores.numbered import list_names, numbers_in
from pipeline.stores.sealed import read_document
from pipeline.stores.store import Store

COMMITS = "commits"
SHARDS = "shards"


@dataclass(frozen=True, kw_only=True)
class ShardCommit:
    """One finished partition."""

    partition: Count
    file: FileName
    bytes: Count
    xxh3_128: Hash
    structure: Hash
    """Checksum of what a reader relies on beside the sequences: `structure_of`."""
    num_sequences: Count
    num_tokens: Count
    num_documents: Count
    num_targets: Count
    statistics: dict[str, float | list[float]]
    """Sums over the targets, and what the capture took."""

    @property
    def counts(self) -> ShardCounts:
        """What the shard holds."""
        return ShardCounts(
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_targets=self.num_targets,
        )


def commit_path(folder: Store, partition: int) -> Store:
    """The record of a partition."""
    return folder / COMMITS / f"{partition:05d}.json"


def read_commit(folder: Store, partition: int) -> ShardCommit | None:
    """The record of a partition; None if it is not done. Raises CacheCorruptError if it is damaged."""
    path = commit_path(folder, partition)
    try:
        commit = read_document(path, ShardCommit, CacheCorruptError)
    except FileNotFoundError:
        return None
    if commit.partition != partition:
        raise CacheCorruptError(f"{path}: is the record of partition {commit.partition}; the file was renamed.")
    return commit


def list_commits(folder: Store) -> set[int]:
    """The partitions that are done, from one listing."""
    return {partition for (partition,) in numbers_in(list_names(folder / COMMITS), r"(\d{5,15})\.json")}


def is_committed(folder: Store, partition: int) -> bool:
    """True if the partition has a record."""
    return commit_path(folder, partition).is_file()


def new_shard_name(partition: int, suffix: str) -> str:
    """A name for an attempt at the shard of a partition; no two attempts share one."""
    return f"{partition:05d}-{secrets.token_hex(4)}-{owner_name()}{suffix}"


def owner_of_shard(name: str) -> str:
    """The owner in a name by `new_shard_name`, whatever its suffix: namespace and process come last in it."""
    found = re.match(r"\d{5,15}-[0-9a-f]+-(.+\.\d+\.\d+)\.[a-z]", name, re.ASCII)
    return found[1] if found else ""


def list_shards(folder: Store) -> dict[int, list[str]]:
    """Names of the shards that were published for every partition, committed or not, from one listing."""
    shards: dict[int, list[str]] = defaultdict(list)
    for name in list_names(folder / SHARDS):
        for (partition,) in numbers_in([name], r"(\d{5,15})-.*"):
            shards[partition].append(name)
    return shards
