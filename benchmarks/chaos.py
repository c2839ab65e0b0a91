"""Workers that are killed, stopped, drained and misled, and a cache that must come out whole.

    python -m benchmarks.chaos --workers 8 --partitions 500 --kills 200 --seeds 20

Forks real workers (`stages.cache_logits.worker.work`) into one folder. Their engine answers by a formula,
after a random pause that is long whenever the work is ahead of the kills. While they work it picks victims at random:
kill -9, SIGSTOP for longer than a lease, SIGTERM. Each worker believes to be on one of several hosts, so that most
vanished workers are found by the age of their leases alone, and lives in a time zone of its own: its clock is up to a
day wrong. Half of the workers belong to a second submission with the same ranks. A worker that ends before the cache is
complete is started again.

At the end: every partition committed once, every sequence there and in order, `verify` clean, nothing
left running. Prints a line a seed; exit code 1 at the first seed that fails.
"""

import argparse
import ctypes
import functools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipeline.cache.commits import SHARDS, list_commits
from pipeline.cache.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.runs.leases import LEASES
from pipeline.runs.rank import Rank
from pipeline.stores.local_store import LocalStore
from tests.support.workers import LEASE_S, UnevenEngine, new_cache, start_worker, tiny_corpus

HOSTS = 3
FAST_S, SLOW_S = 0.005, 2.0
"""Mean time of an answer."""
DEADLINE_S = 600.0


class Chaos:
    """One run under fire."""

    def __init__(self, folder: Path, corpus: Path, workers: int, seed: int) -> None:
        self.folder, self.corpus = folder, corpus
        self.delay_s = ctypes.c_double.from_buffer(mmap.mmap(-1, ctypes.sizeof(ctypes.c_double)))
        self.random = random.Random(seed)
        submission = max(workers // 2, 1)
        self.ranks = [Rank(index % submission, submission) for index in range(workers)]
        self.alive: dict[int, int] = {}
        self.stopped: dict[int, float] = {}
        self.counts = dict.fromkeys(("kills", "stops", "drains", "lives"), 0)

    def start(self, slot: int) -> None:
        """A new life of the worker in a slot."""
        host, skew_s = f"node{slot % HOSTS}", self.random.uniform(-86400, 86400)
        engine = functools.partial(UnevenEngine, delay_s=self.delay_s)
        pid = start_worker(self.folder, self.corpus, self.ranks[slot], engine, host=host, skew_s=skew_s)
        self.alive[pid] = slot
        self.counts["lives"] += 1

    def tend(self) -> None:
        """Wake those that have slept enough; start anew those that ended before all is done."""
        for pid, until in list(self.stopped.items()):
            if time.monotonic() > until:
                del self.stopped[pid]
                os.kill(pid, signal.SIGCONT)
        for pid in list(self.alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                slot = self.alive.pop(pid)
                self.stopped.pop(pid, None)
                code = os.waitstatus_to_exitcode(status)
                if code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM):  # the last: before it listens
                    raise SystemExit(f"a worker ended with exit code {code}")
                if code:
                    self.start(slot)

    def strike(self) -> None:
        """Do something bad to someone."""
        victim = self.random.choice(list(self.alive))
        if psutil.Process(victim).status() == psutil.STATUS_ZOMBIE:
            return
        event = self.random.choices(("kills", "stops", "drains"), (20, 1, 1))[0]
        if event == "stops" and victim in self.stopped:
            return
        self.counts[event] += 1
        os.kill(victim, {"kills": signal.SIGKILL, "stops": signal.SIGSTOP, "drains": signal.SIGTERM}[event])
        if event == "stops":
            self.stopped[victim] = time.monotonic() + 2 * LEASE_S

    def run(self, partitions: int, kills: int, pause_s: float) -> None:
        """Start all, strike until `kills` were killed, then let them finish."""
        deadline = time.monotonic() + DEADLINE_S
        self.delay_s.value = SLOW_S
        for slot in range(len(self.ranks)):
            self.start(slot)
        next_strike = time.monotonic()
        while self.alive:
            self.tend()
            # A worker has a few more in hand: at the end they must not outrun the last kills.
            near = min(len(list_commits(self.folder)) + 4 * len(self.ranks), partitions)
            killing = self.counts["kills"] < kills
            ahead = killing and near * kills >= self.counts["kills"] * partitions
            self.delay_s.value = SLOW_S if ahead else FAST_S
            if time.monotonic() > deadline:
                raise SystemExit("the run does not end")
            if self.alive and self.counts["kills"] < kills and time.monotonic() > next_strike:
                self.strike()
                next_strike = time.monotonic() + self.random.expovariate(1 / pause_s)
            time.sleep(0.002)


def problems(folder: Path, corpus: Path, partitions: int) -> list[str]:
    """What is wrong with a finished run."""
    found = verify_cache(folder).problems
    if len(list_commits(folder)) != partitions:
        found.append(f"{len(list_commits(folder))} commits of {partitions}")
    keys = [sequence.key for sequence in open_cache(folder)]
    if keys != [sequence.key for sequence in Corpus(corpus).rows()]:
        found.append("the sequences are not those of the corpus")
    if os.listdir(folder / LEASES):
        found.append(f"leases are left: {os.listdir(folder / LEASES)}")
    if psutil.Process().children(recursive=True):
        found.append("processes are left")
    return found


def main() -> None:
    """Run every seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--partitions", type=int, default=500)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.03, help="mean seconds between two strikes")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    options = parser.parse_args()
    scratch = LocalStore(tempfile.mkdtemp(dir=options.folder, prefix="chaos-"))
    try:
        corpus = tiny_corpus(scratch / "corpus", options.partitions)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            folder = new_cache(scratch / f"cache{seed}", corpus)
            started = time.monotonic()
            chaos = Chaos(folder, corpus, options.workers, seed)
            chaos.run(options.partitions, options.kills, options.pause)
            found = problems(folder, corpus, options.partitions)
            spare = len(os.listdir(folder / SHARDS)) - options.partitions
            result = {
                "seed": seed,
                **chaos.counts,
                "spare_files": spare,
                "seconds": round(time.monotonic() - started, 1),
            }
            print(json.dumps(result | {"problems": found}), flush=True)
            if found or chaos.counts["kills"] < options.kills:
                sys.exit(1)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
