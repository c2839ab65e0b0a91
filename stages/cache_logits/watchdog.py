"""A watch on an engine: one that finishes nothing, or does not get loaded, ends its process with a line.

An engine may hang in code that no exception reaches. Only its own time counts: not the time in which it waits for
requests, or in which what it gave is written. What is committed stays, leases are released, no partition is blamed.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

import psutil

from pipeline.progress import duration
from pipeline.targets import SparseTargets
from stages.cache_logits.engine import Engine, Request

STALLED = 70
"""Exit code of a process whose engine made no progress."""
LOADING_FACTOR = 4
"""Loading may take so many times as long: nothing tells how far it is."""
LAST_WORDS_S = 30.0
"""Seconds in which leases are released and the end is written down."""
LOOKS = 20
"""How often the watch looks within its limit."""


class Watchdog:
    """Calls `give_up(line)` from a thread of its own once something under watch has taken longer than its limit."""

    def __init__(self, limit_s: float, give_up: Callable[[str], None]) -> None:
        self.limit_s, self._give_up = limit_s, give_up
        self._watched: tuple[str, float, float] | None = None  # what, since when, how long it may take
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def watch(self, what: str, factor: float = 1.0) -> None:
        """From now on: `what`, for a message; in place of what was watched before."""
        self._watched = (what, time.monotonic(), self.limit_s * factor)

    def rest(self) -> None:
        """Nothing is to be watched now."""
        self._watched = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For the time in which an engine is made."""
        self.watch("loading the teacher", LOADING_FACTOR)
        try:
            yield
        finally:
            self.rest()

    def _look(self) -> None:
        while not self._closed.wait(self.limit_s / LOOKS):
            watched = self._watched
            if watched is not None and time.monotonic() - watched[1] > watched[2]:
                what, _, limit_s = watched
                self._give_up(
                    f"{what}: no progress for {duration(limit_s)}; given up: run the same command again, with more "
                    "--stall-seconds if it only needs longer."
                )
                return


class WatchedEngine:
    """An engine that a watchdog looks at while it is at work."""

    def __init__(self, engine: Engine, watchdog: Watchdog) -> None:
        self._engine, self._watchdog = engine, watchdog

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """What the engine gives."""
        try:
            self._work()
            for scored in self._engine.score(self._handed_over(requests)):
                self._watchdog.rest()
                yield scored
                self._work()
        finally:
            self._watchdog.rest()

    def close(self) -> None:
        """Stop whatever the engine started."""
        self._engine.close()

    def _handed_over(self, requests: Iterable[Request]) -> Iterator[Request]:
        self._watchdog.rest()
        for request in requests:
            self._work()
            yield request
            self._watchdog.rest()
        self._work()

    def _work(self) -> None:
        self._watchdog.watch("the engine has requests and finishes none")


def end_process(before: Callable[[], None]) -> None:
    """End this process and all that it has started; `before` is called first, and has LAST_WORDS_S."""
    last_words = threading.Thread(target=before, daemon=True)
    last_words.start()
    last_words.join(LAST_WORDS_S)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(STALLED)
