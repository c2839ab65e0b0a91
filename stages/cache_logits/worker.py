"""One worker of a run: takes partitions, captures them, accounts for every one of them."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from contextlib import closing

import numpy as np

from pipeline.cache.commits import ShardCommit
from pipeline.cache.folder import CacheFolder
from pipeline.corpus import Corpus, TokenSequence
from pipeline.drain import Drain
from pipeline.errors import MENDABLE, CorpusError, Drained, EngineError, PartitionsFailedError, PipelineError
from pipeline.lifecycle.reuse import KnownTargets
from pipeline.progress import Progress, Rate, Reporter, duration
from pipeline.runs.failures import read_failure
from pipeline.runs.heartbeat import Heartbeat, one_line
from pipeline.runs.leases import remove_leases
from pipeline.runs.partition_claims import PartitionClaims
from pipeline.runs.rank import Rank
from pipeline.runs.terms import RunTerms, begin_run
from pipeline.stores.store import Store
from pipeline.targets import SparseTargets
from pipeline.watchdog import Watchdog, end_process
from stages.cache_logits.capture import capture
from stages.cache_logits.engine import Engine
from stages.cache_logits.watched_engine import WatchedEngine

BAD_MACHINE = 3
"""After so many failures of different partitions, and no commit between them, a worker blames its machine."""


def work(
    cache: CacheFolder,
    corpus: Corpus,
    known: KnownTargets | None,
    make_engine: Callable[[], Engine],
    *,
    rank: Rank,
    terms: RunTerms,
    stall_s: float,
    encoding_threads: int,
    reporter: Reporter,
) -> None:
    """Work until every partition is committed, by whichever worker.

    Raises Drained after a signal, and PartitionsFailedError once all but the partitions that were set
    aside are committed. The engine is made when there is something to do, and made anew after a failure. One that
    hangs ends the process (watchdog.py).
    """
    folder, manifest = cache.folder, cache.manifest
    begin_run(folder, terms)
    with Heartbeat(folder, rank, terms.lease_s) as heartbeat, Drain(heartbeat.leases.release_all) as drain:
        claims = PartitionClaims(
            folder, range(manifest.num_partitions), rank, heartbeat, drain, max_failures=terms.max_failures
        )
        todo = manifest.num_partitions - len(cache.done())
        share = manifest.num_tokens * todo // manifest.num_partitions // rank.workers
        with reporter.progress("cache-logits", share) as progress:
            worker = _Worker(cache, corpus, known, claims, heartbeat, drain, encoding_threads, reporter, progress)
            with closing(Watchdog(stall_s, functools.partial(_give_up, folder, heartbeat, reporter))) as watchdog:
                worker.run(watchdog, make_engine)
        if drain.requested and claims.unsettled():
            heartbeat.say("drained")
            raise Drained(f"{folder}: drained; run the same command again to continue.")
        if not claims.unsettled():
            remove_leases(folder)
    aside = claims.set_aside()
    if aside:
        raise PartitionsFailedError(_what_failed(folder, aside))


class _Tally:
    """What a person wants to know of the targets so far, beside the rate."""

    def __init__(self, temperature: float, tail: str = "tail mass") -> None:
        self._temperature, self._tail = temperature, tail
        self._sums = np.zeros(3)

    def note(self, targets: SparseTargets, num_bytes: int) -> str:
        """Count the targets of one sequence; the means so far, and the bytes that are written."""
        temperature = self._temperature
        self._sums += targets.entropy(temperature).sum(), targets.tail_mass(temperature).sum(), len(targets)
        entropy, tail = self._sums[:2] / self._sums[2]
        return f"{num_bytes / 1e9:.2f} GB, at T={temperature:g}: entropy {entropy:.2f} nats, {self._tail} {tail:.3f}"


class _Worker:
    def __init__(
        self,
        cache: CacheFolder,
        corpus: Corpus,
        known: KnownTargets | None,
        claims: PartitionClaims,
        heartbeat: Heartbeat,
        drain: Drain,
        encoding_threads: int,
        reporter: Reporter,
        progress: Progress,
    ) -> None:
        self._cache, self._corpus, self._known = cache, corpus, known
        self._claims, self._heartbeat, self._drain = claims, heartbeat, drain
        self._encoding_threads, self._reporter, self._progress = encoding_threads, reporter, progress
        tail = "mass outside the top k" if cache.manifest.spec.is_ragged else "tail mass"  # before anything is cut
        self._tally = _Tally(cache.manifest.temperatures[-1], tail)
        self._bytes = 0
        self._rate = Rate()
        self._start = contextlib.ExitStack()
        """Holds what says that the engine is still being started; closed by the first targets."""
        self._blamed: list[set[int]] = []
        self._announced = False

    def run(self, watchdog: Watchdog, make_engine: Callable[[], Engine]) -> None:
        """Capture what `claims` gives, until it gives no more."""
        with contextlib.ExitStack() as engines, self._start:
            engine = None
            while self._claims.wait():
                if engine is None:
                    self._heartbeat.say("loading")
                    self._start.enter_context(
                        self._reporter.waiting("starting the teacher: weights, warm-up, first tokens")
                    )
                    with self._drain.shielded():
                        engine = WatchedEngine(make_engine, watchdog)
                    engines.callback(engine.close)
                try:
                    self._capture(engine)
                except Exception as exc:
                    engine = None
                    self._start.close()
                    engines.close()  # requests of the failed call may still be in there
                    self._blame(exc)

    def _capture(self, engine: Engine) -> None:
        self._heartbeat.say("capturing")
        capture(
            engine,
            self._corpus,
            self._cache,
            self._claims.stream(),
            self._known,
            encoding_threads=self._encoding_threads,
            on_sequence=self._on_sequence,
            on_commit=self._on_commit,
            on_unreadable=self._on_unreadable,
        )

    def _blame(self, exc: Exception) -> None:
        """Count a failure against the partitions in hand, unless it would have met any of them."""
        if isinstance(exc, PipelineError) or (isinstance(exc, OSError) and exc.errno in MENDABLE):
            raise exc
        held, reason = self._heartbeat.leases.held, one_line(exc)
        self._reporter.note(f"{self._cache.folder}: partitions {_some(held)} failed: {reason}")
        self._claims.fail(reason)
        if all(earlier.isdisjoint(held) for earlier in self._blamed):
            self._blamed.append(set(held))
        if len(self._blamed) == BAD_MACHINE:
            raise exc

    def _on_sequence(self, sequence: TokenSequence, targets: SparseTargets | None) -> None:
        num_tokens = len(sequence.token_ids)
        self._heartbeat.advance(num_tokens)
        if targets is None:  # it was known
            self._progress.recall(num_tokens)
        else:
            self._start.close()
            self._rate.add(num_tokens)
            self._progress.advance(num_tokens, self._tally.note(targets, self._bytes))
        if self._drain.requested and not self._announced:
            self._announce_drain()

    def _announce_drain(self) -> None:
        self._announced = True
        self._heartbeat.say("draining")
        held = self._heartbeat.leases.held
        manifest = self._cache.manifest
        tokens = manifest.num_tokens / manifest.num_partitions * len(held)
        rate = self._rate.lately()
        at_most = f", {duration(tokens / rate)} at most" if rate else ""
        self._reporter.log(f"draining: {len(held)} partitions in hand{at_most}; again to drop them")

    def _on_commit(self, partition: int, commit: ShardCommit | None) -> None:
        self._claims.settle(partition, won=commit is not None)
        self._blamed.clear()
        if commit is not None:
            self._bytes += commit.bytes
            self._heartbeat.committed(commit.bytes)

    def _on_unreadable(self, partition: int, error: CorpusError) -> None:
        self._reporter.note(f"{self._cache.folder}: partition {partition} is set aside: {error}")
        self._claims.reject(partition, one_line(error))


def _give_up(folder: Store, heartbeat: Heartbeat, reporter: Reporter, line: str) -> None:
    """End this process, whose engine hangs: others may have its partitions, which are blamed for nothing."""
    problem = EngineError(f"{folder}: {line}")
    reporter.note(f"error: {problem}")
    end_process(functools.partial(heartbeat.__exit__, EngineError, problem, None))


def _what_failed(folder: Store, failures: dict[int, int]) -> str:
    partition, ordinal = next(iter(failures.items()))
    reason = read_failure(folder, partition, ordinal).reason
    return (
        f"{folder}: {len(failures)} partitions were set aside, all others are captured: {_some(failures)}; "
        f"{partition} by {reason} - mend the cause and run again with --retry-failed."
    )


def _some(partitions: Iterable[int]) -> str:
    names = list(map(str, partitions))
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
