"""Documents as a stranger may write them: every entry of a document replaced by what it must not be."""

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import MENDABLE, PipelineError
from pipeline.stores.sealed import write_json

OUTSIDE = "../../outside/mine"
STRINGS = (
    OUTSIDE,
    "{outside}/mine",
    "",
    "x" * 10_000,
    "a\nb",
    "$(touch pwned)",
    "<script>alert(1)</script>",
    "..",
    "a\x1b[2Jb",
)
NUMBERS = (-1, 0, 2**31, 2**70, 10**400, float("nan"), float("inf"), -0.5, "12", True, [], None, {})
WRONG = ("x", 7, None, True, [[]], {"a": {"b": 1}}, [None], 1e308)
DELETED = object()
LONGEST_S = 20
Place = tuple[str | int, ...]


def places_of(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every entry of a document, however deep; of a list the first and the last."""
    if place:
        yield place, value
    if isinstance(value, dict):
        for name in value:
            yield from places_of(value[name], (*place, name))
    elif isinstance(value, list) and value:
        for index in {0, len(value) - 1}:
            yield from places_of(value[index], (*place, index))


def evil_for(value: Any) -> tuple[Any, ...]:
    """What is put into the place of a value."""
    if isinstance(value, str):
        return (*STRINGS, 7, None, [], {}, DELETED)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return (*WRONG, *STRINGS[:2], DELETED)
    return (*NUMBERS, DELETED)


def forgeries(document: dict[str, Any], outside: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every forgery of a document, with what was done to it."""
    for place, value in places_of(document):
        for evil in evil_for(value):
            if isinstance(evil, str):
                evil = evil.replace("{outside}", str(outside))
            yield f"{'.'.join(map(str, place))} = {str(evil)[:40]!r}", replaced(document, place, evil)
    yield "an entry more", document | {"entry_of_a_newer_version": 1}
    yield "nothing", {}


def replaced(document: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """The document with another value in one place."""
    forged = copy.deepcopy(document)
    inner: Any = forged
    for part in place[:-1]:
        inner = inner[part]
    if value is DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return forged


def put(path: Path, document: dict[str, Any], *, sealed: bool) -> None:
    """Write a document, with a seal that fits if it has one."""
    if sealed:
        path.unlink()
        write_json(path, document)
    else:
        path.write_text(json.dumps(document))


@contextmanager
def time_limit(seconds: int = LONGEST_S) -> Iterator[None]:
    """Fails what hangs."""

    def end(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(use: Callable[[], Any], where: Path, what: str) -> Any:
    """What `use` returns, None if it raises a PipelineError as it should: of one line that names a file in `where`."""
    try:
        with time_limit():
            return use()
    except PipelineError as error:
        message = str(error)
        assert "\n" not in message, (what, message)
        assert "\x1b" not in message, (what, message)
        assert len(message) < 2000, (what, message)
        assert str(where) in message or "was not captured" in message, (what, message)  # a temperature asked for
        return None
    except OSError as exc:  # the command prints it as one line
        if exc.errno not in MENDABLE or str(where) not in str(exc.filename):
            raise AssertionError(f"{what}: {exc}") from exc
        return None
    except Exception as exc:
        raise AssertionError(f"{what}: {type(exc).__name__}: {str(exc)[:300]}") from exc


def tree(folder: Path, but: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, but for those below another."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(place) / name != but]
        for name in names:
            status = (Path(place) / name).lstat()
            found[os.path.join(place, name)] = (status.st_size, status.st_mtime_ns)
    return found
