"""The caches and views of a training, opened, held against the settings and each other, and what is taken from each."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pipeline.cache.reader import Cache, open_cache
from stages.train_student.checks import (
    require_measurable,
    require_room,
    require_same_ids,
    require_same_vocabulary,
    require_sketch,
    require_targets,
)
from stages.train_student.dataset import CacheDataset, MixedDataset
from stages.train_student.sampler import MixedSampler, Mixture, StepShape, StreamSampler
from stages.train_student.settings import TrainConfig
from stages.train_student.sketch import SketchHead
from stages.train_student.sources import shares_of, sources_of
from stages.train_student.student import Student, read_student


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a student is trained on, and measured on."""

    names: Sequence[str]
    caches: Sequence[Cache]
    shares: Sequence[Fraction]
    """Of the stream; 1 in all."""
    sketch: SketchHead | None
    """That the tail needs, of all caches; None where it needs none."""
    held_out: dict[str, Cache]
    """By their names."""

    @classmethod
    def open(cls, config: TrainConfig) -> "Sources":
        """Raises PipelineError, with the cache that it is about, for what does not fit the settings or the others."""
        sources = sources_of(config.cache)
        caches = [open_cache(source.place) for source in sources]
        for cache in caches:
            require_targets(config, cache.place, cache.manifest)
        held_out = {source.name: open_cache(source.place) for source in sources_of(config.eval_cache)}
        for cache in [*caches[1:], *held_out.values()]:
            require_same_ids(cache.place, cache.manifest, caches[0].place, caches[0].manifest)
        for cache in caches[1:]:
            require_same_vocabulary(cache.place, cache.manifest, caches[0].place, caches[0].manifest)
        for cache in held_out.values():
            require_measurable(config, cache.place, cache.manifest)
        return cls(
            names=[source.name for source in sources],
            caches=caches,
            shares=shares_of(sources, [len(cache) for cache in caches]),
            sketch=require_sketch(config, caches),
            held_out=held_out,
        )

    def read_student(self, config: TrainConfig) -> Student:
        """The student, for which every id of every cache means what it means there."""
        found = [read_student(config.student, each, trust_remote_code=config.trust_remote_code) for each in self.caches]
        for cache in self.held_out.values():
            require_room(config, cache.place, found[0].model.context_length, cache.manifest)
        notes = tuple(dict.fromkeys(note for student in found for note in student.notes))
        return dataclasses.replace(found[0], vocab_size=min(student.vocab_size for student in found), notes=notes)

    def __len__(self) -> int:
        """Sequences of all caches."""
        return sum(map(len, self.caches))

    def dataset(self, vocab_size: int, approximate: float | None = None) -> CacheDataset | MixedDataset:
        """Their sequences, those of the second cache behind those of the first; `approximate` is CacheDataset's."""
        parts = [CacheDataset(cache, vocab_size, approximate) for cache in self.caches]
        return parts[0] if len(parts) == 1 else MixedDataset(parts)

    def sampler(self, seed: int, shape: StepShape, steps: int) -> StreamSampler:
        """The order in which they are taken."""
        sizes = [len(cache) for cache in self.caches]
        if len(sizes) == 1:
            return StreamSampler(sizes[0], seed, shape, steps)
        return MixedSampler(sizes, self.shares, seed, shape, steps)

    def taken(self, num_sequences: int) -> dict[str, float | None]:
        """Metrics of a stream of so many sequences: about how many tokens, and of a mixture the passes over each."""
        counts = [num_sequences] if len(self.caches) == 1 else Mixture(self.shares).counts(num_sequences)
        tokens = sum(count * each.manifest.num_tokens / len(each) for count, each in zip(counts, self.caches))
        found: dict[str, float | None] = {"tokens_seen": int(tokens)}
        if len(self.caches) > 1:
            for name, cache, count in zip(self.names, self.caches, counts):
                found |= {f"sequences/{name}": count, f"epochs/{name}": count / len(cache)}
        return found

    def described(self) -> str:
        """The shares of a mixture, for a line."""
        if len(self.caches) == 1:
            return ""
        return ": " + ", ".join(f"{name} {float(share):.1%}" for name, share in zip(self.names, self.shares))

    def teacher_cross_entropy(self) -> dict[str, float | None]:
        """Mean negative log-probability that the teacher gives to the labels of the held-out caches.

        None if T = 1 was not captured; of several caches each alone as well.
        """
        sums = {name: _label_sum(cache) for name, cache in self.held_out.items()}
        counts = {name: cache.manifest.num_targets for name, cache in self.held_out.items()}
        known = [value for value in sums.values() if value is not None]
        whole = sum(known) / sum(counts.values()) if len(known) == len(sums) else None
        found = {"eval_teacher_cross_entropy": whole}
        if len(sums) > 1:
            for name, value in sums.items():
                found[f"eval_teacher_cross_entropy/{name}"] = None if value is None else value / counts[name]
        return found


def _label_sum(cache: Cache) -> float | None:
    if 1.0 not in cache.manifest.temperatures:
        return None
    return sum(float(-sequence.targets.label_logprobs(1.0).sum(dtype=np.float64)) for sequence in cache)
