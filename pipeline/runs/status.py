"""How a run stands, from its folder alone: it asks no cluster, and works after all workers have died.

Partitions are counted from listings; commit records are read once each, several at a time.
"""

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.commits import commit_path, list_commits
from pipeline.documents import document_of, parse_json, printable
from pipeline.errors import CacheCorruptError
from pipeline.exit_codes import DONE, INCOMPLETE, SET_ASIDE
from pipeline.parallel import in_threads, map_in_threads
from pipeline.processes import owner_is_dead
from pipeline.progress import duration
from pipeline.runs.ephemeral import EphemeralFile, EphemeralFiles, server_time
from pipeline.runs.events import describe_event, read_events
from pipeline.runs.failures import list_failures, read_failure
from pipeline.runs.heartbeat import BEATS_A_LEASE, ENDED, RECORD_NAME, WORKERS, WorkerRecord
from pipeline.runs.leases import list_leases, read_lease
from pipeline.runs.outline import outline_of
from pipeline.runs.terms import read_terms
from pipeline.stores.places import store_of
from pipeline.stores.store import Store

EXIT_CODES = {"complete": DONE, "incomplete": INCOMPLETE, "failed": SET_ASIDE}
"""Of `pipeline status`. Failed: all that is left was set aside, and waits for a person."""
AT_WORK = ("capturing", "preparing")
WORKING = (*AT_WORK, "draining")
"""States of a worker that gets on."""
SLOW = 0.5
"""A worker below this share of the median speed is called slow."""
READERS = 16
SHOWN = 12
"""Workers or partitions that the text names of each kind; the JSON names all."""


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """A worker's last record and what became of it."""

    record: WorkerRecord
    age_s: float
    """Since its last heartbeat, by the server's clock."""
    state: str
    """As recorded, or 'vanished' if it did not say how it ended and is not heard of any more."""
    slow: bool


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at one moment."""

    cache: str
    """Or the corpus."""
    unit: str
    """What the counts of tokens count: of a preparation, whose tokens nobody knows yet, bytes of its input."""
    tasks: str
    """What the partitions are called."""
    phases: dict[str, list[int]]
    """Of a preparation: how many tasks of every phase are done, and how many there are."""
    state: str
    """complete, incomplete or failed."""
    num_partitions: int
    num_done: int
    running: dict[int, float]
    """Partitions under a live lease, and the age of its heartbeat in seconds."""
    orphaned: dict[int, float]
    """Partitions whose worker vanished and that nobody has taken over yet."""
    retrying: dict[int, str]
    """Partitions that have failed and will be tried again, with the reason."""
    failed: dict[int, str]
    """Partitions that were set aside, with the reason."""
    num_tokens: int
    num_tokens_done: int
    bytes: int
    tokens_per_s_now: float
    tokens_per_s_so_far: float
    eta_s: float | None
    workers: list[WorkerStatus]
    events: list[dict[str, Any]]
    """The last ones, as many as were asked for."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]

    def to_json(self) -> str:
        """All of it, for other programs."""
        return json.dumps(asdict(self) | {"exit_code": self.exit_code}, indent=1)


