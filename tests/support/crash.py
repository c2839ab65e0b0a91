"""Work that is killed at every file operation in turn; as a command, the capture of test_capture.py.

    python -m tests.support.crash CORPUS FOLDER CONTAINER

Forks one child after the other. Each sends itself SIGKILL right before a file operation, a few
operations later than its forerunner got on its own, and continues what they left. The last one
finishes. Prints how many were killed.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.formats.containers import CONTAINERS
from tests.support.small import make_cache

WRITERS = [container.create for container in CONTAINERS.values()]
OPERATIONS = (
    *((os, name) for name in ("replace", "link", "unlink", "fsync")),
    *((writer, name) for writer in WRITERS for name in ("append", "close")),
)


def kill_before(count: int) -> None:
    """Let `count` file operations of this process happen and no more."""
    left = itertools.count(count, -1)

    def counted(operation: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return run

    for owner, name in OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))


def child_finishes(work: Callable[[], object], operations: int) -> bool:
    """Run `work` in a child that is killed before its operation number `operations`, if it gets that far."""
    pid = os.fork()
    if pid == 0:
        kill_before(operations)
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit(f"a child failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def kill_everywhere(work: Callable[[], object]) -> None:
    """Kill children that do `work` until one finishes; prints how many were killed."""
    killed = 0
    while not child_finishes(work, operations=killed):
        killed += 1
    print(killed)


if __name__ == "__main__":
    corpus, folder, container = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    kill_everywhere(lambda: make_cache(folder, corpus, encoding_threads=2, container=container))
