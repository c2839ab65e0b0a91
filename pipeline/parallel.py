"""The same work on many items at once: the first failure stops the rest and reaches the caller."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from pipeline.patience import stop_waiting

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of every item, as they are done; for work that waits or that numpy and hashing do."""
    return _run(function, items, workers, ThreadPoolExecutor)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """`function` of every item, in the items' order; for what `in_threads` is for."""
    numbered = in_threads(lambda pair: (pair[0], function(pair[1])), enumerate(items), workers)
    return [result for _, result in sorted(numbered, key=lambda pair: pair[0])]


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of every item, as they are done, in processes that end with this one; in this one if one is enough.

    The function, the items and the results must be picklable.
    """
    return _run(function, items, workers, _processes)


def _run(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, executor: Callable[[int], Executor]
) -> Iterator[Result]:
    items = list(items)
    if workers == 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with executor(min(workers, len(items))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except KeyboardInterrupt:
            stop_waiting()  # threads that wait for a store
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # waits: the pool's own end would not, once it was shut down


def _processes(workers: int) -> Executor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_the_parent)


def _end_with_the_parent() -> None:
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
