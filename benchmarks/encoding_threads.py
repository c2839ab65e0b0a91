"""Targets a second that several threads encode: from captured ones to a finished shard, by the clock.

    python -m benchmarks.encoding_threads [--work data/bench] [--threads 1 2 4] [--rounds 9] [--containers arrow zarr]

One shard of the neural teacher of benchmarks/storage_teacher.py at k=64, T=1 and T=2, as `cache-logits` writes it: the
sequences rounded, measured against what was captured, packed, compressed. Rounds are interleaved, and the fastest one
counts: on a machine that does other work the others say how much of it there was. Fails if the files differ.
"""

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.storage import sequences_of
from benchmarks.storage_teacher import load_targets
from pipeline.cache.statistics import TargetStatistics
from pipeline.cpu import available_cores
from pipeline.files import hash_file
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts, ShardLayout
from pipeline.parallel import Threads
from pipeline.targets import TargetSpec
from stages.cache_logits.capture import encoded, groups
from stages.cache_logits.scoring import ScoredRow


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("data/bench"), help="Folder of the teachers' targets.")
    parser.add_argument("--sequences", type=int, default=64, help="Sequences of the shard.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--containers", nargs="+", default=CONTAINERS.names, choices=CONTAINERS.names)
    options = parser.parse_args()
    rows, layout = _captured(options.work, options.sequences)
    num_targets = layout.counts.num_targets
    print(f"{num_targets:,} targets, {available_cores()} cores, load {os.getloadavg()[0]:.1f}")
    for container in options.containers:
        rounds = [[_write(container, rows, layout, count) for count in options.threads] for _ in range(options.rounds)]
        assert len({digest for row in rounds for _, _, digest in row}) == 1, "other threads, another file"
        one = min(row[0][0] for row in rounds)
        for index, count in enumerate(options.threads):
            seconds, cpu = (min(row[index][part] for row in rounds) for part in (0, 1))
            print(
                f"{container}, {count} threads: {num_targets / seconds:,.0f} targets/s, {one / seconds:.2f} times the "
                f"first, {cpu / num_targets * 1e6:.1f} us of CPU a target",
                flush=True,
            )


def _captured(work: Path, num_sequences: int) -> tuple[list[ScoredRow], ShardLayout]:
    tokens, targets = load_targets(work, "neural", num_sequences)
    rows = []
    for sequence, part in sequences_of(tokens, targets):
        row = ScoredRow(sequence)
        assert len(list(row.requests())) == 1
        row.answer(0, part)
        rows.append(row)
    spec = TargetSpec(top_k=targets.top_k, temperatures=targets.temperatures, max_kl_error=1e-4)
    return rows, ShardLayout(counts=ShardCounts.of([row.sequence for row in rows]), spec=spec)


def _write(container: str, rows: list[ScoredRow], layout: ShardLayout, count: int) -> tuple[float, float, str]:
    """Seconds by the clock and of CPU that a shard took, and its hash."""
    with tempfile.TemporaryDirectory() as folder, Threads(count) as threads:
        path = Path(folder) / "shard"
        started, started_cpu = time.perf_counter(), time.process_time()
        writer, statistics = CONTAINERS[container].create(path, layout), TargetStatistics(layout)
        for sequences in threads.map(functools.partial(encoded, layout), groups(rows)):
            for columns, added in sequences:
                statistics.add(added)
                writer.append(columns)
        writer.close(threads)
        return time.perf_counter() - started, time.process_time() - started_cpu, hash_file(path)


if __name__ == "__main__":
    main()
