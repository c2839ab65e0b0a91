"""A watch on what may hang in code that no exception reaches: an engine, a file system under a loader of batches.

It ends the process, with a line, once something has taken longer than it may.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from pipeline.exit_codes import STALLED
from pipeline.progress import duration

LAST_WORDS_S = 30.0
"""Seconds in which leases are released and the end is written down."""
LOOKS, LONGEST_LOOK_S = 20, 60.0
"""How often the watch looks within its limit, and the seconds between two looks at most."""


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
        """Watch, from now on, in place of what was watched before; `what` is for a message."""
        self._watched = (what, time.monotonic(), self.limit_s * factor)

    def rest(self) -> None:
        """Nothing is to be watched now."""
        self._watched = None

    @contextmanager
    def watching(self, what: str, factor: float = 1.0) -> Iterator[None]:
        """Watch for the time of the block."""
        self.watch(what, factor)
        try:
            yield
        finally:
            self.rest()

    def _look(self) -> None:
        while not self._closed.wait(min(self.limit_s / LOOKS, LONGEST_LOOK_S)):
            watched = self._watched
            if watched is not None and time.monotonic() - watched[1] > watched[2]:
                what, _, limit_s = watched
                self._give_up(
                    f"{what}: no progress for {duration(limit_s)}; given up: run the same command again, with more "
                    "--stall-seconds if it only needs longer."
                )
                return


def end_process(before: Callable[[], None] = lambda: None) -> None:
    """End this process and all that it has started; `before` is called first, and has LAST_WORDS_S."""
    last_words = threading.Thread(target=before, daemon=True)
    last_words.start()
    last_words.join(LAST_WORDS_S)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(STALLED)
