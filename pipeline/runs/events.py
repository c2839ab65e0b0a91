"""What every worker did, and when: a log for people, from which nothing is ever decided.

events/<rank>-<owner>.jsonl has an event a line, a JSON object with `time` (UTC, by the worker's own clock), `worker`,
`owner`, `what` and more of the kind. In a folder a line is appended as soon as it is known. An object store cannot
append: there events are put at every heartbeat and at the worker's end, as one object that grows, and as a new one
once that is large; a killed worker takes with it what it did since its last beat.

A line that cannot be written is left out, and one that is torn is skipped by the reader.
"""

import contextlib
import json
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypedDict

import msgspec

from pipeline.documents import Count, Text
from pipeline.files import list_names
from pipeline.parallel import in_threads
from pipeline.runs.notes import NOT_WRITTEN, PATIENCE_S
from pipeline.stores.objects import Location, ObjectPath

EVENTS = "events"
OBJECT_BYTES = 256 << 10
"""An object of this size grows no more."""
READERS = 16
"""Logs that are read at the same time."""
READ_BYTES = 1 << 20
"""Bytes of a log that are looked through for its last events: more than 5,000 of them."""
LONGEST_LINE = 2000
"""Characters of an event's details that are shown."""
SHOWN_APART = ("time", "worker", "owner", "what")


class EventLog:
    """The events of one worker."""

    def __init__(self, folder: Location, worker: int, owner: str) -> None:
        self._who = {"worker": worker, "owner": owner}
        stem = f"{worker:04d}-{owner}"
        place = folder / EVENTS
        self._lines: _Lines = _Objects(place, stem) if isinstance(place, ObjectPath) else _File(place / f"{stem}.jsonl")

    def note(self, what: str, **details: Any) -> None:
        """Something has happened just now."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(json.dumps({"time": now, **self._who, "what": what, **details}).encode() + b"\n")

    def flush(self) -> None:
        """Write what is only kept so far."""
        self._lines.flush()

    def close(self) -> None:
        """Write everything; the last call."""
        self._lines.flush()
        self._lines.close()


class _Lines(Protocol):
    def append(self, line: bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _File:
    """One write a line, at the end of the file wherever that is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._torn = False

    def append(self, line: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                self._torn = os.fstat(self._descriptor).st_size > 0  # perhaps, by an earlier life of that name
            line = b"\n" + line if self._torn else line
            self._torn = True
            self._torn = os.write(self._descriptor, line) < len(line)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Objects:
    """Objects that are written again as they grow, named by the time of their first event."""

    def __init__(self, folder: ObjectPath, stem: str) -> None:
        self._folder, self._stem = ObjectPath(str(folder), PATIENCE_S), stem
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._num_written = 0
        self._name = ""

    def append(self, line: bytes) -> None:
        with self._lock:
            self._name = self._name or f"{self._stem}.{time.time_ns() // 1_000_000}.jsonl"
            self._lines.append(line)

    def flush(self) -> None:
        with self._lock:
            name, lines = self._name, list(self._lines)
        if len(lines) == self._num_written:
            return
        contents = b"".join(lines)
        with contextlib.suppress(*NOT_WRITTEN):
            (self._folder / name).write_bytes(contents)
            self._num_written = len(lines)
            if len(contents) >= OBJECT_BYTES:
                with self._lock:
                    self._lines, self._num_written = self._lines[len(lines) :], 0
                    self._name = f"{self._stem}.{time.time_ns() // 1_000_000}.jsonl"

    def close(self) -> None:
        pass


def read_events(folder: Location, count: int) -> list[dict[str, Any]]:
    """The last `count` (1 or more) events of all workers by their own clocks, the oldest first."""
    place = folder / EVENTS
    contents = in_threads(lambda name: _end_of(place / name), list_names(place), READERS)
    events = [event for lines in contents for line in lines.splitlines() if (event := _event(line)) is not None]
    return sorted(events, key=lambda event: event["time"])[-count:]


def _end_of(path: Location) -> bytes:
    """The last READ_BYTES of a log in a folder; an object that holds more is none of ours."""
    if isinstance(path, ObjectPath):
        return path.read_bytes(at_most=READ_BYTES) or b""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - READ_BYTES, 0))
        return file.read(READ_BYTES)


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None if it is torn or none of ours."""
    try:
        event = json.loads(line)
        msgspec.convert(event, _Shown, strict=True)
    except (ValueError, RecursionError):
        return None
    return event


class _Shown(TypedDict):
    """What every event has."""

    time: Text
    worker: Count
    owner: Text
    what: Text


def describe_event(event: dict[str, Any]) -> str:
    """An event as a line for a person."""
    details = {name: value for name, value in event.items() if name not in SHOWN_APART and value not in ("", None)}
    text = ", ".join(f"{name} {value}" for name, value in details.items())[:LONGEST_LINE]
    return f"{event['time']} worker {event['worker']} ({event['owner']}): {event['what']}" + (
        f": {text}" if text else ""
    )
