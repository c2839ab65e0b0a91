"""Reading a cache: random access to its sequences, and opening one of 10,000 shards.

    python -m benchmarks.reading [--work data/bench]

Random access: a cache of four shards of the mixture of benchmarks/storage_teacher.py, sequences of 1,024 tokens,
k=64, T=1 and T=2; every sequence by `cache[i]` in a shuffled order, then 16 at a time by `cache.batch`, after one
pass that warms the page cache and opens the shards. Beside it what zarr-python and, where it is installed, zarrs
take for the same Zarr shards.

Opening: manifest and records of 10,000 shards and 10,000,000 sequences, without the shards; the first time, which
makes the index, and from then on. Each in a process of its own, whose peak memory is that of Python and its
libraries too.
"""

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.storage_teacher import SEQUENCE, VOCAB_SIZE
from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS, ShardCommit, commit_path
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts, encode
from pipeline.stores.sealed import write_json
from pipeline.tokenizer import TokenizerIdentity

NUM_SHARDS, SEQUENCES_A_SHARD = 10_000, 1_000
BATCH = 16
OPENING = """
import sys, time
from pathlib import Path
from pipeline import open_cache
started = time.perf_counter()
cache = open_cache(sys.argv[1])
seconds = time.perf_counter() - started
(peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(f"{len(cache):,} sequences in {seconds:.3f} s; peak memory of the process {int(peak) / 1024:.0f} MiB")
"""
"""What a process does that opens a cache: no benchmark's imports."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("data/bench"), help="Folder of the teachers' targets.")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="Passes over the cache; the fastest counts.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for container in CONTAINERS:
            _print_random_access(Path(name) / container, container, options)
        folder = Path(name) / "large"
        _simulate(folder)
        for what in ("first, makes the index", "again"):
            command = [sys.executable, "-c", OPENING, str(folder)]
            print(f"open {NUM_SHARDS:,} shards, {what}:", subprocess.check_output(command, text=True).strip())


def _print_random_access(folder: Path, container: str, options: argparse.Namespace) -> None:
    _write_cache(folder, container, options)
    cache = open_cache(folder)
    num_tokens = len(cache) * SEQUENCE
    order = np.random.default_rng(0).permutation(len(cache)).tolist()
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    reads = {
        "cache[i]": lambda: [cache[index] for index in order],
        f"cache.batch, {BATCH} at a time": lambda: [cache.batch(batch) for batch in batches],
        "and probs(2.0), tail_mass(2.0)": lambda: [
            (item.targets.probs(2.0), item.targets.tail_mass(2.0)) for item in map(cache.__getitem__, order)
        ],
    }
    others = _other_readers(folder, cache.commits[0]) if container == "zarr" else {}
    for name, read in (reads | others).items():
        count = num_tokens if name in reads else cache.commits[0].num_tokens
        print(
            f"{container}: {name}: {count / fastest(read, options.rounds) / 1e6:.2f} M tokens a CPU second", flush=True
        )


def _other_readers(folder: Path, commit: ShardCommit) -> dict[str, Callable[[], object]]:
    """Reads of a shard's two large arrays, sequence by sequence: by zarr and, where it is installed, by zarrs."""
    import zarr

    path = folder / SHARDS / commit.file
    readers = {"zarr-python": (zarr.storage.ZipStore(path, mode="r"), {})}
    if importlib.util.find_spec("zarrs"):
        zipfile.ZipFile(path).extractall(folder / "unzipped.zarr")
        settings = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
        readers["zarrs, unzipped"] = folder / "unzipped.zarr", settings
    rows = commit.num_targets // commit.num_sequences
    found: dict[str, Callable[[], object]] = {}
    for name, (store, settings) in readers.items():
        with warnings.catch_warnings(), zarr.config.set(settings):
            warnings.simplefilter("ignore")
            group = zarr.open_group(store, mode="r")
            arrays = [group["codes"], group["steps"]]

        def read(arrays: list = arrays) -> object:
            return [array[at : at + rows] for at in range(0, commit.num_targets, rows) for array in arrays]

        found[f"{name}, codes and steps alone"] = read
    return found


def _write_cache(folder: Path, container: str, options: argparse.Namespace) -> None:
    from benchmarks.storage import sequences_of
    from benchmarks.storage_teacher import load_targets

    captured = sequences_of(*load_targets(options.work, "mixture", options.sequences))
    cuts = np.linspace(0, len(captured), options.shards + 1).astype(int)
    manifest = _manifest(folder, container, tuple(cuts.tolist()), SEQUENCE)
    cache = CacheFolder(folder)
    for partition, (start, stop) in enumerate(itertools.pairwise(cuts.tolist())):
        rows = captured[start:stop]
        layout = manifest.layout(ShardCounts.of([sequence for sequence, _ in rows]))
        with cache.new_shard(partition) as path:
            writer = CONTAINERS[container].create(path, layout)
            for row in rows:
                writer.append(encode(layout, *row))
            writer.close()
            cache.commit(partition, path, layout.counts, {})


def _manifest(folder: Path, container: str, partitions: tuple[int, ...], length: int) -> CacheManifest:
    for name in (SHARDS, COMMITS):
        (folder / name).mkdir(parents=True)
    manifest = CacheManifest(
        teacher={"architecture": "benchmark"},
        tokenizer=TokenizerIdentity(vocab_size=VOCAB_SIZE, vocabulary="0" * 32, probe="0" * 32),
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=VOCAB_SIZE,
        top_k=64,
        temperatures=(1.0, 2.0),
        tail_samples=0,
        draw_temperature=None,
        max_kl_error=1e-4,
        container=container,
        corpus="0" * 32,
        packing="isolated",
        sequence_length=length,
        num_tokens=partitions[-1] * length,
        num_targets=partitions[-1] * (length - 1),
        partitions=partitions,
        settings={},
        software={},
    )
    manifest.write(folder)
    return manifest


def _simulate(folder: Path) -> None:
    """A cache of NUM_SHARDS shards, but for the shards."""
    partitions = tuple(range(0, NUM_SHARDS * SEQUENCES_A_SHARD + 1, SEQUENCES_A_SHARD))
    _manifest(folder, "zarr", partitions, 2048)
    sums = {"sum_entropy": [1.5e6, 4e6], "sum_tail_mass": [1e5, 9e5], "mean_kl_error": [6e-5, 2e-5], "seconds": 900.0}
    for partition in range(NUM_SHARDS):
        commit = ShardCommit(
            partition=partition,
            file=f"{partition:05d}-0123abcd-host.4026531836.12345.zarr.zip",
            bytes=180_000_000,
            xxh3_128="0" * 32,
            structure="0" * 32,
            num_sequences=SEQUENCES_A_SHARD,
            num_tokens=SEQUENCES_A_SHARD * 2048,
            num_documents=SEQUENCES_A_SHARD,
            num_targets=SEQUENCES_A_SHARD * 2047,
            statistics=sums,
        )
        write_json(commit_path(folder, partition), asdict(commit))


def fastest(run: Callable[[], object], rounds: int) -> float:
    """CPU seconds of the fastest of some runs after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
