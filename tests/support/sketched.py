"""Caches that answer as if a capture had sketched their tails: random sketches, which the tests' oracles then know."""

import hashlib

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.formats.layout import CachedSequence
from pipeline.sketch import TailSketch

RANK = 3


def sketch_of(cache: Cache, softcap: float | None = 4.0) -> TailSketch:
    """The same one of the same vocabulary."""
    random, size = np.random.default_rng(5), cache.manifest.vocab_size
    return TailSketch(*(random.normal(size=shape).astype(np.float32) for shape in (size, (size, RANK))), softcap)


def coefficients_of(sequence: CachedSequence) -> np.ndarray:
    """float32 [N, R], by the sequence's content."""
    seed = int.from_bytes(hashlib.sha256(sequence.key).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=(len(sequence.targets), RANK)).astype(np.float32)


def sketch_caches(monkeypatch) -> None:
    """Every cache has a sketch from here on, and every sequence coefficients."""
    read = Cache.__getitem__

    def with_coefficients(self: Cache, index: int) -> CachedSequence:
        sequence = read(self, index)
        object.__setattr__(sequence.targets, "coefficients", coefficients_of(sequence))
        return sequence

    monkeypatch.setattr(Cache, "__getitem__", with_coefficients)
    monkeypatch.setattr(Cache, "sketch", property(sketch_of), raising=False)
