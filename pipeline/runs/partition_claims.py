"""Which partition a worker does next: its own slice, then what is free, then what others have left.

Every worker decides from listings of three folders, read once in a while: nothing is asked about
single partitions but the one that is about to be taken. A partition that has failed, or with which
workers have vanished twice, is a suspect: it is done alone, so that a failure is its own.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.cache.commits import is_committed, list_commits
from pipeline.drain import Drain
from pipeline.runs.failures import Failure, list_failures, record_failure
from pipeline.runs.heartbeat import Heartbeat
from pipeline.runs.leases import list_leases
from pipeline.runs.rank import Rank
from pipeline.stores.store import Store

SUSPECT_GENERATION = 3
"""From this generation of its lease on, two workers have vanished with a partition."""
LAST_GENERATION = 10
"""With a partition so many workers have vanished that it is set aside."""
LONGEST_POLL_S = 60.0


@dataclass
class _View:
    """What the listings said."""

    done: set[int] = field(default_factory=set)
    leases: dict[int, int] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    read_at: float = float("-inf")


class PartitionClaims:
    """Takes partitions for one worker and accounts for each: committed, failed or given back."""

    def __init__(
        self,
        folder: Store,
        partitions: Sequence[int],
        rank: Rank,
        heartbeat: Heartbeat,
        drain: Drain,
        *,
        max_failures: int,
    ) -> None:
        """Of the partitions of a run, `partitions` are those that may be taken now."""
        self._folder, self._partitions, self._planned = folder, partitions, frozenset(partitions)
        self._heartbeat, self._drain, self._max_failures = heartbeat, drain, max_failures
        self._leases, self._events = heartbeat.leases, heartbeat.events
        self._order = [partitions[index] for index in rank.order(len(partitions))]
        self._own = {partitions[index] for index in rank.share(len(partitions))}
        self._view = _View()
        self._free: deque[int] = deque()
        self._next: int | None = None
        self._alone = False
        self._taken_at: dict[int, float] = {}
        # Seconds between two looks. In the tail of a run idle workers make a few looks a second at most, all together.
        self.poll_s = min(heartbeat.lease_s / 4, 2 + rank.workers / 8, LONGEST_POLL_S)

    def wait(self) -> bool:
        """Take something to do, or wait for it; False once all is settled or a drain was asked for."""
        while not self._drain.requested:
            self._next = self._take_sound()
            self._alone = self._next is None
            if self._alone:
                self._next = self._take_suspect()
            if self._next is not None:
                return True
            if not self.unsettled():
                return False
            self._heartbeat.say("waiting")
            self._drain.sleep(self.poll_s)
            self._refresh()
        return False

    def stream(self) -> Iterator[int]:
        """What `wait` has taken and then, unless it is a suspect, more: each is taken as it is asked for."""
        while self._next is not None:
            partition, self._next = self._next, None
            yield partition
            if not self._alone and not self._drain.requested:
                self._next = self._take_sound()

    def settle(self, partition: int, *, won: bool) -> None:
        """The partition is committed, by this worker or by another that was faster."""
        seconds = round(time.monotonic() - self._taken_at[partition], 3)
        self._events.note("committed" if won else "lost", partition=partition, seconds=seconds)
        self._is_done(partition)

    def fail(self, reason: str) -> None:
        """Count a failure against everything in hand and give it back."""
        held = self._leases.held
        for partition in held:
            self._fail(partition, reason, ordinal=self._num_failures(partition) + 1, alone=len(held) == 1)
        self._next = None

    def reject(self, partition: int, reason: str) -> None:
        """Set a partition aside for good: trying again cannot help."""
        self._fail(partition, reason, ordinal=self._max_failures, alone=True)

    def unsettled(self) -> list[int]:
        """Partitions that are neither committed nor set aside, as of the last listing."""
        return [part for part in self._partitions if part not in self._view.done and not self._aside(part)]

    def set_aside(self) -> dict[int, int]:
        """Partitions that are set aside, and how often each has failed."""
        view = self._view
        return {part: view.failures[part] for part in sorted(view.failures) if self._aside(part)}

    def _fail(self, partition: int, reason: str, *, ordinal: int, alone: bool) -> None:
        failure = Failure(partition=partition, reason=reason, owner=self._heartbeat.owner, alone=alone)
        record_failure(self._folder, failure, ordinal)
        what = "set aside" if ordinal >= self._max_failures else "failed"
        self._events.note(what, partition=partition, failures=ordinal, reason=reason)
        self._view.failures[partition] = ordinal
        self._leases.release(partition)

    def _num_failures(self, partition: int) -> int:
        return self._view.failures.get(partition, 0)

    def _aside(self, partition: int) -> bool:
        return partition not in self._view.done and self._num_failures(partition) >= self._max_failures

    def _take_sound(self) -> int | None:
        looked = False
        while True:
            # What is not this worker's own is taken by a recent view: an old one offers what is long done.
            if not looked and not (self._free and self._free[0] in self._own):
                looked = True
                self._refresh_if_old()
            if not self._free:
                return self._take_over()
            partition = self._free.popleft()
            if self._take(partition, 1):
                return partition

    def _take_over(self) -> int | None:
        """A partition whose worker has vanished."""
        orphans = [
            (part, generation)
            for part, generation in self._foreign_leases()
            if generation < SUSPECT_GENERATION and part not in self._view.failures
        ]
        return self._take_expired(orphans)

    def _take_suspect(self) -> int | None:
        view = self._view
        for partition in sorted(view.failures):
            free = partition not in view.leases and partition not in view.done and not self._aside(partition)
            if free and self._take(partition, 1):
                return partition
        suspects = [(part, generation) for part, generation in self._foreign_leases() if not self._aside(part)]
        return self._take_expired(suspects)

    def _take_expired(self, leases: list[tuple[int, int]]) -> int | None:
        now = self._heartbeat.server_time() if leases else None
        if now is None:
            return None
        for partition, generation in leases:
            if not self._leases.expired(partition, generation, now):
                continue
            if self._take(partition, generation + 1):
                self._view.leases[partition] = generation + 1
                if generation < LAST_GENERATION:
                    return partition
                self.reject(partition, f"{generation} workers vanished while they had it in hand")
        return None

    def _foreign_leases(self) -> list[tuple[int, int]]:
        view, held = self._view, set(self._leases.held)
        leases = [(part, view.leases[part]) for part in sorted(view.leases)]
        return [(part, generation) for part, generation in leases if part not in view.done and part not in held]

    def _take(self, partition: int, generation: int) -> bool:
        if not self._leases.acquire(partition, generation):
            return False
        if is_committed(self._folder, partition):  # after taking the lease: its last holder commits, then releases
            self._is_done(partition)
            return False
        what = "claimed" if partition in self._own else "stolen"
        self._events.note(what, partition=partition, generation=generation)
        self._taken_at[partition] = time.monotonic()
        return True

    def _is_done(self, partition: int) -> None:
        self._view.done.add(partition)
        self._leases.release(partition)

    def _refresh_if_old(self) -> None:
        if time.monotonic() - self._view.read_at >= self.poll_s:
            self._refresh()

    def _refresh(self) -> None:
        leases = self._of_these(list_leases(self._folder))  # before the commits: one that ends in between is committed
        done = list_commits(self._folder)
        self._view = _View(done, leases, self._of_these(list_failures(self._folder)), time.monotonic())
        busy = done | leases.keys() | self._view.failures.keys()
        self._free = deque(part for part in self._order if part not in busy)

    def _of_these(self, found: dict[int, int]) -> dict[int, int]:
        return {partition: number for partition, number in found.items() if partition in self._planned}
