"""What a command's exit code says to a shell, a scheduler or a launcher."""

DONE = 0
"""All that was asked for is there."""
DISAGREES = 1
"""`verify` found damage, or `audit` a disagreement."""
MENDABLE = 2
"""A mistake or fault that one line explains and the user can mend: starting again does not."""
INCOMPLETE = 3
"""`status`: something is left to do."""
SET_ASIDE = 4
"""`status`: all that is left was set aside after failures, and waits for a person."""
STALLED = 70
"""An engine or a file system made no progress (EX_SOFTWARE of sysexits.h)."""
AGAIN = 75
"""Drained after a signal, or an object store that does not answer (EX_TEMPFAIL): run the same command again."""


def of_signal(number: int) -> int:
    """The code of a command that a signal ended while it had nothing to drain, as shells have it."""
    return 128 + number
