"""Caches with a tail sketch that a capture has written, and what they say of a teacher, written out in float64."""

from pathlib import Path

import numpy as np

from pipeline.formats.layout import CachedSequence
from pipeline.sketch import TailSketch
from stages.cache_logits.settings import CacheConfig
from tests.support.oracle import softmax

TOP_K, RANK = 8, 4


def sketch_settings(teacher: Path, corpus: Path, out: Path, **changes: object) -> CacheConfig:
    """Settings of a lossless capture with a sketch, in several shards."""
    values = {"top_k": TOP_K, "tail_rank": RANK, "sketch_tokens": 300, "shard_tokens": 500, "batch_tokens": 128}
    values |= {"engine": "transformers", "enforce_eager": True, "max_kl_error": 0.0}
    return CacheConfig(teacher=teacher, corpus=corpus, out=out, **values | changes)


def rebuilt(sketch: TailSketch, sequence: CachedSequence, temperature: float) -> np.ndarray:
    """float64 [N, V]: p-hat_T of a sequence's targets, row by row, from the formula."""
    targets = sequence.targets
    p_NV = np.zeros((len(targets), len(sketch.offset)))
    for row, coefficients in enumerate(targets.coefficients):
        logits = sketch.basis.astype(np.float64) @ coefficients + sketch.offset
        if sketch.softcap is not None:
            logits = sketch.softcap * np.tanh(logits / sketch.softcap)
        rest = np.setdiff1d(np.arange(p_NV.shape[1]), targets.ids[row])
        p_NV[row, rest] = targets.tail_mass(temperature)[row] * softmax(logits[None, rest], temperature)[0]
        p_NV[row, targets.ids[row]] = targets.probs(temperature)[row]
    return p_NV
