"""An engine under watch: one that finishes nothing, or does not get loaded, ends its process.

Only its own time counts: not the time in which it waits for requests, or in which what it gave is written. What is
committed stays, leases are released, no partition is blamed.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator

from pipeline.targets import SparseTargets
from pipeline.watchdog import Watchdog
from stages.cache_logits.engine import Engine, Request

LOADING_FACTOR = 4
"""Loading may take so many times as long: nothing tells how far it is."""


class WatchedEngine:
    """An engine that a watchdog looks at while it is at work."""

    def __init__(self, make_engine: Callable[[], Engine], watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        with watchdog.watching("loading the teacher", LOADING_FACTOR):
            self._engine = make_engine()

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """What the engine gives."""
        try:
            self._work()
            for scored in self._engine.score(self._handed_over(requests)):
                self._watchdog.rest()
                yield scored
                self._work()
        finally:
            self._watchdog.rest()

    def close(self) -> None:
        """Stop whatever the engine started."""
        self._engine.close()

    def _handed_over(self, requests: Iterable[Request]) -> Iterator[Request]:
        self._watchdog.rest()
        for request in requests:
            self._work()
            yield request
            self._watchdog.rest()
        self._work()

    def _work(self) -> None:
        self._watchdog.watch("the engine has requests and finishes none")
