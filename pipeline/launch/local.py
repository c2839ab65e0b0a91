"""Workers on this machine: a pool of processes that are started again when they end too early."""

import contextlib
import os
import time

from pipeline.cache.commits import list_commits
from pipeline.drain import Drain
from pipeline.errors import Drained, PipelineError, StorageSilentError
from pipeline.exit_codes import AGAIN, DONE, MENDABLE
from pipeline.launch.job import Job, Launcher
from pipeline.processes import Child, last_lines
from pipeline.progress import Reporter
from pipeline.runs.ephemeral import PATIENCE_S
from pipeline.runs.status import StatusReader, describe

POLL_S = 0.2
SAY_INTERVAL_S = 60.0


def launch(job: Job, reporter: Reporter) -> None:
    """Run workers until cache or corpus is whole, then the training. A signal drains them, a second one kills them."""
    job.prepare_folder()
    pool = _Pool(job, reporter)
    with contextlib.closing(pool), Drain(pool.kill) as drain:
        pool.capture(drain)
        require_whole(job, reporter)
        if job.submit.train_student is not None:
            pool.train(drain)


def require_whole(job: Job, reporter: Reporter) -> None:
    """The gate between the stages: every partition there, and every byte as it was written.

    Of a corpus its workers have checked what they read of each other, and who uses it checks the rest.
    """
    from pipeline.cache.verify import verify_cache

    status = StatusReader(job.cache).read()
    for line in describe(status):
        reporter.log(line)
    if status.state != "complete":
        raise PipelineError(f"{job.cache}: {status.state} after all workers have ended; their logs are in {job.logs}.")
    if job.stage == "prepare":
        return
    problems = verify_cache(job.cache).problems
    if problems:
        raise PipelineError(f"{job.cache}: {len(problems)} problems, the first: {problems[0]}; run `pipeline verify`.")


class _Pool:
    def __init__(self, job: Job, reporter: Reporter) -> None:
        self._job, self._reporter = job, reporter
        self._hasty, self._commits = job.cache.hasty(PATIENCE_S), job.commits.hasty(PATIENCE_S)
        self._num_done = 0
        self._children: dict[int, Child] = {}
        self._fruitless: dict[int, int] = {}
        self._done_before: dict[int, int] = {}
        self._said = time.monotonic()

    def capture(self, drain: Drain) -> None:
        """Workers until each has ended for good."""
        for worker in range(self._job.submit.workers):
            self._start(worker)
        self._tend(drain)
        if drain.requested:
            raise Drained(f"{self._job.cache}: all workers are drained; run the same command again to continue.")

    def train(self, drain: Drain) -> None:
        """The training, started again while it gets further."""
        log = self._job.logs / "student.log"
        for attempt in range(self._job.submit.attempts):
            self._children[0] = Child(self._job.student_command(), {}, log)
            while (code := self._children[0].poll()) is None:
                if drain.requested:
                    self._children[0].drain()
                time.sleep(POLL_S)
            if drain.requested:
                raise Drained(f"{log}: the training was stopped; run the same command again to continue.")
            if code in (DONE, MENDABLE):
                break
            self._reporter.log(f"student: exit code {code}, attempt {attempt + 1}; log: {log}")
        if code:
            raise PipelineError(f"{log}: the training ended with exit code {code}: {last_lines(log)}")

    def kill(self) -> None:
        """Leave nothing running."""
        for child in self._children.values():
            child.kill()

    def close(self) -> None:
        """After an error of this process workers may still run: they have leases, and go as after a second signal."""
        for child in self._children.values():
            if child.poll() is None:
                child.kill()

    def _tend(self, drain: Drain) -> None:
        drained = False
        while self._children:
            if drain.requested and not drained:
                drained = True
                self._reporter.log(f"draining {len(self._children)} workers; again to kill them")
                for child in self._children.values():
                    child.drain()
            for worker, child in list(self._children.items()):
                code = child.poll()
                if code is not None:
                    del self._children[worker]
                    self._ended(worker, child, code, drained)
            self._say()
            time.sleep(POLL_S)

    def _start(self, worker: int) -> None:
        job = self._job
        environment = {"PIPELINE_WORKER": str(worker), "PIPELINE_WORKERS": str(job.submit.workers)}
        if job.gpus_per_worker:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_devices(worker, job.gpus_per_worker))
        self._done_before[worker] = self._count_done()
        self._children[worker] = Child(job.worker_command(), environment, job.worker_log(worker))

    def _ended(self, worker: int, child: Child, code: int, drained: bool) -> None:
        """Start a worker again, unless it is done, told to stop, or ends again and again with nothing new."""
        if code == DONE or (drained and code == AGAIN):
            return
        further = self._count_done() > self._done_before[worker]
        self._fruitless[worker] = 0 if further else self._fruitless.get(worker, 0) + 1
        again = not drained and code != MENDABLE and self._fruitless[worker] < self._job.submit.attempts
        self._reporter.log(
            f"worker {worker}: exit code {code}{', starting again' if again else ''}: {last_lines(child.log, 1)} "
            f"({child.log})"
        )
        if again:
            self._start(worker)

    def _say(self) -> None:
        if time.monotonic() - self._said > SAY_INTERVAL_S:
            self._said = time.monotonic()
            with contextlib.suppress(StorageSilentError):
                for line in describe(StatusReader(self._hasty).read()):
                    self._reporter.log(line)

    def _count_done(self) -> int:
        """Partitions that are committed, as far as is known: workers are tended while a store does not answer."""
        with contextlib.suppress(StorageSilentError):
            self._num_done = len(list_commits(self._commits))
        return self._num_done


def _devices(worker: int, count: int) -> list[str]:
    """The GPUs of a worker, of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range((worker + 1) * count)]
    return devices[worker * count : (worker + 1) * count]


LAUNCHER = Launcher(launch=launch)
