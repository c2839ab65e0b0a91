"""Failures of partitions, kept so that one bad partition does not stop a run.

failures/<partition>.<ordinal>.json is the ordinal-th failure of a partition. Once `max_failures` are
reached the partition is set aside: no worker takes it until the records are gone (`--retry-failed`).
"""

import contextlib
from dataclasses import asdict, dataclass

from pipeline.documents import Count, Text
from pipeline.errors import CacheCorruptError
from pipeline.stores.numbered import list_names, numbers_in
from pipeline.stores.sealed import read_document, write_json
from pipeline.stores.store import Store

FAILURES = "failures"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure of a partition."""

    partition: Count
    reason: Text
    owner: Text
    """The worker to which it happened."""
    alone: bool
    """Nothing else was in hand: the partition itself is to blame, or the machine."""


def record_failure(folder: Store, failure: Failure, ordinal: int) -> None:
    """Note a failure; of several workers that note the same ordinal one wins."""
    write_json(_path(folder, failure.partition, ordinal), asdict(failure), first_wins=True)


def list_failures(folder: Store) -> dict[int, int]:
    """How often each partition that ever failed has failed, from one listing."""
    failures: dict[int, int] = {}
    for partition, ordinal in numbers_in(list_names(folder / FAILURES), r"(\d{5,15})\.(\d{1,9})\.json"):
        failures[partition] = max(ordinal, failures.get(partition, 0))
    return failures


def read_failure(folder: Store, partition: int, ordinal: int) -> Failure:
    """A failure that `list_failures` has counted."""
    return read_document(_path(folder, partition, ordinal), Failure, CacheCorruptError)


def forget_failures(folder: Store) -> None:
    """Let every partition be tried again."""
    for name in list_names(folder / FAILURES):
        with contextlib.suppress(FileNotFoundError):
            (folder / FAILURES / name).unlink()


def _path(folder: Store, partition: int, ordinal: int) -> Store:
    return folder / FAILURES / f"{partition:05d}.{ordinal}.json"
