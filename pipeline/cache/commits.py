"""Commit records: the only statement that a partition is done.

A writer publishes its shard under a name of its own and then links a commit record that names
the shard and its checksum. The first record of a partition wins; a shard without a record is
never read.
"""

import os
import secrets
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.documents import Count, FileName, Hash
from pipeline.errors import CacheCorruptError
from pipeline.files import (
    PARTIAL,
    hash_file,
    list_names,
    numbers_in,
    publish,
    read_document,
    remove_partials,
    write_json,
)
from pipeline.formats.containers import CONTAINERS, structure_of
from pipeline.formats.layout import ShardLayout
from pipeline.processes import owner_is_dead, owner_name
from pipeline.stores.copies import copies_folder
from pipeline.stores.objects import Location, ObjectPath

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


def partial_shard_path(folder: Location, partition: int, suffix: str) -> Path:
    """Where an attempt at the shard of a partition is written until it is whole; no two attempts share a name."""
    place = copies_folder() if isinstance(folder, ObjectPath) else folder / SHARDS
    return place / f"{partition:05d}-{secrets.token_hex(4)}-{owner_name()}{suffix}{PARTIAL}"


def commit_shard(
    folder: Location, partition: int, partial: Path, layout: ShardLayout, statistics: dict[str, Any]
) -> ShardCommit | None:
    """Publish a closed shard and its record; None if another process has committed the partition before."""
    final = folder / SHARDS / partial.name.removesuffix(PARTIAL)
    (container,) = (kind for kind in CONTAINERS.values() if final.name.endswith(kind.suffix))
    with closing(container.open(partial, layout)) as shard:
        structure = structure_of(partial, shard)
    commit = ShardCommit(
        partition=partition,
        file=final.name,
        bytes=partial.stat().st_size,
        xxh3_128=hash_file(partial),
        structure=structure,
        num_sequences=layout.num_sequences,
        num_tokens=layout.num_tokens,
        num_documents=layout.num_documents,
        num_targets=layout.num_targets,
        statistics=statistics,
    )
    publish(partial, final)
    if write_json(commit_path(folder, partition), asdict(commit), first_wins=True):
        return commit
    final.unlink(missing_ok=True)  # a repair may have been here
    return None


def commit_path(folder: Location, partition: int) -> Location:
    """The record of a partition."""
    return folder / COMMITS / f"{partition:05d}.json"


def read_commit(folder: Location, partition: int) -> ShardCommit | None:
    """The record of a partition; None if it is not done. Raises CacheCorruptError if it is damaged."""
    path = commit_path(folder, partition)
    try:
        commit = read_document(path, ShardCommit, CacheCorruptError)
    except FileNotFoundError:
        return None
    if commit.partition != partition:
        raise CacheCorruptError(f"{path}: is the record of partition {commit.partition}; the file was renamed.")
    return commit


def list_commits(folder: Location) -> set[int]:
    """The partitions that are done, from one listing."""
    return {partition for (partition,) in numbers_in(list_names(folder / COMMITS), r"(\d{5,15})\.json")}


def is_committed(folder: Location, partition: int) -> bool:
    """True if the partition has a record."""
    return commit_path(folder, partition).is_file()


def remove_leftovers(folder: Location) -> int:
    """Delete what dead processes of this host left behind; returns how many files went."""
    if isinstance(folder, ObjectPath):  # what they have uploaded, `pipeline verify --repair` deletes
        dead = [path for path in copies_folder().glob(f"*{PARTIAL}") if owner_is_dead(_owner(path.name))]
        for path in dead:
            path.unlink(missing_ok=True)
        return len(dead)
    num_partials = sum(remove_partials(folder / name) for name in ("", COMMITS))
    shards: dict[int, list[str]] = {}
    for name in list_names(folder / SHARDS):
        for (partition,) in numbers_in([name], r"(\d{5,15})-.*"):
            shards.setdefault(partition, []).append(name)
    done = list_commits(folder)
    removed = [name for name in os.listdir(folder / SHARDS) if name.endswith(PARTIAL)]
    for partition, names in shards.items():
        if partition not in done:
            removed += names
        elif len(names) > 1:  # a single one is what the record names; reading thousands of records takes long
            winner = read_commit(folder, partition)
            removed += [name for name in names if winner is not None and name != winner.file]
    removed = [name for name in removed if owner_is_dead(_owner(name))]
    for name in removed:
        (folder / SHARDS / name).unlink(missing_ok=True)
    return len(removed) + num_partials


def _owner(name: str) -> str:
    owner = name.removesuffix(PARTIAL).split("-", 2)[-1]
    return owner.removesuffix(".arrow").removesuffix(".zarr.zip")
