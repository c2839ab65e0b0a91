"""Batches ahead of time, and how long the model waited for them."""

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from torch.utils.data import DataLoader

from pipeline.handover import Handover
from pipeline.progress import Reporter
from pipeline.stores.patience import patience_s
from pipeline.watchdog import Watchdog, end_process
from stages.train_student.dataset import CacheDataset, Collate, MixedDataset
from stages.train_student.sampler import StreamSampler

AHEAD = 4
"""Batches that are decoded before they are asked for: by a thread, or by each worker process."""


class Stopwatch:
    """Seconds spent inside `with stopwatch:` blocks, as a share of the time since it was last read."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since = time.perf_counter()

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *exc: Any) -> None:
        self._spent += time.perf_counter() - self._entered

    def read(self) -> tuple[float, float]:
        """(seconds since the last reading, share of them inside); starts again."""
        now = time.perf_counter()
        elapsed, share = now - self._since, self._spent / max(now - self._since, 1e-9)
        self._spent, self._since = 0.0, now
        return elapsed, share


class BatchLoader:
    """The micro-batches of a run: decoded, collated and (for a GPU) pinned in the background.

    With `num_workers` 0 a thread of this process does it while the model computes; else worker processes do. The order
    is the sampler's in any case. An error of theirs is raised by the iterator, which stops them when it is closed.
    """

    def __init__(
        self,
        dataset: CacheDataset | MixedDataset,
        collate: Collate,
        sampler: StreamSampler,
        *,
        num_workers: int,
        pin: bool,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.dataset, self.batch_sampler, self._watchdog = dataset, sampler, watchdog
        self.waiting = Stopwatch()
        """Runs while a batch was asked for and is not there yet."""
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin,
            prefetch_factor=AHEAD if num_workers else None,
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        decoded = iter(self._loader)
        with nullcontext(decoded) if self._loader.num_workers else closing(_ahead(decoded)) as batches:
            while True:
                with self.waiting, self._watching():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def _watching(self) -> AbstractContextManager[None]:
        """A file system that hangs is no error to whoever reads from it."""
        return self._watchdog.watching("reading a batch of the cache") if self._watchdog else nullcontext()


def watch_reading(caches: str, stall_s: float, reporter: Reporter) -> Watchdog:
    """What ends this rank once caches of these names cannot be read for so long, or as long as a silent store is waited
    for.

    The other ranks and the launcher see its end.
    """

    def give_up(line: str) -> None:
        reporter.note(f"error: {caches}: {line}")
        end_process()

    return Watchdog(max(stall_s, patience_s()), give_up)


def _ahead(batches: Iterator[Any]) -> Generator[Any, None, None]:
    """The same batches, made by a thread that stays at most AHEAD in front; its error is raised here."""
    ready: Handover[Any] = Handover(AHEAD)

    def produce() -> None:
        try:
            for batch in batches:
                if not ready.put(batch):
                    return
            ready.end()
        except BaseException as error:
            ready.end(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        yield from ready
    finally:
        ready.stop()
        thread.join()
