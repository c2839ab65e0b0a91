"""Processes that a test has started and not ended: found after each, killed, and a failure of their own."""

import contextlib
import os
from collections.abc import Iterator

import psutil

MARK = "PIPELINE_TESTS"
"""Environment variable of all that a run of the tests starts: the pid of pytest."""
_kept: set[int] = set()
_SERVICES = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
"""Of Python itself: it starts them when they are first needed and ends them when it ends."""


@contextlib.contextmanager
def kept(pid: int) -> Iterator[None]:
    """A process that outlives a test on purpose, until the end of the context: a server that many tests share."""
    _kept.add(pid)
    try:
        yield
    finally:
        _kept.discard(pid)


def children() -> list[psutil.Process]:
    """What this process has started, and what that has started, except what is kept and what belongs to Python."""
    return [process for process in psutil.Process().children(recursive=True) if not _is_expected(process)]


def marked() -> list[psutil.Process]:
    """What was started by a program that this process has started, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(os.getpid()) and not _is_expected(process):
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def end(processes: list[psutil.Process]) -> list[str]:
    """Kill them, whatever they do about other signals; a line for each that was still running."""
    lines = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if is_running(process):
                lines.append(f"process {process.pid}: {' '.join(process.cmdline()) or process.name()}"[:200])
            process.kill()
    psutil.wait_procs(processes, timeout=60)
    return lines


def is_running(process: psutil.Process) -> bool:
    """Whether it has not ended; one that nobody has waited for has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_expected(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
        family = [process.pid, *(parent.pid for parent in process.parents())]
    except psutil.Error:
        return True  # has ended by itself
    return any(service in line for service in _SERVICES) or not _kept.isdisjoint(family)
