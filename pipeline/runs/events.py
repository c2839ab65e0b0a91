"""What every worker did, and when: a log for people, from which nothing is ever decided.

events/<rank>-<owner>.jsonl has an event a line, a JSON object with `time` (UTC, by the worker's own clock), `worker`,
`owner`, `what` and more of the kind. In a folder a line is appended as soon as it is known. An object store cannot
append: there events are put at every heartbeat and at the worker's end, as one object that grows, and as a new one
once that is large; a killed worker takes with it what it did since its last beat.

A line that cannot be written is left out, and one that is torn is skipped by the reader.
"""

import json
from datetime import UTC, datetime
from typing import Any, TypedDict

import msgspec

from pipeline.documents import Count, Text
from pipeline.parallel import in_threads
from pipeline.runs.ephemeral import PATIENCE_S
from pipeline.stores.numbered import list_names
from pipeline.stores.store import Store

EVENTS = "events"
READERS = 16
"""Logs that are read at the same time."""
READ_BYTES = 1 << 20
"""Bytes of a log that are looked through for its last events: more than 5,000 of them."""
LONGEST_LINE = 2000
"""Characters of an event's details that are shown."""
SHOWN_APART = ("time", "worker", "owner", "what")


class EventLog:
    """The events of one worker."""

    def __init__(self, folder: Store, worker: int, owner: str) -> None:
        self._who = {"worker": worker, "owner": owner}
        self._lines = (folder / EVENTS / f"{worker:04d}-{owner}.jsonl").hasty(PATIENCE_S).log()

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


def read_events(folder: Store, count: int) -> list[dict[str, Any]]:
    """The last `count` (1 or more) events of all workers by their own clocks, the oldest first."""
    place = folder / EVENTS
    contents = in_threads(lambda name: (place / name).read_end(READ_BYTES), list_names(place), READERS)
    events = [event for lines in contents for line in lines.splitlines() if (event := _event(line)) is not None]
    return sorted(events, key=lambda event: event["time"])[-count:]


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
