"""What a long run says while it works. A stage is handed a Reporter; only the command line prints."""

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from pipeline.documents import printable

LOGGER = logging.getLogger("pipeline")
"""Loggers of modules, such as that of silent stores, are below it."""
LOG_INTERVAL_S = 60.0
FIRST_LOG_INTERVAL_S = 15.0
"""Seconds between two progress lines where there is no terminal; in the first minutes they come sooner."""
FIRST_MINUTES_S = 180.0
WINDOW_S = 60.0
WINDOW_SAMPLES = 8
"""A rate is that of the last minute, or of the last samples where a minute has fewer."""
SHORTEST_WINDOW_S = 3.0
"""A window shorter than this says nothing of a rate."""


class Progress:
    """Counts work done of a total; this one says nothing."""

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more is done; `note` is shown beside the rate. The first call starts the clock."""

    def recall(self, amount: int) -> None:
        """`amount` was done before, or came for nothing: it counts towards the total and not towards the rate."""

    def close(self) -> None:
        """No more will come."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class Reporter:
    """What a stage uses when it is called as a library: lines go to the logger `pipeline`, work is not counted.

    Python shows warnings on standard error where a program has set up no logging, and nothing else.
    """

    def log(self, line: str) -> None:
        """One line for a person to read."""
        self.write(line, logging.INFO)

    def note(self, line: str) -> None:
        """A line that a person should know of: what is skipped, slow, unusual or has failed."""
        self.write(line, logging.WARNING)

    def write(self, line: str, level: int) -> None:
        """Where lines go; `level` is one of the standard library's logging. Other reporters replace this."""
        LOGGER.log(level, "%s", line)

    def progress(self, what: str, total: int, unit: str = "tokens") -> Progress:
        """A counter of work towards `total`."""
        return Progress()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """For work that cannot be counted, such as loading a model: says now and then that it still goes on."""
        yield


class KeptLines(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str, level: int) -> None:
        """Keep a line."""
        self.lines.append(line)


class TerminalReporter(Reporter):
    """Writes to standard error: a bar on a terminal, a plain line now and then elsewhere."""

    def write(self, line: str, level: int) -> None:
        """Write a line, above the bar if there is one, whatever its level."""
        with contextlib.suppress(OSError):  # a pipe that nobody reads, a terminal that was closed: the work goes on
            tqdm.write(printable(line, newline="\n"), file=sys.stderr)
            sys.stderr.flush()

    def progress(self, what: str, total: int, unit: str = "tokens") -> Progress:
        """A bar, or lines."""
        return _Bar(what, total, unit) if sys.stderr.isatty() else _Lines(what, total, unit, self)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A line every now and then, from a thread that ends with the block."""
        over, started = threading.Event(), time.monotonic()

        def repeat() -> None:
            while not over.wait(_interval(time.monotonic() - started)):
                self.log(f"{what}: {duration(time.monotonic() - started)} so far")

        thread = threading.Thread(target=repeat, name="waiting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class Rate:
    """How fast work is done: lately, and since its first result; what came before that is no time of work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()
        self._done = 0
        self._first: tuple[float, int] | None = None

    def add(self, amount: int) -> None:
        """`amount` has just been finished."""
        now = self._clock()
        self._done += amount
        if self._first is None:
            self._first = (now, self._done)  # nobody knows when it was begun
        if not self._samples or now - self._samples[-1][0] >= WINDOW_S / 60:
            self._samples.append((now, self._done))
        while len(self._samples) > WINDOW_SAMPLES and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()

    @property
    def running_s(self) -> float:
        """Seconds since the first result."""
        return self._clock() - self._first[0] if self._first else 0.0

    def lately(self) -> float | None:
        """Amount a second in the last minute; None while there is too little to tell."""
        return self._since(self._samples[0] if self._samples else None)

    def overall(self) -> float | None:
        """Amount a second since the first result; None if there is too little to tell."""
        return self._since(self._first)

    def _since(self, sample: tuple[float, int] | None) -> float | None:
        if sample is None or self._clock() - sample[0] < SHORTEST_WINDOW_S or self._done == sample[1]:
            return None
        return (self._done - sample[1]) / (self._clock() - sample[0])


class _Bar(Progress):
    """tqdm's, from the first result on: its clock starts when it is made, and `initial` is no work to it."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._options = {"total": total, "desc": what, "unit": f" {unit}", "unit_scale": True, "dynamic_ncols": True}
        self._bar: tqdm | None = None
        self._recalled = 0

    def advance(self, amount: int, note: str = "") -> None:
        if self._bar is None:
            self._bar = tqdm(initial=self._recalled + amount, **self._options)
            amount = 0
        with contextlib.suppress(OSError):  # as in TerminalReporter.log
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)

    def recall(self, amount: int) -> None:
        self._recalled += amount
        if self._bar is not None:
            self._bar.n += amount
            self._bar.initial += amount
            self._bar.last_print_n += amount

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


class _Lines(Progress):
    def __init__(
        self, what: str, total: int, unit: str, reporter: Reporter, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._unit, self._reporter, self._clock = what, total, unit, reporter, clock
        self._done, self._shown, self._note = 0, 0, ""
        self._rate = Rate(clock)
        self._said: float | None = None

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note
        self._rate.add(amount)
        now = self._clock()
        if self._said is None:
            self._said = now
        elif now - self._said >= _interval(self._rate.running_s):
            self._said = now
            self._say(self._rate.lately())

    def recall(self, amount: int) -> None:
        self._done += amount

    def close(self) -> None:
        if self._done > self._shown:
            self._say(self._rate.overall())

    def _say(self, rate: float | None) -> None:
        self._shown = self._done
        share = f"{self._done:,} of {self._total:,} {self._unit} ({self._done / max(self._total, 1):.0%})"
        speed = f", {_number(rate)} {self._unit}/s" if rate is not None else ""
        left = f", {duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        note = f", {self._note}" if self._note else ""
        self._reporter.log(f"{self._what}: {share}{speed}{left}{note}")


def _interval(elapsed_s: float) -> float:
    return FIRST_LOG_INTERVAL_S if elapsed_s < FIRST_MINUTES_S else LOG_INTERVAL_S


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m07s or 5h02m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
