"""What leases, commits and status cost a partition, with many workers on one folder.

    python -m benchmarks.scale --partitions 10000 --workers 256
    python -m benchmarks.scale --partitions 1000 --workers 64 --store

Runs the real code of plan, claims, leases, commit and status, with shards that hold nothing and without a
teacher, and counts the file operations of each part by name. The 256 workers take turns in one process:
each has a partition in hand while the others go on, so that listings and leases are those of 256 at once.

Milliseconds are this machine's, on a local file system. Operations are the same everywhere; what they would
take on a parallel file system (1 ms each, a listing 1 ms for 1,000 names) is computed from them.

With --store the cache lies in tests.support.s3_server on loopback, and the requests of each part are counted. What they
would cost on S3 is computed: a PUT, or 1,000 names of a listing, 5e-6 dollars, a GET or HEAD 4e-7, a delete nothing.
"""

import argparse
import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import obstore

from pipeline.cache.commits import COMMITS, SHARDS
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.partitions import plan_partitions
from pipeline.formats.arrow import ArrowShardWriter
from pipeline.formats.layout import ShardCounts
from pipeline.runs.heartbeat import Heartbeat
from pipeline.runs.partition_claims import PartitionClaims
from pipeline.runs.rank import Rank
from pipeline.runs.status import StatusReader
from pipeline.runs.terms import RunTerms, begin_run
from pipeline.stores.numbered import list_names
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.store import Store
from pipeline.tokenizer import TokenizerIdentity
from tests.support.object_store import running

SEQUENCE_TOKENS = 2048
SEQUENCES = 512
"""A partition of a million tokens."""
FILES = ("open", "listdir", "stat", "link", "replace", "unlink", "utime", "fsync", "mkdir")
REQUESTS = ("put", "get", "head", "list_with_delimiter", "delete")
LISTING = "names listed"
MS_PARALLEL = 1.0
DOLLARS = {"put": 5e-6, "get": 4e-7, "head": 4e-7}
DOLLARS_PAGE = 5e-6


@dataclass
class Cost:
    """Of one part of a run."""

    seconds: float = 0.0
    operations: Counter = field(default_factory=Counter)


