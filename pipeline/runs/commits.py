"""Commit records: the only statement that a partition is done.

A writer publishes its shard under a name of its own and then links a commit record that names
the shard and its checksum. The first record of a partition wins; a shard without a record is
never read.
"""

import secrets
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CacheCorruptError
from pipeline.files import PARTIAL, hash_file, owner_is_dead, owner_name, publish, read_json, write_json
from pipeline.shards.containers import CONTAINERS, structure_of
from pipeline.shards.layout import ShardLayout

COMMITS = "commits"
SHARDS = "shards"


@dataclass(frozen=True, kw_only=True)
class ShardCommit:
    """One finished partition."""

    partition: int
    file: str
    bytes: int
    xxh3_128: str
    structure: str
    """Checksum of what a reader relies on beside the sequences: `structure_of`."""
    num_sequences: int
    num_tokens: int
    num_documents: int
    num_targets: int
    statistics: dict[str, Any]
    """Sums over the targets, and what the capture took."""


def partial_shard_path(folder: Path, partition: int, suffix: str) -> Path:
    """Where an attempt at the shard of a partition is written until it is whole; no two attempts share a name."""
    return folder / SHARDS / f"{partition:05d}-{secrets.token_hex(4)}-{owner_name()}{suffix}{PARTIAL}"


def commit_shard(
    folder: Path, partition: int, partial: Path, layout: ShardLayout, statistics: dict[str, Any]
) -> ShardCommit | None:
    """Publish a closed shard and its record; None if another process has committed the partition before."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
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
    final.unlink()
    return None


def commit_path(folder: Path, partition: int) -> Path:
    """The record of a partition."""
    return folder / COMMITS / f"{partition:05d}.json"


def read_commit(folder: Path, partition: int) -> ShardCommit | None:
    """The record of a partition; None if it is not done. Raises CacheCorruptError if it is damaged."""
    path = commit_path(folder, partition)
    try:
        document = read_json(path, CacheCorruptError)
    except FileNotFoundError:
        return None
    commit = ShardCommit(**document)
    if commit.partition != partition:
        raise CacheCorruptError(f"{path}: is the record of partition {commit.partition}; the file was renamed.")
    return commit


def remove_leftovers(folder: Path) -> int:
    """Delete what dead processes of this host left behind; returns how many files went."""
    committed = {read_json(path, CacheCorruptError)["file"] for path in (folder / COMMITS).glob("*.json")}
    removed = 0
    for path in sorted((folder / SHARDS).iterdir()):
        owner = path.name.removesuffix(PARTIAL).split("-", 2)[-1]
        owner = owner.removesuffix(".arrow").removesuffix(".zarr.zip")
        if path.name not in committed and owner_is_dead(owner):
            path.unlink(missing_ok=True)
            removed += 1
    return removed
