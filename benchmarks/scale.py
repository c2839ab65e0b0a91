"""What leases, commits and status cost a partition, with many workers on one folder.

    python -m benchmarks.scale --partitions 10000 --workers 256

Runs the real code of plan, claims, leases, commit and status, with shards that hold nothing and without a
teacher, and counts the file operations of each part by name. The 256 workers take turns in one process:
each has a partition in hand while the others go on, so that listings and leases are those of 256 at once.

Milliseconds are this machine's, on a local file system. Operations are the same everywhere; what they would
take on a parallel file system (1 ms each, a listing 1 ms for 1,000 names) and cost on S3 (a conditional PUT,
a LIST of 1,000 keys or a PUT 5e-6 dollars, a GET or HEAD 4e-7) is computed from them.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.manifest import CacheManifest
from pipeline.runs.claims import Claims
from pipeline.runs.commits import COMMITS, SHARDS, commit_shard, partial_shard_path
from pipeline.runs.failures import FAILURES
from pipeline.runs.leases import LEASES
from pipeline.runs.plan import plan_partitions
from pipeline.runs.presence import WORKERS, Presence
from pipeline.runs.rank import Rank
from pipeline.runs.status import StatusReader
from pipeline.shards.arrow import ArrowShardWriter
from pipeline.tokenizer import TokenizerIdentity

SEQUENCE_TOKENS = 2048
SEQUENCES = 512
"""A partition of a million tokens."""
COUNTED = ("open", "listdir", "stat", "link", "replace", "unlink", "utime", "fsync", "mkdir")
WRITES = ("open for writing", "link", "replace", "utime")
MS_PARALLEL = 1.0
DOLLARS_WRITE, DOLLARS_READ = 5e-6, 4e-7


@dataclass
class Cost:
    """Of one part of a run."""

    seconds: float = 0.0
    operations: Counter = field(default_factory=Counter)


class Meter:
    """Counts file operations and time, by the part of the run that is named at the moment."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._part: str | None = None
        self._originals = {name: getattr(os, name) for name in COUNTED}
        self._open = open

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from here."""
        import builtins
        import io

        for name, original in self._originals.items():
            setattr(os, name, self._counted(name, original))
        builtins.open = io.open = self._counted("open", self._open)
        try:
            yield
        finally:
            for name, original in self._originals.items():
                setattr(os, name, original)
            builtins.open = io.open = self._open

    @contextmanager
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
            result = original(*args, **kwargs)
            if self._part is not None:
                operations = self.costs[self._part].operations
                operations[_kind(name, args, kwargs)] += 1
                if name == "listdir":
                    operations["names listed"] += len(result)
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

    def __init__(self, folder: Path, manifest: CacheManifest, rank: Rank, pace: int, meter: Meter) -> None:
        self.folder, self.meter, self.pace = folder, meter, pace
        self.presence = Presence(folder, rank, 180.0, owner=f"node{rank.worker}.1.1")
        nobody = SimpleNamespace(requested=False, sleep=lambda seconds: None)
        self.claims = Claims(folder, manifest.num_partitions, rank, self.presence, nobody, max_failures=3)
        self.claims._poll_s = 0.0  # turns are shorter than minutes: look as often as a real worker would
        self.in_hand: int | None = None
        self.stream = iter(())
        self.layout = manifest.layout(num_sequences=1, num_tokens=1, num_documents=1, num_targets=1)

    def begin(self) -> None:
        """The first beat, the first listing, the first lease."""
        with self.meter.part("start of a worker"):
            self.presence._write()
            self.claims._refresh()
        with self.meter.part("lease"):
            if self.claims.wait():
                self.stream = self.claims.stream()
                self.in_hand = next(self.stream)

    def turn(self) -> bool:
        """Commit what is in hand and take the next; False if there is none."""
        if self.in_hand is None:
            return False
        partial = partial_shard_path(self.folder, self.in_hand, ".arrow")
        ArrowShardWriter(partial, self.layout).close()
        with self.meter.part("commit"):
            commit_shard(self.folder, self.in_hand, partial, self.layout, {"seconds": 300.0})
        with self.meter.part("lease"):
            self.claims.settle(self.in_hand)
            self.in_hand = next(self.stream, None)
        with self.meter.part("heartbeat"):
            self.presence._write()
            self.presence.leases.renew()
        return True


def manifest_of(folder: Path, num_partitions: int, meter: Meter) -> CacheManifest:
    """The plan, written."""
    for name in (SHARDS, COMMITS, LEASES, FAILURES, WORKERS):
        (folder / name).mkdir(parents=True)
    tokens = np.full(num_partitions * SEQUENCES, SEQUENCE_TOKENS)
    with meter.part("plan"):
        partitions = plan_partitions(tokens, SEQUENCES * SEQUENCE_TOKENS)
        manifest = fake_manifest(partitions, int(tokens.sum()))
        manifest.write(folder)
    return manifest


def fake_manifest(partitions: tuple[int, ...], num_tokens: int) -> CacheManifest:
    """A manifest of which only the division of the work matters."""
    tokenizer = TokenizerIdentity(**{field.name: "" for field in fields(TokenizerIdentity)} | {"vocab_size": 102_400})
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
        corpus="",
        packing="isolated",
        sequence_length=SEQUENCE_TOKENS,
        num_tokens=num_tokens,
        num_targets=num_tokens,
        partitions=partitions,
        settings={},
        software={},
    )


def simulate(folder: Path, num_partitions: int, num_workers: int, meter: Meter) -> None:
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
        if not looked and len(os.listdir(folder / COMMITS)) >= num_partitions / 2:
            looked = True
            with meter.part("status, first look"):
                reader.read()
            with meter.part("status, next look"):
                reader.read()
    with meter.part("look of an idle worker"):
        workers[0].claims._refresh()
        assert workers[0].claims.unsettled() == []


def report(meter: Meter, num_partitions: int, num_workers: int) -> None:
    """A row a part."""
    per = {"lease": num_partitions, "commit": num_partitions, "heartbeat": num_partitions}
    per |= {"start of a worker": num_workers}
    print(f"{num_partitions} partitions, {num_workers} workers; {processor()}, {os.cpu_count()} cores\n")
    print(f"{'part':<24}{'of each':<12}{'ms':>8}{'on 1 ms':>9}{'S3 $/1e6':>10}  file operations")
    for name, cost in meter.costs.items():
        count = per.get(name, 1)
        operations = {kind: number / count for kind, number in cost.operations.items()}
        listed = operations.pop("names listed", 0.0)
        requests = sum(operations.values()) - operations.get("fsync", 0.0)
        pages = listed / 1000
        dollars = 1e6 * (pages + sum(operations.get(kind, 0.0) for kind in WRITES)) * DOLLARS_WRITE
        dollars += 1e6 * sum(operations.get(kind, 0.0) for kind in ("open", "stat")) * DOLLARS_READ
        text = ", ".join(f"{number:.2f} {kind}" for kind, number in sorted(operations.items()))
        text += f", {listed:.0f} names listed" if listed else ""
        of_each = {num_partitions: "partition", num_workers: "worker"}.get(count, "run")
        milliseconds, remote = 1e3 * cost.seconds / count, (requests + pages) * MS_PARALLEL
        print(f"{name:<24}{of_each:<12}{milliseconds:>8.2f}{remote:>9.1f}{dollars:>10.1f}  {text}")


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
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.folder, prefix="scale-"))
    meter = Meter()
    try:
        with meter.counting():
            simulate(scratch / "cache", options.partitions, options.workers, meter)
    finally:
        shutil.rmtree(scratch)
    report(meter, options.partitions, options.workers)


if __name__ == "__main__":
    main()
