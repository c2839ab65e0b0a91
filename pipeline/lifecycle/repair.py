"""Dropping what `verify_cache` found damaged, so that the next `pipeline cache-logits` makes it again."""

import shutil
from collections import defaultdict
from pathlib import Path

from pipeline.files import PARTIAL, sync_folder
from pipeline.manifest import TOKENIZER
from pipeline.runs.commits import COMMITS, SHARDS, commit_path, read_commit
from pipeline.shards.verify import VerifyReport


def repair_cache(folder: Path, report: VerifyReport) -> None:
    """Drop the damaged partitions, and the tokenizer if it is damaged; delete shards that no record names.

    A shard goes before its record: until the record is gone, no other process takes the partition, and
    a repair that is killed between the two leaves a missing shard, which the next one finds.
    """
    shards = _published(folder)
    for partition in range(report.num_partitions):
        for path in _useless(folder, partition, shards[partition], report):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    sync_folder(folder / SHARDS)
    for partition in report.damaged:
        commit_path(folder, partition).unlink(missing_ok=True)
    sync_folder(folder / COMMITS)
    if report.tokenizer_damaged:
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)


def _useless(folder: Path, partition: int, shards: list[Path], report: VerifyReport) -> list[Path]:
    """Of the shards of a partition, those to drop; none of a missing one, whose writer may be about to commit."""
    if partition in report.damaged:
        return shards
    if partition in report.missing or len(shards) == 1:
        return []
    commit = read_commit(folder, partition)
    return [path for path in shards if commit is not None and path.name != commit.file]


def _published(folder: Path) -> dict[int, list[Path]]:
    shards: dict[int, list[Path]] = defaultdict(list)
    for path in sorted((folder / SHARDS).iterdir()):
        number = path.name.partition("-")[0]
        if number.isdigit() and path.suffix != PARTIAL:
            shards[int(number)].append(path)
    return shards
