"""Figures of a sample: histograms, coverage, calibration and the worst of it, read in one pass."""

from collections.abc import Iterable

import numpy as np

from pipeline.cache.manifest import CacheManifest
from pipeline.cache.measures import (
    Calibration,
    Coverage,
    Histogram,
    Largest,
    PositionMeasures,
    documents_of,
    group_means,
    measured,
    places_of,
)
from pipeline.formats.layout import CachedSequence

WAYS = {"surprises": "most surprised", "entropies": "least sure", "tail_masses": "largest tail"}
"""What may be worst at a position, by the names of PositionMeasures."""
FEWEST = 8
"""Targets that a document must have to be compared with others: the mean of less says little."""
BINS, CALIBRATION_BINS = 40, 10


class TemperatureFigures:
    """What is counted at every temperature."""

    def __init__(self, top_k: int, vocab_size: int) -> None:
        self.entropies = Histogram(np.linspace(0, max(np.log(vocab_size), 1.0), BINS + 1))
        self.label_probs = Histogram(np.linspace(0, 1, BINS // 2 + 1))
        self.tail_masses = Histogram(np.linspace(0, 1, BINS // 2 + 1))
        self.surprises = 0.0
        self.coverage = Coverage(top_k) if top_k else None
        self.calibration = Calibration(CALIBRATION_BINS) if top_k else None

    def add(self, sequence: CachedSequence, measures: PositionMeasures, temperature: float) -> None:
        """Count the positions of a sequence."""
        self.entropies.add(measures.entropies)
        self.label_probs.add(np.exp(-measures.surprises))
        self.tail_masses.add(measures.tail_masses)
        self.surprises += float(measures.surprises.sum(dtype=np.float64))
        if self.coverage is not None and self.calibration is not None:
            probs_NK = sequence.targets.probs(temperature)
            labels = sequence.token_ids[sequence.target_positions + 1]
            self.coverage.add(probs_NK)
            self.calibration.add(probs_NK[:, 0], sequence.targets.ids[:, 0] == labels)

    @property
    def cross_entropy(self) -> float:
        """Mean surprise, nats; nan of no position."""
        count = self.entropies.num_values
        return self.surprises / count if count else float("nan")


class Figures:
    """Figures over the sequences that were added."""

    def __init__(self, manifest: CacheManifest, temperature: float, num_worst: int, *, charts: bool = True) -> None:
        """Without `charts`, the worst alone: a fifth of the time."""
        self.temperature = temperature
        """Of what is said of single positions and documents."""
        self.is_ragged = manifest.spec.is_ragged
        self.by_temperature = {
            T: TemperatureFigures(manifest.top_k, manifest.vocab_size) for T in manifest.temperatures if charts
        }
        ways = [way for way in WAYS if manifest.top_k or way != "tail_masses"]  # of draws alone all is tail
        self.worst_positions = {way: Largest(num_worst) for way in ways}
        self.worst_documents = {way: Largest(num_worst) for way in ways}
        doublings = max(1, int(manifest.sequence_length).bit_length())
        self._places = np.zeros((2, doublings + 1))
        self.num_sequences = self.num_documents = self.num_targets = 0

    def add_all(self, sequences: Iterable[tuple[int, CachedSequence]]) -> "Figures":
        """Count sequences, each given with its number."""
        for number, sequence in sequences:
            self.add(number, sequence)
        return self

    def add(self, number: int, sequence: CachedSequence) -> None:
        """Count a sequence."""
        self.num_sequences += 1
        self.num_documents += len(sequence.document_lengths)
        self.num_targets += len(sequence.targets)
        for temperature, figures in self.by_temperature.items():
            figures.add(sequence, measured(sequence.targets, temperature), temperature)
        self._add_places(number, sequence, measured(sequence.targets, self.temperature))

    def by_place(self) -> list[tuple[int, int, float]]:
        """Of the places 2^i to 2^(i + 1) - 1 in a document: the first, how many targets, and their mean surprise.

        A label that begins its document, which only crossing attention has, counts as one at place 1.
        """
        counts, sums = self._places
        return [(1 << i, int(n), total / n) for i, (n, total) in enumerate(zip(counts.tolist(), sums.tolist())) if n]

    def _add_places(self, number: int, sequence: CachedSequence, measures: PositionMeasures) -> None:
        documents, places = documents_of(sequence), places_of(sequence)
        doublings = np.frexp(np.maximum(places, 1))[1] - 1  # exact, unlike a logarithm
        size = self._places.shape[1]
        self._places += [np.bincount(doublings, weights, size) for weights in (None, measures.surprises)]
        if not self.worst_positions["surprises"].count:
            return
        for way in self.worst_positions:
            values = getattr(measures, way)
            self.worst_positions[way].add(values, number, sequence.target_positions + 1)
            counts, means = group_means(values, documents, len(sequence.document_lengths))
            enough = np.flatnonzero(counts >= FEWEST)
            self.worst_documents[way].add(means[enough], number, enough)
