"""The same work on many items at once: the first failure stops the rest and reaches the caller."""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from pipeline.stopping import starting_processes, stop_waiting

Item = TypeVar("Item")
Result = TypeVar("Result")
LEFT = 128 + signal.SIGTERM
"""Exit code of a process of a pool that was told to end."""
LAST_WORDS_S = 5.0
"""Seconds in which a process that is to end removes what it has half done."""


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of every item, as they are done; for work that waits or that numpy and hashing do."""
    return _run(function, items, workers, ThreadPoolExecutor)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """`function` of every item, in the items' order; for what `in_threads` is for."""
    numbered = in_threads(lambda pair: (pair[0], function(pair[1])), enumerate(items), workers)
    return [result for _, result in sorted(numbered, key=lambda pair: pair[0])]


class Threads:
    """Threads that share work whose results are wanted in order, as often as one asks; one alone is the caller itself.

    What they are given must not wait for them.
    """

    def __init__(self, workers: int) -> None:
        self._ahead = 2 * workers
        self._pool = ThreadPoolExecutor(workers, "ordered") if workers > 1 else None

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of every item, in the items' order; the first failure is raised in its place.

        Items are drawn by the caller, at most twice as many as there are threads before their results are taken.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(function, item))
                while pending and (len(pending) >= self._ahead or pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


ALONE = Threads(1)
"""Nobody but the caller."""


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of every item, as they are done, in processes that end with this one; in this one if one is enough.

    The function, the items and the results must be picklable.
    """
    return _run(functools.partial(_one, function), items, workers, _processes)


def crew(
    function: Callable[[Item, Callable[[Any], None]], None],
    items: Sequence[Item],
    hear: Callable[[Any], None],
    lost: Callable[[Item, int], None],
) -> int:
    """`function(item, tell)` for all items at once, each in a process of its own that ends with this one.

    What they tell is heard here, in `hear`. The first exception ends the others and is raised here. A process that is
    killed is `lost`, with its exit code, and the others go on; returns how many have come to their end.
    """
    context, num_done = multiprocessing.get_context("spawn"), 0
    members: dict[Any, tuple[Item, Any]] = {}
    try:
        with starting_processes():
            for item in items:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_member, args=(function, item, sender))
                process.start()
                sender.close()
                members[receiver] = item, process
        while members:
            ready: list[Any] = multiprocessing.connection.wait(list(members))
            for receiver in ready:
                kind, content = _received(receiver)
                if kind == _TOLD:
                    hear(content)
                    continue
                item, process = members.pop(receiver)
                process.join()
                if kind == _RAISED:
                    raise content
                if kind == _GONE:
                    lost(item, process.exitcode or 0)
                num_done += kind == _DONE
    finally:
        _end([process for _, process in members.values()])
    return num_done


_TOLD, _RAISED, _DONE, _GONE = "told", "raised", "done", "gone"


def _received(receiver: Any) -> tuple[str, Any]:
    try:
        return receiver.recv()
    except (EOFError, OSError):
        return _GONE, None


def _member(function: Callable[[Any, Callable[[Any], None]], None], item: Any, sender: Any) -> None:
    """In a process of a crew: the work, and word of how it ended."""
    _end_with_the_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which the parent hears too
    try:
        _one(functools.partial(function, item), lambda message: sender.send((_TOLD, message)))
        sender.send((_DONE, None))
    except Exception as exc:
        exc.add_note(f"in process {os.getpid()}:\n{traceback.format_exc()}")
        sender.send((_RAISED, exc if _is_portable(exc) else RuntimeError(traceback.format_exc())))


def _is_portable(exc: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(exc))
    except Exception:  # of whatever kind: a class may have any constructor
        return False
    return True


def _run(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, executor: Callable[[int], Executor]
) -> Iterator[Result]:
    items = list(items)
    if workers == 1 or len(items) <= 1:
        yield from map(function, items)
        return
    in_others, strangers, pool = executor is _processes, set(multiprocessing.active_children()), None
    try:
        with starting_processes() if in_others else contextlib.nullcontext():
            pool = executor(min(workers, len(items)))
            futures = [pool.submit(function, item) for item in items]
        for future in as_completed(futures):
            yield future.result()
    except Exception:
        raise
    except BaseException:  # a signal, or nobody wants the rest: processes drop what they have in hand
        stop_waiting()  # threads that wait for a store
        _end(set(multiprocessing.active_children()) - strangers if in_others else ())
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _end(processes: Collection[BaseProcess]) -> None:
    """Let processes unwind what they do, and wait for them; none gets more than LAST_WORDS_S."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + LAST_WORDS_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def _processes(workers: int) -> Executor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_the_parent)


def _end_with_the_parent() -> None:
    """In a process of the pool: SIGTERM, or the end of the parent, ends it; what it has in hand unwinds first."""
    signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_WORDS_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _one(function: Callable[[Item], Result], item: Item) -> Result:
    global _in_hand
    try:
        _in_hand = True
        return function(item)
    except _Left:
        os._exit(LEFT)
    finally:
        _in_hand = False


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    if not _in_hand:
        os._exit(LEFT)
    raise _Left


class _Left(BaseException):
    """Unwinds what a process of the pool has in hand."""


_in_hand = False
