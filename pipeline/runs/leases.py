"""Leases: who works on which partition right now. They only save work; a commit record decides.

A lease is the file leases/<partition>.<generation>, which one worker alone can make, and which names its owner. The
owner renews it now and then. One that has not been renewed for `lease_s`, or whose owner is a dead process
of this host, is taken over by making the next generation: one of several takers wins, and there is
nothing to rename or to undo. A generation above 1 tells how often workers vanished with the partition.

Ages are differences of times that the file server or the store has set, so the clocks of the workers do not matter.
"""

from pipeline.processes import owner_is_dead
from pipeline.runs.ephemeral import EphemeralFile, EphemeralFiles
from pipeline.stores.numbered import numbers_in
from pipeline.stores.store import Store

LEASES = "leases"


class Leases:
    """The leases of one worker, and a view of those of all."""

    def __init__(self, folder: Store, owner: str, lease_s: float) -> None:
        self._files = EphemeralFiles(folder / LEASES)
        self._owner = owner
        self._lease_s = lease_s
        self._held: dict[int, int] = {}

    @property
    def held(self) -> list[int]:
        """Partitions that this worker has leased."""
        return sorted(self._held)

    def acquire(self, partition: int, generation: int = 1) -> bool:
        """Make the lease of this generation; False if another worker was first."""
        if partition in self._held or not self._files.create(lease_name(partition, generation), self._owner):
            return False
        self._held[partition] = generation
        return True

    def release(self, partition: int) -> None:
        """Give the partition back: its next taker starts at generation 1."""
        newest = self._held.pop(partition)
        for generation in range(newest, 0, -1):
            self._files.remove(lease_name(partition, generation))

    def release_all(self) -> None:
        """Give everything back."""
        for partition in self.held:
            self.release(partition)

    def renew(self) -> None:
        """Renew what is held. One that is gone was taken over and finished: the commit will tell."""
        for partition, generation in list(self._held.items()):
            self._files.renew(lease_name(partition, generation))

    def expired(self, partition: int, generation: int, now: float) -> bool:
        """True if nobody seems to work under this lease; `now` is the server's time."""
        lease = self._files.read(lease_name(partition, generation))
        return lease is not None and (now - lease.time > self._lease_s or owner_is_dead(lease.text))


def lease_name(partition: int, generation: int) -> str:
    """The file of a lease."""
    return f"{partition:05d}.{generation}"


def list_leases(folder: Store) -> dict[int, int]:
    """The newest generation of every leased partition, from one listing."""
    leases: dict[int, int] = {}
    for partition, generation in numbers_in(EphemeralFiles(folder / LEASES).names(), r"(\d{5,15})\.(\d{1,3})"):
        leases[partition] = max(generation, leases.get(partition, 0))
    return leases


def read_lease(folder: Store, partition: int, generation: int) -> EphemeralFile | None:
    """A lease, whose text is its owner and whose time that of its last renewal; None if it is gone."""
    return EphemeralFiles(folder / LEASES).read(lease_name(partition, generation))


def remove_leases(folder: Store) -> None:
    """Remove what vanished workers have left of their leases, once nothing is left to lease."""
    files = EphemeralFiles(folder / LEASES)
    for name in files.names():
        files.remove(name)
