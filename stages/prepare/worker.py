"""One worker of a preparation: takes tasks as a worker of a capture takes partitions, phase after phase."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.cache.commits import is_committed
from pipeline.drain import Drain
from pipeline.errors import MENDABLE, CorpusError, Drained, PartitionsFailedError, PipelineError
from pipeline.progress import Reporter
from pipeline.runs.failures import read_failure
from pipeline.runs.heartbeat import Heartbeat, one_line
from pipeline.runs.leases import remove_leases
from pipeline.runs.partition_claims import PartitionClaims
from pipeline.runs.rank import Rank
from pipeline.runs.terms import RunTerms, begin_run
from stages.prepare.plan import Plan
from stages.prepare.staging import FinishedTask
from stages.prepare.tasks import Advance, Tasks

BAD_MACHINE = 3
"""After so many failures in a row a worker blames its machine."""


@dataclass(frozen=True)
class Manners:
    """How a worker goes about failures and signals."""

    terms: RunTerms
    launched: bool = False
    """One of many that a launcher has started: it drains, and what fails is set aside while the others go on.
    Otherwise a person waits for it, and hears of the first failure at once."""
    poll_s: float | None = None
    """Seconds between two looks while there is nothing to take; none decides by the number of workers."""


def work(
    make_tasks: Callable[[Advance], Tasks], plan: Plan, rank: Rank, manners: Manners, reporter: Reporter, told: Advance
) -> None:
    """Work until the corpus is finished, by whichever worker.

    Raises what a task raises, Drained after a signal, and PartitionsFailedError if tasks were set aside.
    """

    def advance(num_bytes: int, documents: int, tokens: int) -> None:
        heartbeat.advance(num_bytes)
        told(num_bytes, documents, tokens)

    tasks = make_tasks(advance)
    begin_run(tasks.folder, manners.terms)
    with contextlib.ExitStack() as stack:
        heartbeat = stack.enter_context(Heartbeat(tasks.folder, rank, manners.terms.lease_s))
        drain = Drain(heartbeat.leases.release_all)
        if manners.launched:
            stack.enter_context(drain)
        heartbeat.say("preparing")
        phases: list[tuple[Callable[[], Sequence[int]], Callable[[int], FinishedTask]]] = [
            (lambda: plan.near_duplicates, tasks.find_near_duplicates),
            (lambda: plan.tokenising, tasks.tokenise),
            (lambda: plan.comparing_documents, tasks.compare_documents),
            (lambda: plan.packing, tasks.pack),
            (lambda: plan.comparing_rows, tasks.compare_rows),
            (lambda: tasks.to_drop, tasks.drop),
            (lambda: plan.finishing, tasks.finish),
        ]
        for numbers, do in phases:
            todo = _todo(tasks, plan, numbers)
            if todo is None:
                break
            claims = PartitionClaims(
                tasks.folder, todo, rank, heartbeat, drain, max_failures=manners.terms.max_failures
            )
            if manners.poll_s is not None:
                claims.poll_s = manners.poll_s
            _Phase(tasks, claims, heartbeat, manners, reporter, plan.finishing.start).run(do)
            if drain.requested and claims.unsettled():
                heartbeat.say("drained")
                raise Drained(f"{tasks.folder.parent}: drained; run the same command again to continue.")
            if aside := claims.set_aside():
                raise PartitionsFailedError(_what_failed(tasks, aside))
        remove_leases(tasks.folder)


def _todo(tasks: Tasks, plan: Plan, numbers: Callable[[], Sequence[int]]) -> Sequence[int] | None:
    """The tasks of a phase; None if others have finished the corpus: what was staged may be gone then."""
    try:
        todo = numbers()
    except CorpusError:
        if not is_committed(tasks.folder, plan.finishing.start):
            raise
        return None
    return None if is_committed(tasks.folder, plan.finishing.start) else todo


class _Phase:
    """The tasks of one kind."""

    def __init__(
        self,
        tasks: Tasks,
        claims: PartitionClaims,
        heartbeat: Heartbeat,
        manners: Manners,
        reporter: Reporter,
        last: int,
    ) -> None:
        self._tasks, self._claims, self._heartbeat, self._last = tasks, claims, heartbeat, last
        self._manners, self._reporter = manners, reporter
        self._num_failures = 0

    def run(self, do: Callable[[int], FinishedTask]) -> None:
        """Do what `claims` gives, until it gives no more."""
        while self._claims.wait():
            self._heartbeat.say("preparing")
            for task in self._claims.stream():
                try:
                    finished = do(task)
                except Exception as exc:
                    self._blame(task, exc)
                else:
                    won = finished.commit(self._tasks.folder, task)
                    self._claims.settle(task, won=won)
                    self._num_failures = 0
                    if won:
                        self._heartbeat.committed(sum(partition.bytes for partition in finished.partitions))

    def _blame(self, task: int, exc: Exception) -> None:
        """Count a failure against the task, unless a person waits or it would have met any of them."""
        if not self._manners.launched:
            raise exc
        if is_committed(self._tasks.folder, self._last):  # others have finished the corpus, and removed what was staged
            self._claims.settle(task, won=False)
            return
        if isinstance(exc, CorpusError):
            self._reporter.note(f"{self._tasks.folder.parent}: task {task} is set aside: {exc}")
            self._claims.reject(task, str(exc))
            return
        if isinstance(exc, PipelineError) or (isinstance(exc, OSError) and exc.errno in MENDABLE):
            raise exc
        self._reporter.note(f"{self._tasks.folder.parent}: task {task} failed: {one_line(exc)}")
        self._claims.fail(one_line(exc))
        self._num_failures += 1
        if self._num_failures == BAD_MACHINE:
            raise exc


def _what_failed(tasks: Tasks, failures: dict[int, int]) -> str:
    task, ordinal = next(iter(failures.items()))
    reason = read_failure(tasks.folder, task, ordinal).reason
    return (
        f"{tasks.folder.parent}: {len(failures)} tasks were set aside, the others of their kind are done; {task} by "
        f"{reason} - mend the cause and run again with --retry-failed."
    )
