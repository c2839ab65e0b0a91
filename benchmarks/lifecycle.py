"""What is done with a finished cache, in CPU time of one core: verify, convert, merge, export, reuse.

    python benchmarks/lifecycle.py [--sequences 96] [--top-k 64] [--repeats 3]

A cache of made-up targets (a vocabulary of a few hundred, so that Zarr shards are smaller than a real
teacher's). Each line is the best of the repeats: megabytes of shards and targets a second of CPU time, and
the ratio to hashing the same shards, which is the floor of anything that checks them.
"""

import argparse
import dataclasses
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.cache.commits import SHARDS
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.verify import verify_cache
from pipeline.corpus import TOKENIZER, Corpus
from pipeline.files import hash_file
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.export import export_cache
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.reuse import KnownTargets
from pipeline.lifecycle.settings import ConvertConfig, ExportConfig, MergeConfig
from stages.cache_logits.capture import capture
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.small import fake_manifest, make_corpus, random_sequences


def cpu_seconds(work: Callable[[Path], object], repeats: int) -> float:
    """The least CPU time of `work`, which is given an empty folder."""
    times = []
    for _ in range(repeats):
        scratch = Path(tempfile.mkdtemp())
        try:
            started = time.process_time()
            work(scratch)
            times.append(time.process_time() - started)
        finally:
            shutil.rmtree(scratch)
    return min(times)


def make_cache(folder: Path, corpus_folder: Path, container: str, top_k: int) -> Path:
    """A cache of four shards."""
    corpus = Corpus(corpus_folder)
    bounds = tuple(len(corpus) * index // 4 for index in range(5))
    manifest = dataclasses.replace(fake_manifest(corpus, container=container, top_k=top_k), partitions=bounds)
    CacheFolder.begin(folder, manifest, corpus_folder / TOKENIZER)
    capture(FakeEngine(manifest), corpus, CacheFolder(folder), range(4))
    return folder


def load_all(corpus: Path, cache: Path) -> None:
    """Every sequence as a run with --reuse finds it."""
    known = KnownTargets([cache], CacheManifest.read(cache))
    for sequence in Corpus(corpus).rows():
        known.load(known.find_one(sequence.key), sequence.key)


def works(corpus: Path, arrow: Path, zarr: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """What is measured, by name, and the cache that it reads."""
    return {
        "hash": (arrow, lambda scratch: [hash_file(path) for path in (arrow / SHARDS).iterdir()]),
        "verify arrow": (arrow, lambda scratch: verify_cache(arrow, workers=1)),
        "verify zarr": (zarr, lambda scratch: verify_cache(zarr, workers=1)),
        "convert to zarr": (
            arrow,
            lambda scratch: convert_cache(ConvertConfig(cache=arrow, format="zarr", out=scratch / "out", workers=1)),
        ),
        "convert to arrow": (
            zarr,
            lambda scratch: convert_cache(ConvertConfig(cache=zarr, format="arrow", out=scratch / "out", workers=1)),
        ),
        "merge": (
            arrow,
            lambda scratch: merge_caches(MergeConfig(caches=(arrow, arrow), out=scratch / "out", workers=1)),
        ),
        "export": (arrow, lambda scratch: export_cache(ExportConfig(cache=arrow, out=scratch / "out", workers=1))),
        "reuse": (arrow, lambda scratch: load_all(corpus, arrow)),
    }


def main() -> None:
    """Make the caches, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        sequences = random_sequences(options.sequences, 300, longest=2048)
        corpus = make_corpus(folder / "corpus", sequences, num_partitions=1)
        caches = [make_cache(folder / name, corpus, name, options.top_k) for name in ("arrow", "zarr")]
        targets = CacheManifest.read(caches[0]).num_targets
        print(f"{platform.processor() or platform.machine()}; {targets:,} targets, k={options.top_k}, one core")
        print(f"{'':18}{'MB/s':>8}{'targets/s':>14}{'over hash':>11}")
        floor = None
        for name, (cache, work) in works(corpus, *caches).items():
            seconds = cpu_seconds(work, options.repeats)
            megabytes = sum(path.stat().st_size for path in (cache / SHARDS).iterdir()) / 1e6
            floor = floor or seconds
            print(f"{name:18}{megabytes / seconds:8,.0f}{targets / seconds:14,.0f}{seconds / floor:11.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
