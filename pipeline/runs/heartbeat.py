"""A worker's record: that it lives, what it has in hand, how fast it is. Read by `pipeline status`.

workers/<rank>-<owner>.json is replaced at every beat of a thread that also renews the leases. The
record is advice, like the leases: a beat that fails is left out.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.documents import Count, Finite, Text
from pipeline.processes import owner_is_dead, owner_name
from pipeline.redaction import without_secrets
from pipeline.runs.ephemeral import NOT_WRITTEN, EphemeralFiles
from pipeline.runs.events import EventLog
from pipeline.runs.leases import Leases
from pipeline.runs.rank import Rank
from pipeline.stores.store import Store

WORKERS = "workers"
RECORD_NAME = re.compile(r"[0-9]{4,}-.*\.json")
BEATS_A_LEASE = 8
"""Heartbeats in the time after which a lease expires."""
RATE_BEATS = 4
"""Beats over which the present speed is taken."""
STALL_S = 1800.0
"""A worker that finishes no sequence for so long stops renewing its leases: it hangs."""
ENDED = ("done", "drained", "failed")


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """What a worker said of itself at its last beat."""

    worker: Count
    workers: Count
    owner: Text
    host: Text
    pid: Count
    state: Text
    """loading, capturing, preparing, draining or waiting; at its end done, drained or failed."""
    reason: Text
    held: list[Count]
    num_partitions: Count
    """Partitions that this worker has committed."""
    num_tokens: Count
    """Scored by this worker, whether committed yet or not; of a preparation, bytes of input."""
    bytes: Count
    seconds: Finite
    """How long the worker has lived."""
    tokens_per_s: Finite
    """The worker's speed over its last heartbeats."""
    beat_s: Finite
    """Seconds between two beats."""


class Heartbeat:
    """A context in which this worker beats: renews its leases and replaces its record."""

    def __init__(self, folder: Store, rank: Rank, lease_s: float, owner: str | None = None) -> None:
        self.owner = owner or owner_name()
        self.lease_s = lease_s
        self.leases = Leases(folder, self.owner, lease_s)
        self.events = EventLog(folder, rank.worker, self.owner)
        self._rank = rank
        self._files = EphemeralFiles(folder / WORKERS)
        self._name = f"{rank.worker:04d}-{self.owner}.json"
        self._state, self._reason, self._said = "loading", "", ""
        self._num_partitions, self._num_tokens, self._bytes = 0, 0, 0
        self._started = self._advanced = time.monotonic()
        self._recent = deque([(self._started, 0)], maxlen=RATE_BEATS + 1)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        for name in self._files.names():  # earlier lives of this worker
            prefix, _, owner = name.removesuffix(".json").partition("-")
            if prefix == f"{self._rank.worker:04d}" and owner_is_dead(owner):
                self._files.remove(name)
        self.events.note("started", workers=self._rank.workers)
        self._write(patient=True)  # here an error is the caller's: a folder in which nothing can be written
        self._thread.start()
        return self

    def __exit__(self, exc_type: type | None, exc: BaseException | None, traceback: Any) -> None:
        self._ended.set()
        self._thread.join()
        if self._state not in ENDED:
            self._state = "failed" if exc_type is not None else "done"
            self._reason = one_line(exc) if exc is not None else ""
        with contextlib.suppress(*NOT_WRITTEN):
            self.leases.release_all()
        with contextlib.suppress(*NOT_WRITTEN):
            self._write()
        self.events.note("ended", state=self._state, reason=self._reason)
        self.events.close()

    def say(self, state: str) -> None:
        """Change the state; the record follows at the next beat, or at once if it is the last state."""
        if state not in (self._said, *ENDED):
            self.events.note(state)
        self._state = self._said = state
        self._advanced = time.monotonic()

    def advance(self, num_tokens: int) -> None:
        """So many tokens more are scored."""
        self._num_tokens += num_tokens
        self._advanced = time.monotonic()

    def committed(self, num_bytes: int) -> None:
        """One partition more is committed."""
        self._num_partitions += 1
        self._bytes += num_bytes
        self._advanced = time.monotonic()

    def server_time(self) -> float | None:
        """The clock of the file server or the store: the time of this worker's record; None if none is written."""
        with contextlib.suppress(*NOT_WRITTEN):
            self._write()
            record = self._files.read(self._name)
            return record.time if record is not None else None
        return None

    def _run(self) -> None:
        while not self._ended.wait(self.lease_s / BEATS_A_LEASE):
            with contextlib.suppress(*NOT_WRITTEN):
                if time.monotonic() - self._advanced < STALL_S or self._state == "loading":
                    self.leases.renew()
            with contextlib.suppress(*NOT_WRITTEN):
                self._write()
            self.events.flush()

    def _write(self, *, patient: bool = False) -> None:
        with self._lock:
            self._files.replace(self._name, json.dumps(asdict(self._record())), patient=patient)

    def _record(self) -> WorkerRecord:
        now, tokens = time.monotonic(), self._num_tokens
        before, then = self._recent[0]
        self._recent.append((now, tokens))
        return WorkerRecord(
            worker=self._rank.worker,
            workers=self._rank.workers,
            owner=self.owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self._state,
            reason=self._reason,
            held=self.leases.held,
            num_partitions=self._num_partitions,
            num_tokens=tokens,
            bytes=self._bytes,
            seconds=round(now - self._started, 3),
            tokens_per_s=round((tokens - then) / max(now - before, 1e-3), 1),
            beat_s=self.lease_s / BEATS_A_LEASE,
        )


def one_line(exc: BaseException) -> str:
    """An exception as a line for a record."""
    return without_secrets(" ".join(f"{type(exc).__name__}: {exc}".split()))[:500]
