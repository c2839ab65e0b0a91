"""Standard output and error, whatever they lead to: nothing, a pipe that nobody reads, a terminal that is gone.

Results go to standard output, everything else to standard error; a lost line changes no exit code.
"""

import errno
import io
import locale
import os
import sys
from typing import TextIO

import click

NOBODY_READS = {errno.EPIPE, errno.EIO, errno.EBADF}
"""What writing to a pipe without a reader, or to a terminal that was closed, comes to."""


def open_streams() -> None:
    """Make the three standard streams usable: a closed one leads nowhere; what an encoding lacks is escaped.

    A closed descriptor would be the next file's: what a library writes to standard error would go into a shard.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def require_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale, such as LC_ALL=C, has no name for most files and texts."""
    if sys.getfilesystemencoding() == "ascii" or locale.getpreferredencoding(False) == "ANSI_X3.4-1968":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def say(line: str) -> bool:
    """Write a line of the result; False if nobody reads it, which is not an error."""
    try:
        click.echo(line)
    except OSError as error:
        if error.errno not in NOBODY_READS:
            raise
        _lead_nowhere(sys.stdout)
        return False
    return True


def remark(line: str) -> None:
    """Write a line about the work to standard error, if that can be written."""
    try:
        click.echo(line, err=True)
    except OSError:
        _lead_nowhere(sys.stderr)


def close_streams() -> None:
    """Write what is pending, so that the interpreter has nothing to complain of at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _lead_nowhere(stream)


def _lead_nowhere(stream: TextIO) -> None:
    """What is buffered and what follows goes to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
