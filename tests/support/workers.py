"""Workers in forked processes, with an engine that answers by a formula."""

import ctypes
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.partitions import plan_partitions
from pipeline.corpus import TOKENIZER, Corpus, TokenSequence
from pipeline.errors import PipelineError
from pipeline.progress import Reporter
from pipeline.runs.rank import Rank
from pipeline.runs.terms import RunTerms, begin_run
from pipeline.stores.store import Store
from pipeline.targets import SparseTargets
from stages.cache_logits.engine import Engine, Request
from stages.cache_logits.fake_engine import FakeEngine
from stages.cache_logits.worker import work
from tests.support.small import fake_manifest, make_corpus

LEASE_S = 1.0
ALONE = Rank(0, 1)


def tiny_corpus(folder: Path, count: int) -> Path:
    """`count` sequences of six tokens; the first of them is the sequence's number."""
    values = np.random.default_rng(0).integers(0, 300, (count, 6)).astype(np.int32)
    values[:, 0] = np.arange(count) % 300
    mask, lengths = np.array([False, True, True, True, True, True]), np.array([6], np.int32)
    return make_corpus(
        folder, [TokenSequence(token_ids=ids, loss_mask=mask, document_lengths=lengths) for ids in values]
    )


def new_cache(folder: Store, corpus: Path) -> Store:
    """A plan with one sequence a partition."""
    rows = Corpus(corpus)
    manifest = fake_manifest(rows, partitions=plan_partitions(rows.lengths()[0], 1))
    cache = CacheFolder.begin(folder, manifest, corpus / TOKENIZER)
    begin_run(cache.folder, RunTerms(lease_s=LEASE_S))
    return cache.folder


class UnevenEngine(FakeEngine):
    """Takes a random while for each answer; the mean is read from memory that several processes share."""

    def __init__(self, manifest: CacheManifest, delay_s: ctypes.c_double) -> None:
        super().__init__(manifest)
        self._delay_s = delay_s

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """In groups of three, as FakeEngine does."""
        for answer in super().score(requests):
            time.sleep(random.expovariate(1 / self._delay_s.value))
            yield answer


def run_worker(
    folder: Store,
    corpus: Path,
    rank: Rank = ALONE,
    make_engine: Callable[[CacheManifest], Engine] = FakeEngine,
    reporter: Reporter | None = None,
    lease_s: float = LEASE_S,
    stall_s: float = 600.0,
) -> None:
    """A worker in this process."""
    cache = CacheFolder(folder)
    work(
        cache,
        Corpus(corpus),
        None,
        lambda: make_engine(cache.manifest),
        rank=rank,
        terms=RunTerms(lease_s=lease_s),
        stall_s=stall_s,
        encoding_threads=2,
        reporter=reporter or Reporter(),
    )


def start_worker(
    folder: Path,
    corpus: Path,
    rank: Rank = ALONE,
    make_engine: Callable[[CacheManifest], Engine] = FakeEngine,
    *,
    host: str = "",
    skew_s: float = 0.0,
) -> int:
    """Fork a worker that believes to be on `host`, with a clock that is wrong; exit codes as of the command line."""
    pid = os.fork()
    if pid == 0:
        if host:
            socket.gethostname = lambda: host
        true_time = time.time
        time.time = lambda: true_time() + skew_s
        os._exit(exit_code_of(lambda: run_worker(folder, corpus, rank, make_engine)))
    return pid


def exit_code_of(run: Callable[[], None]) -> int:
    """As of the command line."""
    try:
        run()
    except BaseException as exc:
        print(repr(exc), file=sys.stderr, flush=True)
        return exc.exit_code if isinstance(exc, PipelineError) else 2 if isinstance(exc, OSError) else 1
    return 0


def end_of(pid: int) -> int:
    """Wait for a forked worker; its exit code, or the signal that killed it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