class StatusReader:
    """Reads the status of one run again and again; what cannot change is read once."""

    def __init__(self, folder: str | Path | Store) -> None:
        self.place = store_of(folder)
        self.outline = outline_of(self.place)
        self.folder = self.outline.folder
        self._records = EphemeralFiles(self.folder / WORKERS)
        self._commits: dict[int, tuple[int, int, float]] = {}

    def read(self, num_events: int = 0) -> RunStatus:
        """The status now, with the last so many events. Raises CacheCorruptError if a record is damaged."""
        outline, now = self.outline, server_time(self.folder / WORKERS)
        self._terms = read_terms(self.folder, outline.settings)
        planned = outline.planned
        leases = {part: generation for part, generation in list_leases(self.folder).items() if part in planned}
        done = list_commits(self.folder) & planned
        commits = self._read_commits(done)
        failures = {part: count for part, count in list_failures(self.folder).items() if part in planned - done}
        aside = {part: count for part, count in failures.items() if count >= self._terms.max_failures}
        running, orphaned = self._leases({part: leases[part] for part in leases if part not in done}, now)
        workers = self._workers(now)
        tokens = outline.total if outline.is_finished else sum(commit[0] for commit in commits)
        speed = sum(worker.record.tokens_per_s for worker in workers if worker.state in WORKING)
        left = len(planned) - len(done) - len(aside)
        return RunStatus(
            cache=str(self.place),
            unit=outline.unit,
            tasks=outline.tasks,
            phases={name: [len(done & {*range(*span)}), span[1] - span[0]] for name, span in outline.phases.items()},
            state="incomplete" if left else "failed" if aside else "complete",
            num_partitions=len(planned),
            num_done=len(done),
            running=running,
            orphaned=orphaned,
            retrying=self._reasons({part: failures[part] for part in failures if part not in aside}),
            failed=self._reasons(aside),
            num_tokens=outline.total,
            num_tokens_done=tokens,
            bytes=sum(commit[1] for commit in commits),
            tokens_per_s_now=round(speed, 1),
            tokens_per_s_so_far=round(self._speed_so_far(commits, now if running else None), 1),
            eta_s=round((outline.total - tokens) / speed, 1) if speed and left else None,
            workers=workers,
            events=read_events(self.folder, num_events) if num_events else [],
        )

    def _read_commits(self, done: AbstractSet[int]) -> list[tuple[int, int, float]]:
        """Tokens, bytes and time of the commits of the partitions; each is read once."""

        def read(partition: int) -> tuple[int, tuple[int, int, float]] | None:
            with contextlib.suppress(FileNotFoundError):  # `verify --repair` may take a record away
                written = commit_path(self.folder, partition).changed_at()
                amounts = self.outline.amounts(partition)
                return None if amounts is None else (partition, (amounts.done, amounts.bytes, written))
            return None

        self._commits.update(filter(None, in_threads(read, done - self._commits.keys(), READERS)))
        return [self._commits[partition] for partition in done if partition in self._commits]

    def _speed_so_far(self, commits: list[tuple[int, int, float]], now: float | None) -> float:
        """Tokens over the time since the plan was made, until the last commit or, if work goes on, until now."""
        end = now if now is not None else max((written for *_, written in commits), default=0.0)
        seconds = end - self.outline.began.changed_at()
        return sum(commit[0] for commit in commits) / seconds if commits and seconds > 0 else 0.0

    def _leases(self, leases: dict[int, int], now: float) -> tuple[dict[int, float], dict[int, float]]:
        newest = sorted(leases.items())
        found = map_in_threads(lambda lease: read_lease(self.folder, *lease), newest, READERS)
        running: dict[int, float] = {}
        orphaned: dict[int, float] = {}
        for (partition, _), lease in zip(newest, found):
            if lease is not None:
                age = round(max(now - lease.time, 0.0), 1)
                (orphaned if age > self._terms.lease_s or owner_is_dead(lease.text) else running)[partition] = age
        return running, orphaned

    def _reasons(self, failures: dict[int, int]) -> dict[int, str]:
        last = sorted(failures.items())

        def read(failure: tuple[int, int]) -> str | None:
            with contextlib.suppress(FileNotFoundError):  # --retry-failed may have taken it away
                return read_failure(self.folder, *failure).reason
            return None

        found = map_in_threads(read, last, READERS)
        return {partition: reason for (partition, _), reason in zip(last, found) if reason is not None}

    def _workers(self, now: float) -> list[WorkerStatus]:
        names = sorted(name for name in self._records.names() if RECORD_NAME.fullmatch(name))
        files = filter(None, map_in_threads(self._records.read, names, READERS))
        found = [(self._record(file), max(now - file.time, 0.0)) for file in files]
        states = [_state(record, age) for record, age in found]
        speeds = [record.tokens_per_s for (record, _), state in zip(found, states) if state in AT_WORK]
        limit = SLOW * statistics.median(speeds) if speeds else 0.0
        return [
            WorkerStatus(
                record=record,
                age_s=round(age, 1),
                state=state,
                slow=state in AT_WORK and record.tokens_per_s < limit,
            )
            for (record, age), state in zip(found, states)
        ]

    def _record(self, file: EphemeralFile) -> WorkerRecord:
        where = self.folder / WORKERS / file.name
        document = parse_json(file.text, where, CacheCorruptError)
        return document_of(WorkerRecord, document, where, CacheCorruptError, newer=True)


def _state(record: WorkerRecord, age_s: float) -> str:
    ended = record.state in ENDED
    gone = age_s > record.beat_s * BEATS_A_LEASE or owner_is_dead(record.owner)
    return "vanished" if gone and not ended else record.state


def describe(status: RunStatus) -> list[str]:
    """The status as lines for a person."""
    counts = Counter(worker.state for worker in status.workers)
    lines = [
        f"{status.cache}: {status.state}: {status.num_done:,} of {status.num_partitions:,} {status.tasks}, "
        f"{status.num_tokens_done:,} of {status.num_tokens:,} {status.unit} "
        f"({status.num_tokens_done / max(status.num_tokens, 1):.1%}), {status.bytes / 1e9:,.2f} GB",
        f"{status.tokens_per_s_now:,.0f} {status.unit}/s now, {status.tokens_per_s_so_far:,.0f} since the run began"
        + (f"; {duration(status.eta_s)} left" if status.eta_s is not None else ""),
    ]
    if status.phases:
        lines.append(", ".join(f"{name} {done} of {count}" for name, (done, count) in status.phases.items() if count))
    if counts:
        lines.append("workers: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    if status.running:
        oldest = max(status.running.values())
        lines.append(f"running: {len(status.running)} {status.tasks}, last heartbeat {oldest:.0f}s ago at most")
    lines += _named(
        "orphaned",
        status,
        {part: f"its worker was last heard of {duration(age)} ago" for part, age in status.orphaned.items()},
    )
    lines += _named("retrying", status, status.retrying)
    lines += _named("failed", status, status.failed)
    lines += _workers_named(status)
    lines += map(describe_event, status.events)
    return list(map(printable, lines))


def _named(what: str, status: RunStatus, partitions: dict[int, str]) -> list[str]:
    lines = [
        f"{what}: {status.tasks.removesuffix('s')} {part}: {text}" for part, text in list(partitions.items())[:SHOWN]
    ]
    return lines + ([f"{what}: {len(partitions) - SHOWN} more"] if len(partitions) > SHOWN else [])


def _workers_named(status: RunStatus) -> list[str]:
    """The workers that a person should look at."""
    lines = []
    for worker in status.workers:
        record = worker.record
        where = f"worker {record.worker} on {record.host} (pid {record.pid})"
        if worker.slow:
            lines.append(f"slow: {where}: {record.tokens_per_s:,.0f} {status.unit}/s")
        elif worker.state == "vanished":
            lines.append(
                f"vanished: {where}: last heard of {duration(worker.age_s)} ago, {record.num_partitions} {status.tasks}"
            )
        elif worker.state == "failed":
            lines.append(f"ended: {where}: {record.reason}")
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more such workers"] if len(lines) > SHOWN else [])
