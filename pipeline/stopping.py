"""Ending on a signal: at the first one the command unwinds, and its half-made files go; at a second one it is gone.

Commands that have something to finish or to save ask for more time with `pipeline.drain`.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.exit_codes import of_signal

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C and the end of the terminal or of its ssh, which all of its processes get, and the word of others.

Slurm's warning before a time limit may come while a worker starts, when it has nothing in hand yet: then too the log
says why the worker is gone.
"""
ECHO_S = 2.0
"""Signals that follow the first so closely are the same request: a launcher of several threads that is killed may
send its parent-death signal once for every thread."""


class Stopped(KeyboardInterrupt):
    """A signal ended the command."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}.")
        self.exit_code = of_signal(number)


class Unwinding:
    """Raises Stopped in the main thread at the first signal, and leaves at one that is no echo of it."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self) -> None:
        """Hear signals from now on; one that this process was started to ignore, as by nohup, stays ignored."""
        for number in heard(SIGNALS):
            signal.signal(number, self._handle)

    def end(self) -> None:
        """Nothing is left to unwind: the next signal ends the process."""
        self._since = float("-inf")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            raise Stopped(number)
        if time.monotonic() - self._since > ECHO_S:
            os._exit(of_signal(number))


def heard(signals: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Those that this process does not ignore."""
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def starting_processes() -> Iterator[None]:
    """For starting processes that this one ends: signals of the terminal never reach them, and none cuts a start short.

    A process that is given only half of what it is to do says so with a traceback.
    """
    from multiprocessing import (
        resource_tracker,  # which would take longer to load than all else that a command begins with
    )

    kept: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, lambda *of: kept.append(of[0])) for number in heard(SIGNALS) if is_main}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which they inherit
    try:
        resource_tracker.ensure_running()  # a process too; it ends with an unblocking of its own
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in previous.items():
            signal.signal(number, handler)
        for first in kept[:1]:
            signal.raise_signal(first)


_interrupted = threading.Event()


def interrupted() -> threading.Event:
    """What is set when all that wait in this process are to wait no more."""
    return _interrupted


def stop_waiting() -> None:
    """Let everything fail that waits now, as for a silent store: this command is about to leave."""
    global _interrupted
    waiting, _interrupted = _interrupted, threading.Event()
    waiting.set()