class Meter:
    """Counts file operations or requests, and time, by the part of the run that is named at the moment."""

    def __init__(self, module: Any, names: tuple[str, ...]) -> None:
        self.costs: dict[str, Cost] = {}
        self._part: str | None = None
        self._module = module
        self._originals = {name: getattr(module, name) for name in names}
        self._open = open

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count from here."""
        import builtins
        import io

        for name, original in self._originals.items():
            setattr(self._module, name, self._counted(name, original))
        if "open" in self._originals:
            builtins.open = io.open = self._counted("open", self._open)
        try:
            yield
        finally:
            for name, original in self._originals.items():
                setattr(self._module, name, original)
            builtins.open = io.open = self._open

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part."""
        outer, self._part = self._part, name
        cost = self.costs.setdefault(name, Cost())
        started = time.perf_counter()
        try:
            yield
        finally:
            cost.seconds += time.perf_counter() - started
            self._part = outer

    def _counted(self, name: str, original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            operations = Counter() if self._part is None else self.costs[self._part].operations
            operations[_kind(name, args, kwargs)] += 1  # one that fails costs as much
            result = original(*args, **kwargs)
            if name == "listdir":
                operations[LISTING] += len(result)
            elif name == "list_with_delimiter":
                operations[LISTING] += len(result["objects"]) + len(result["common_prefixes"])
            return result

        return run


def _kind(name: str, args: tuple, kwargs: dict) -> str:
    if name != "open":
        return name
    mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
    writes = mode & (os.O_WRONLY | os.O_CREAT) if isinstance(mode, int) else set("wxa+") & set(mode)
    return "open for writing" if writes else "open"


class SimulatedWorker:
    """A worker with its own view, leases and record, whose teacher takes `pace` turns for a partition."""

    def __init__(self, folder: Store, manifest: CacheManifest, rank: Rank, pace: int, meter: Meter) -> None:
        self.folder, self.meter, self.pace = folder, meter, pace
        self.heartbeat = Heartbeat(folder, rank, 180.0, owner=f"node{rank.worker}.1.1")
        nobody = SimpleNamespace(requested=False, sleep=lambda seconds: None)
        self.claims = PartitionClaims(
            folder, range(manifest.num_partitions), rank, self.heartbeat, nobody, max_failures=3
        )
        self.claims.poll_s = 0.0  # turns are shorter than minutes: look as often as a real worker would
        self.in_hand: int | None = None
        self.stream = iter(())
        self.cache = CacheFolder(folder)
        self.layout = manifest.layout(ShardCounts(num_sequences=1, num_tokens=1, num_documents=1, num_targets=1))

    def begin(self) -> None:
        """The first beat, the first listing, the first lease."""
        with self.meter.part("start of a worker"):
            self.heartbeat._write()
            self.claims._refresh()
        with self.meter.part("lease"):
            if self.claims.wait():
                self.stream = self.claims.stream()
                self.in_hand = next(self.stream)

    def turn(self) -> bool:
        """Commit what is in hand and take the next; False if there is none."""
        if self.in_hand is None:
            return False
        with self.cache.new_shard(self.in_hand) as partial:
            ArrowShardWriter(partial, self.layout).close()
            with self.meter.part("commit"):
                self.cache.commit(self.in_hand, partial, self.layout.counts, {"seconds": 300.0})
        with self.meter.part("lease"):
            self.claims.settle(self.in_hand, won=True)
            self.in_hand = next(self.stream, None)
        with self.meter.part("heartbeat"):
            self.heartbeat._write()
            self.heartbeat.leases.renew()
            self.heartbeat.events.flush()
        return True


def manifest_of(folder: Store, num_partitions: int, meter: Meter) -> CacheManifest:
    """The plan, written."""
    folder.mkdir()
    for name in (SHARDS, COMMITS):
        (folder / name).mkdir()
    begin_run(folder, RunTerms())
    tokens = np.full(num_partitions * SEQUENCES, SEQUENCE_TOKENS)
    with meter.part("plan"):
        partitions = plan_partitions(tokens, SEQUENCES * SEQUENCE_TOKENS)
        manifest = fake_manifest(partitions, int(tokens.sum()))
        manifest.write(folder)
    return manifest


def fake_manifest(partitions: tuple[int, ...], num_tokens: int) -> CacheManifest:
    """A manifest of which only the division of the work matters."""
    tokenizer = TokenizerIdentity(vocab_size=102_400, vocabulary="0" * 32, probe="0" * 32)
    return CacheManifest(
        teacher={},
        tokenizer=tokenizer,
        vocab_size=102_400,
        padded_vocab_size=102_400,
        top_k=64,
        temperatures=(1.0, 2.0),
        tail_samples=0,
        draw_temperature=None,
        max_kl_error=1e-4,
        container="arrow",
        corpus="0" * 32,
        packing="isolated",
        sequence_length=SEQUENCE_TOKENS,
        num_tokens=num_tokens,
        num_targets=num_tokens,
        partitions=partitions,
        settings={},
        software={},
    )


def simulate(folder: Store, num_partitions: int, num_workers: int, meter: Meter) -> None:
    """A whole run, and its status when half of it is done."""
    manifest = manifest_of(folder, num_partitions, meter)
    paces = np.random.default_rng(0).integers(2, 5, num_workers)
    workers = [
        SimulatedWorker(folder, manifest, Rank(index, num_workers), int(pace), meter)
        for index, pace in enumerate(paces)
    ]
    for worker in workers:
        worker.begin()
    reader, turns, looked = StatusReader(folder), 0, False
    while any(worker.in_hand is not None for worker in workers):
        turns += 1
        for worker in workers:
            if turns % worker.pace == 0:
                worker.turn()
        if not looked and len(list_names(folder / COMMITS)) >= num_partitions / 2:
            looked = True
            with meter.part("status, first look"):
                reader.read()
            with meter.part("status, next look"):
                reader.read()
    with meter.part("look of an idle worker"):
        workers[0].claims._refresh()
        assert workers[0].claims.unsettled() == []


def report(meter: Meter, num_partitions: int, num_workers: int, *, store: bool) -> None:
    """A row a part."""
    per = {"lease": num_partitions, "commit": num_partitions, "heartbeat": num_partitions}
    per |= {"start of a worker": num_workers}
    print(f"{num_partitions} partitions, {num_workers} workers; {processor()}, {os.cpu_count()} cores\n")
    cost_of, calls = ("$ / 1e6", "requests") if store else ("on 1 ms", "operations")
    print(f"{'part':<24}{'of each':<12}{'ms':>8}{cost_of:>9}  {calls}")
    for name, cost in meter.costs.items():
        count = per.get(name, 1)
        operations = {kind: number / count for kind, number in cost.operations.items()}
        listed = operations.pop(LISTING, 0.0)
        price = _dollars(operations, listed) * 1e6 if store else _milliseconds(operations, listed)
        text = ", ".join(f"{number:.2f} {kind}" for kind, number in sorted(operations.items()))
        text += f", {listed:.0f} names listed" if listed else ""
        of_each = {num_partitions: "partition", num_workers: "worker"}.get(count, "run")
        print(f"{name:<24}{of_each:<12}{1e3 * cost.seconds / count:>8.2f}{price:>9.1f}  {text}")


def _milliseconds(operations: dict[str, float], listed: float) -> float:
    return (sum(operations.values()) - operations.get("fsync", 0.0) + listed / 1000) * MS_PARALLEL


def _dollars(operations: dict[str, float], listed: float) -> float:
    pages = max(operations.get("list_with_delimiter", 0.0), listed / 1000)
    return pages * DOLLARS_PAGE + sum(number * DOLLARS.get(kind, 0.0) for kind, number in operations.items())


def processor() -> str:
    """What the machine calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Simulate and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--partitions", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--store", action="store_true", help="on tests.support.s3_server instead of in a folder")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.folder, prefix="scale-"))
    meter = Meter(obstore, REQUESTS) if options.store else Meter(os, FILES)
    try:
        with contextlib.ExitStack() as stack:
            folder: Store = scratch / "cache"
            if options.store:
                server = stack.enter_context(running(scratch))
                os.environ.update(server.environment(scratch / "copies"))
                folder = ObjectStore("s3://bucket/cache")
            with meter.counting():
                simulate(folder, options.partitions, options.workers, meter)
    finally:
        shutil.rmtree(scratch)
    report(meter, options.partitions, options.workers, store=options.store)


if __name__ == "__main__":
    main()
