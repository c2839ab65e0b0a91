"""What a command has to do before it loads anything large, or anything that could be somebody else's."""

import os
import signal
import sys
from pathlib import Path


def begin() -> None:
    """As the command line, until it listens: Ctrl-C ends the process without Python's traceback, and no module is taken
    from the working directory. In a library: nothing."""
    _, *started_by = sys.orig_argv
    if any(Path(word).name in ("pipeline", "pipeline.cli") for word in started_by[:4]):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _leave_working_directory()


def _leave_working_directory() -> None:
    """Take no module from the working directory, which `python -m` puts first, in this process and those it starts.

    A stages/ or settings.py of the user's may lie there. Beside a pipeline.py, `python -m pipeline.cli` gets no further
    than that file; `python -P -m` and the command `pipeline` do.
    """
    if sys.path[0] in ("", os.getcwd()) and Path.cwd() != Path(__file__).parent.parent:
        del sys.path[0]
    os.environ.setdefault("PYTHONSAFEPATH", "1")
