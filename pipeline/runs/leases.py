"""Leases: who works on which partition right now. They only save work; a commit record decides.

A lease is the file leases/<partition>.<generation>, made with O_EXCL, that names its owner. The owner
touches it now and then. One that has not been touched for `lease_s`, or whose owner is a dead process
of this host, is taken over by making the next generation: one of several takers wins, and there is
nothing to rename or to undo. A generation above 1 tells how often workers vanished with the partition.

Ages are differences of times that the file server has set, so the clocks of the workers do not matter.
"""

import contextlib
import os
from pathlib import Path

from pipeline.files import list_names, owner_is_dead

LEASES = "leases"


class Leases:
    """The leases of one worker, and a view of those of all."""

    def __init__(self, folder: Path, owner: str, lease_s: float) -> None:
        self._folder = folder / LEASES
        self._owner = owner
        self._lease_s = lease_s
        self._held: dict[int, int] = {}

    @property
    def held(self) -> list[int]:
        """Partitions that this worker has leased."""
        return sorted(self._held)

    def acquire(self, partition: int, generation: int = 1) -> bool:
        """Make the lease of this generation; False if another worker was first."""
        try:
            descriptor = os.open(self._path(partition, generation), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._owner.encode())
        finally:
            os.close(descriptor)
        self._held[partition] = generation
        return True

    def release(self, partition: int) -> None:
        """Give the partition back: its next taker starts at generation 1."""
        newest = self._held.pop(partition)
        for generation in range(newest, 0, -1):
            self._path(partition, generation).unlink(missing_ok=True)

    def release_all(self) -> None:
        """Give everything back."""
        for partition in self.held:
            self.release(partition)

    def renew(self) -> None:
        """Touch what is held. One that is gone was taken over and finished: the commit will tell."""
        for partition, generation in list(self._held.items()):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(partition, generation))

    def expired(self, partition: int, generation: int, now: float) -> bool:
        """True if nobody seems to work under this lease; `now` is the file server's time."""
        lease = read_lease(self._folder / lease_name(partition, generation))
        return lease is not None and (now - lease[1] > self._lease_s or owner_is_dead(lease[0]))

    def _path(self, partition: int, generation: int) -> Path:
        return self._folder / lease_name(partition, generation)


def lease_name(partition: int, generation: int) -> str:
    """The file of a lease."""
    return f"{partition:05d}.{generation}"


def list_leases(folder: Path) -> dict[int, int]:
    """The newest generation of every leased partition, from one listing."""
    leases: dict[int, int] = {}
    for name in list_names(folder / LEASES):
        partition, _, generation = name.partition(".")
        leases[int(partition)] = max(int(generation), leases.get(int(partition), 0))
    return leases


def read_lease(path: Path) -> tuple[str, float] | None:
    """Owner of a lease and the file server's time of its last renewal; None if it is gone."""
    try:
        return path.read_text(encoding="utf-8"), path.stat().st_mtime
    except FileNotFoundError:
        return None


def remove_leases(folder: Path) -> None:
    """Remove what vanished workers have left of their leases, once nothing is left to lease."""
    for name in list_names(folder / LEASES):
        (folder / LEASES / name).unlink(missing_ok=True)
