"""What `pipeline select` takes to measure a cache: targets a CPU second, by one core.

    python -m benchmarks.selecting CACHE [CACHE ...] [--rounds 5]

Every measure by sequence and by document, at the lowest temperature, opening each shard among it; beside it reading all
sequences whole. Each the fastest of some passes after one that does not count.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.reading import fastest
from pipeline import open_cache
from pipeline.selection.units import SUMMED, units_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("caches", nargs="+", help="Folders of finished caches, or views.")
    parser.add_argument("--rounds", type=int, default=5, help="Passes over a cache; the fastest counts.")
    options = parser.parse_args()
    for folder in options.caches:
        cache = open_cache(folder)
        manifest, pieces = cache.manifest, cache.pieces()
        temperature = min(manifest.temperatures)
        print(f"{folder}: {manifest.container}, k={manifest.top_k}, {manifest.num_targets:,} targets")
        passes = {"whole sequences": lambda cache=cache: list(cache)}
        for measure in ("targets", "entropy", "tail-mass", "sure", "perplexity"):
            for by in ("sequence", "document"):
                passes[f"{measure} by {by}"] = lambda sums=SUMMED[measure], by=by, pieces=pieces, T=temperature: [
                    units_of(piece, by, sums, T, 0.9) for piece in pieces
                ]
        for name, run in passes.items():
            speed = manifest.num_targets / fastest(run, options.rounds) / 1e6
            print(f"  {name}: {speed:.2f} M targets a CPU second", flush=True)


if __name__ == "__main__":
    main()
