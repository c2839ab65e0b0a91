"""What a commit record says of the targets of its shard."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.commits import ShardCommit
from pipeline.cache.sequence import StoredSequence
from pipeline.formats.layout import OF_TARGETS, ShardLayout, slices_of, targets_of
from pipeline.targets import SparseTargets, concatenate, reconstruction_errors


@dataclass(frozen=True)
class SequenceStatistics:
    """What one sequence adds to the statistics of its shard."""

    num_targets: int
    num_entries: int
    sums: np.ndarray
    """float64 [3, temperatures]: of entropies, tail masses and log-probabilities of labels."""
    source: ShardCommit | None
    """The shard that it is copied from: what it has lost, it had lost before."""
    kl: np.ndarray
    """float64 [temperatures]: the sum of what its stored form has lost; 0 for a copy."""
    largest: np.ndarray
    """float32 [temperatures]: the largest error of a probability; 0 for a copy."""
    sketched: np.ndarray
    """float64 [2, temperatures]: the sum of the errors of the tail sketch, and of how many targets."""


def measured(sequences: Sequence[StoredSequence], layout: ShardLayout) -> list[SequenceStatistics]:
    """The targets of every sequence summed, and held against their stored form: all together, which takes less time."""
    fresh = [sequence for sequence in sequences if sequence.source is None]
    errors = iter(_errors(fresh, layout) if fresh else ())
    nothing = np.zeros(len(layout.spec.temperatures))
    found = []
    for sequence in sequences:
        kl, largest = next(errors) if sequence.source is None else (nothing, nothing)
        found.append(
            SequenceStatistics(
                num_targets=len(sequence.targets),
                num_entries=len(sequence.columns.get("ids", ())),
                sums=_sums(sequence.targets, layout.spec.temperatures),
                source=sequence.source,
                kl=kl,
                largest=largest,
                sketched=_sketch_errors(sequence, layout),
            )
        )
    return found


def _sums(targets: SparseTargets, temperatures: tuple[float, ...]) -> np.ndarray:
    sums = np.zeros((3, len(temperatures)))
    for index, temperature in enumerate(temperatures):
        values = (targets.entropy(temperature), targets.tail_mass(temperature), targets.label_logprobs(temperature))
        sums[:, index] = [value.sum(dtype=np.float64) for value in values]
    return sums


def _sketch_errors(sequence: StoredSequence, layout: ShardLayout) -> np.ndarray:
    """What was measured of a capture; of a copy, its shard's mean for as many targets as it has."""
    count = len(layout.spec.temperatures)
    if layout.spec.tail_rank == 0:
        return np.zeros((2, count))
    if sequence.source is not None:
        mean = np.array(sequence.source.statistics.get(SKETCH_KL, np.nan), np.float64)
        known = mean.shape == (count,) and bool(np.isfinite(mean).all())
        return np.stack([mean, np.ones(count)]) * len(sequence.targets) if known else np.zeros((2, count))
    errors_NT = sequence.targets.sketch_errors
    return np.stack([np.nansum(errors_NT, axis=0, dtype=np.float64), np.isfinite(errors_NT).sum(axis=0)])


def _errors(sequences: Sequence[StoredSequence], layout: ShardLayout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sum of the KL errors and the largest error of a probability, of every sequence at every temperature."""
    names = [name for name in OF_TARGETS if name in layout.columns()]
    columns = {name: np.concatenate([sequence.columns[name] for sequence in sequences]) for name in names}
    exact = concatenate([sequence.targets for sequence in sequences])
    kl, largest = reconstruction_errors(exact, targets_of(columns, layout))
    for rows in slices_of([len(sequence.targets) for sequence in sequences]):
        yield kl[rows].sum(axis=0, dtype=np.float64), largest[rows].max(axis=0, initial=0)


SKETCH_KL = "mean_sketch_kl"
"""Name of the mean KL(p_T || what the tail sketch makes of it) in a commit record, nats a temperature."""


class TargetStatistics:
    """Sums over the targets of a shard, and what rounding has cost, for its commit record."""

    def __init__(self, layout: ShardLayout) -> None:
        self._started = time.time()
        self._layout = layout
        self._sums = np.zeros((3, len(layout.spec.temperatures)))
        self._kl = np.zeros(len(layout.spec.temperatures))
        self._num_entries = 0
        self._largest = np.zeros(len(layout.spec.temperatures))
        self._sketched = np.zeros((2, len(layout.spec.temperatures)))
        self._copied: dict[str, int] = defaultdict(int)
        self._sources: dict[str, ShardCommit] = {}

    def add(self, sequence: SequenceStatistics) -> None:
        """Count one sequence; the sums depend on the order, in their last bits."""
        self._sums += sequence.sums
        self._num_entries += sequence.num_entries
        self._kl += sequence.kl
        self._sketched += sequence.sketched
        self._largest = np.maximum(self._largest, sequence.largest)
        if (source := sequence.source) is not None:
            self._copied[source.xxh3_128] += sequence.num_targets
            self._sources[source.xxh3_128] = source

    def to_dict(self) -> dict[str, Any]:
        """JSON values: sums and means a temperature, seconds from the first sequence to the last.

        Of copied sequences the errors are bounds: the exact targets are not there to measure them by. Raises
        RuntimeError if the stored targets break the cache's promise.
        """
        bound, total = self._layout.spec.max_kl_error, self._kl.copy()
        for checksum, num_targets in self._copied.items():
            recorded, of_targets = self._sources[checksum].statistics, self._sources[checksum].num_targets
            mean, largest = (self._recorded(recorded, name) for name in ("mean_kl_error", "max_probability_error"))
            # No sequence is above the bound, and no part of a shard has lost more than the whole.
            total += np.minimum(bound * num_targets, mean * of_targets)
            self._largest = np.maximum(self._largest, largest)
        kl = total / max(1, self._layout.counts.num_targets)
        if (kl > bound * 1.001 + 1e-9).any():
            raise RuntimeError(f"rounding cost {kl.tolist()} nats; the bound is {bound}: a bug of the codec")
        names = ("sum_entropy", "sum_tail_mass", "sum_label_logprob")
        errors, counts = self._sketched
        said = dict(zip(names, self._sums.tolist())) | {
            "mean_kl_error": kl.tolist(),
            "max_probability_error": self._largest.tolist(),
            "seconds": round(time.time() - self._started, 3),
        }
        said |= {"num_entries": self._num_entries} if self._layout.spec.is_ragged else {}
        return said | ({SKETCH_KL: (errors / counts).tolist()} if counts.all() else {})

    def _recorded(self, statistics: dict[str, Any], name: str) -> np.ndarray:
        """float64 [temperatures]: errors as a record has them; of none, or of what cannot be, 1, which bounds both."""
        values = np.array(statistics.get(name, 1.0), np.float64)
        sound = values.shape == self._largest.shape and np.isfinite(values).all() and (values >= 0).all()
        return values if sound else np.ones_like(self._largest)
