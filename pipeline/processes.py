"""Processes: who they are among those that share a folder, and that they take their family with them when they die."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

PARENT = "PIPELINE_PARENT"
"""Environment variable: pid of the launcher, and the signal that this process gets when it dies."""
_PR_SET_PDEATHSIG = 1


def owner_name() -> str:
    """Name of this process, unique among processes that may share the folder: host, pid namespace, pid."""
    namespace = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return f"{socket.gethostname()}.{namespace}.{os.getpid()}"


def owner_is_dead(owner: str) -> bool:
    """True only if `owner` is a process of this host and pid namespace that no longer runs."""
    place, _, pid = owner.rpartition(".")
    if place != owner_name().rpartition(".")[0] or not re.fullmatch("[0-9]{1,9}", pid):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class Child:
    """A `pipeline` command in a session of its own, its output appended to a log.

    If this process dies, however it dies, the command receives `orphaned`.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        orphaned: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, **following(orphaned)},
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Exit code once it has ended; then nothing that it started is left either."""
        code = self._process.poll()
        if code is not None:
            self.kill()
        return code

    def wait(self) -> int:
        """Wait for the end."""
        self._process.wait()
        code = self.poll()
        assert code is not None
        return code

    def drain(self) -> None:
        """Ask the command itself, and not what it started, to finish what it has in hand."""
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the whole session's group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def following(orphaned: signal.Signals) -> dict[str, str]:
    """Environment of a `pipeline` command that is to receive `orphaned` when this process dies, however it dies."""
    return {PARENT: f"{os.getpid()} {orphaned.value}"}


def follow_parent() -> None:
    """Ask the kernel for the signal that the launcher of this process wishes it to get if the launcher dies.

    The kernel tells children alone: a process that torchrun has started is torchrun's to end.
    """
    parent, _, number = os.environ.get(PARENT, "").partition(" ")
    if not parent:
        return
    if os.getppid() == int(parent):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if not os.path.exists(f"/proc/{parent}"):  # it died before, perhaps just now
        os.kill(os.getpid(), int(number))


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log, for a message."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-count:])
    return ""
