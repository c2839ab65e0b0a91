"""What a long run says while it works. A stage is handed a Reporter; only the command line prints."""

import sys
import time
from typing import Any

from tqdm import tqdm

from pipeline.documents import printable

LOG_INTERVAL_S = 60.0
FIRST_LOG_INTERVAL_S = 15.0
"""Seconds between two progress lines where there is no terminal; in the first minutes they come sooner."""
FIRST_MINUTES_S = 180.0


class Progress:
    """Counts work done of a total; this one says nothing."""

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more is done; `note` is shown beside the rate."""

    def close(self) -> None:
        """No more will come."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class Reporter:
    """Says nothing: what a stage uses when it is called as a library."""

    def log(self, line: str) -> None:
        """One line for a person to read."""

    def progress(self, what: str, total: int, unit: str = "tokens") -> Progress:
        """A counter of work towards `total`."""
        return Progress()


class TerminalReporter(Reporter):
    """Writes to standard error: a bar on a terminal, a plain line now and then elsewhere."""

    def log(self, line: str) -> None:
        """Write a line, above the bar if there is one."""
        tqdm.write(printable(line, newline="\n"), file=sys.stderr)
        sys.stderr.flush()

    def progress(self, what: str, total: int, unit: str = "tokens") -> Progress:
        """A bar, or lines."""
        return _Bar(what, total, unit) if sys.stderr.isatty() else _Lines(what, total, unit, self)


class _Bar(Progress):
    def __init__(self, what: str, total: int, unit: str) -> None:
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True, dynamic_ncols=True)

    def advance(self, amount: int, note: str = "") -> None:
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)

    def close(self) -> None:
        self._bar.close()


class _Lines(Progress):
    def __init__(self, what: str, total: int, unit: str, reporter: Reporter) -> None:
        self._what, self._total, self._unit, self._reporter = what, total, unit, reporter
        self._done, self._shown, self._note = 0, 0, ""
        self._started = self._said = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note
        now = time.monotonic()
        if now - self._said >= (FIRST_LOG_INTERVAL_S if now - self._started < FIRST_MINUTES_S else LOG_INTERVAL_S):
            self._say()

    def close(self) -> None:
        if self._done > self._shown:
            self._say()

    def _say(self) -> None:
        self._said, self._shown = time.monotonic(), self._done
        elapsed = max(self._said - self._started, 1e-9)
        rate = self._done / elapsed
        left = f", {duration((self._total - self._done) / rate)} left" if 0 < self._done < self._total else ""
        share = f"{self._done:,} of {self._total:,} {self._unit} ({self._done / max(self._total, 1):.0%})"
        note = f", {self._note}" if self._note else ""
        self._reporter.log(f"{self._what}: {share}, {rate:,.0f} {self._unit}/s{left}{note}")


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m07s or 5h02m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
