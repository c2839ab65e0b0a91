"""Leaving in good order: the first signal asks for a drain, the second leaves at once.

SIGTERM, SIGUSR1 (Slurm's warning), SIGINT and SIGHUP (a terminal that is closed) only set a flag. What is in hand is
finished, so a drain takes as long as the rest of the current shard and the rows in flight: one shard's time at most.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.exit_codes import AGAIN
from pipeline.stopping import ECHO_S, heard

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_NAP_S = 0.1


class Drain:
    """A context in which signals ask this process to drain. Outside the main thread it hears none."""

    def __init__(self, on_leave: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._on_leave = on_leave
        self._requested_at = 0.0
        self._nothing_in_hand = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Drain":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in heard(SIGNALS)}
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Sleep, but not past a request to drain."""
        deadline = time.monotonic() + seconds
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _NAP_S))

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Processes started inside never receive the signals; this one leaves at once if it does.

        A signal mask is inherited. Another thread of this process must run to receive what this one blocks.
        """
        if not self._previous:
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._nothing_in_hand = True
        try:
            yield
        finally:
            self._nothing_in_hand = False
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _handle(self, number: int, frame: Any) -> None:
        # A plain flag: taking a lock here could wait for the very code that was interrupted.
        if self.requested and time.monotonic() - self._requested_at < ECHO_S:
            return
        if self.requested or self._nothing_in_hand:
            with contextlib.suppress(Exception):
                self._on_leave()
            os._exit(AGAIN)
        self.requested, self._requested_at = True, time.monotonic()
