"""What reading a cache by eye takes: targets a CPU second, by one core.

    python -m benchmarks.inspecting CACHE [CACHE ...] [--rounds 3]

*Scalars*: surprise, entropy and tail mass of every position at the lowest temperature, and their means by document, of
sequences that are in memory already, and with reading and checking them. *The worst* and *all figures*: what
`pipeline inspect --worst 20` counts, and with --html too, at every temperature of the cache. Each the fastest of some
passes over all sequences after one that does not count.
"""

import argparse
import os
from collections.abc import Callable, Iterable

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.reading import fastest
from pipeline.cache.measures import documents_of, group_means, measured
from pipeline.cache.reader import PartialCache
from pipeline.formats.layout import CachedSequence
from pipeline.inspection.figures import WAYS, Figures
from pipeline.inspection.sample import Sample
from pipeline.progress import Reporter


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("caches", nargs="+", help="Folders of caches, finished or not.")
    parser.add_argument("--rounds", type=int, default=3, help="Passes over a cache; the fastest counts.")
    options = parser.parse_args()
    for folder in options.caches:
        cache = PartialCache(folder)
        manifest, sample = cache.manifest, Sample.draw(cache, 0, 1, 0)
        num_targets = sum(record.num_targets for record in cache.records.values())
        known = [sequence for _, sequence in sample.read(Reporter())]
        temperature = min(manifest.temperatures)
        passes: dict[str, Callable[[], object]] = {
            "reading": lambda sample=sample: list(sample.read(Reporter())),
            "scalars, in memory": lambda known=known, T=temperature: _scalars(known, T),
            "scalars, with reading": lambda sample=sample, T=temperature: _scalars(
                (sequence for _, sequence in sample.read(Reporter())), T
            ),
            "the worst, with reading": lambda sample=sample, T=temperature: Figures(
                sample.cache.manifest, T, 20, charts=False
            ).add_all(sample.read(Reporter())),
            "all figures, with reading": lambda sample=sample, T=temperature: Figures(
                sample.cache.manifest, T, 20
            ).add_all(sample.read(Reporter())),
        }
        print(
            f"{folder}: {manifest.container}, k={manifest.top_k}, {len(manifest.temperatures)} temperatures, "
            f"{num_targets:,} targets in {len(known):,} sequences"
        )
        for name, run in passes.items():
            print(
                f"  {name}: {num_targets / fastest(run, options.rounds) / 1e6:.2f} M targets a CPU second", flush=True
            )


def _scalars(sequences: Iterable[CachedSequence], temperature: float) -> float:
    total = 0.0
    for sequence in sequences:
        measures = measured(sequence.targets, temperature)
        documents, count = documents_of(sequence), len(sequence.document_lengths)
        total += sum(float(group_means(getattr(measures, way), documents, count)[1][0]) for way in WAYS)
    return total


if __name__ == "__main__":
    main()
