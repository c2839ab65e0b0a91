"""What a teacher said as numbers: by position, by document, and over many positions.

Everything is a sum or a count that can be added up piece by piece, so that a cache of any size is measured in
bounded memory. Sums are float64.

Shape suffixes: N positions, K entries, G groups (documents, sources), B bins.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.formats.layout import CachedSequence
from pipeline.targets import SparseTargets

MASSES = (0.5, 0.9, 0.95, 0.99)
"""Captured masses of which the entries that they need are counted."""


@dataclass(frozen=True)
class PositionMeasures:
    """Three numbers for each of N positions, at one temperature."""

    surprises: np.ndarray
    """float32 [N]: -log p_T of the token that follows, nats."""
    entropies: np.ndarray
    """float32 [N]: of p_T over the full vocabulary, nats."""
    tail_masses: np.ndarray
    """float32 [N]: p_T of everything that is not stored."""


def measured(targets: SparseTargets, temperature: float) -> PositionMeasures:
    """The numbers of every position."""
    return PositionMeasures(
        surprises=-targets.label_logprobs(temperature),
        entropies=targets.entropy(temperature),
        tail_masses=targets.tail_mass(temperature),
    )


def documents_of(sequence: CachedSequence) -> np.ndarray:
    """int64 [N]: the number, within its sequence, of the document that each target's label is in."""
    ends = np.cumsum(sequence.document_lengths)
    return np.searchsorted(ends, sequence.target_positions + 1, side="right")


def places_of(sequence: CachedSequence) -> np.ndarray:
    """int64 [N]: how many tokens of its document stand before each target's label: all that the teacher has seen."""
    starts = np.cumsum(sequence.document_lengths) - sequence.document_lengths
    return sequence.target_positions + 1 - starts[documents_of(sequence)]


def group_means(values_N: np.ndarray, groups_N: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [G] and float64 [G]: how many positions every group has, and the mean of their values; nan of none."""
    counts = np.bincount(groups_N, minlength=num_groups)
    sums = np.bincount(groups_N, weights=values_N, minlength=num_groups)
    with np.errstate(invalid="ignore"):
        return counts, sums / counts


class Histogram:
    """How many values lie in each bin; a value on an edge is in the bin above it, one outside in the bin beside it."""

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = np.asarray(edges, np.float64)
        self.counts = np.zeros(len(edges) - 1, np.int64)
        self._sum = 0.0

    def add(self, values_N: np.ndarray) -> None:
        """Count values."""
        bins = np.searchsorted(self.edges[1:-1], values_N, side="right")
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self._sum += float(values_N.sum(dtype=np.float64))

    @property
    def num_values(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Of the values themselves; nan of none."""
        return self._sum / self.num_values if self.num_values else float("nan")


class Coverage:
    """The mass that the most probable entries hold, and how many of them a mass takes."""

    def __init__(self, top_k: int) -> None:
        self._sums = np.zeros(top_k)
        self.num_values = 0
        self.needed = np.zeros((len(MASSES), top_k + 1), np.int64)
        """Positions that need 1, 2, ..., K entries for each of MASSES; last those that need more."""

    def add(self, probs_NK: np.ndarray) -> None:
        """Count positions by the probabilities of their entries, the largest first."""
        held_NK = np.cumsum(probs_NK.astype(np.float64), axis=1)  # converted on the way it takes twice as long
        self._sums += held_NK.sum(axis=0)
        self.num_values += len(probs_NK)
        ones_K = np.ones(probs_NK.shape[1], np.float32)
        for row, mass in zip(self.needed, MASSES):
            too_few_N = (held_NK < mass).astype(np.float32) @ ones_K  # exact, and half the time of a sum of truths
            row += np.bincount(too_few_N.astype(np.int64), minlength=len(row))

    @property
    def curve(self) -> np.ndarray:
        """float64 [K]: mean captured mass of the first entry, of the first two, and so on."""
        return self._sums / max(self.num_values, 1)

    def quantile(self, mass: float, share: float) -> int | None:
        """The entries with which that share of the positions has the mass; None if K are too few."""
        reached = np.cumsum(self.needed[MASSES.index(mass)])
        entries = int(np.searchsorted(reached, share * self.num_values)) + 1
        return entries if entries < self.needed.shape[1] else None


class Calibration:
    """How often the most probable entry is the token that follows, by its probability."""

    def __init__(self, num_bins: int) -> None:
        self.counts = np.zeros(num_bins, np.int64)
        self._probs, self._hits = np.zeros(num_bins), np.zeros(num_bins)

    def add(self, probs_N: np.ndarray, hits_N: np.ndarray) -> None:
        """Count positions by the probability of their most probable entry, and whether it follows."""
        size = len(self.counts)
        bins = np.minimum((probs_N * size).astype(np.int64), size - 1)
        self.counts += np.bincount(bins, minlength=size)
        self._probs += np.bincount(bins, weights=probs_N, minlength=size)
        self._hits += np.bincount(bins, weights=hits_N, minlength=size)

    @property
    def confidence(self) -> np.ndarray:
        """float64 [B]: mean probability of the most probable entry in every bin; nan in an empty one."""
        return self._mean(self._probs)

    @property
    def accuracy(self) -> np.ndarray:
        """float64 [B]: share of the positions of a bin where the most probable entry follows; nan in an empty one."""
        return self._mean(self._hits)

    @property
    def error(self) -> float:
        """The expected calibration error: |confidence - accuracy|, averaged over the positions; nan of none."""
        total = self.counts.sum()
        return float(np.abs(self._probs - self._hits).sum() / total) if total else float("nan")

    def _mean(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return sums / self.counts


class Largest:
    """The `count` largest (1 or more) of many values, with where each comes from; of equals those that came first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values = np.zeros(0)
        self.places = np.zeros((0, 2), np.int64)
        """Two numbers that say where a value is, such as a sequence and a position."""

    def add(self, values_N: np.ndarray, sequence: int, places_N: np.ndarray) -> None:
        """Take part with the values of one sequence."""
        if len(self.values) == self.count:  # most cannot be among them: nothing is sorted
            larger = values_N > self.values[-1]
            values_N, places_N = values_N[larger], places_N[larger]
        values = np.concatenate([self.values, values_N])
        places = np.concatenate([self.places, np.stack([np.full(len(values_N), sequence), places_N], axis=1)])
        order = np.argsort(-values, kind="stable")[: self.count]
        self.values, self.places = values[order], places[order]
