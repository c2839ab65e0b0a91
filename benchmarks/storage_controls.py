"""The same targets under other ids: what a tokenizer's order, the text's context and an id's frequency are worth.

The logits stay, and with them what the rounding and the runs of equal logits are; each control takes away one thing
that a code of the ids could make use of.
"""

from dataclasses import replace

import numpy as np

from benchmarks.storage_teacher import VOCAB_SIZE
from pipeline.targets import SparseTargets

BLOCK_ROWS = 4096
DRAWS = 6
"""How many ids are drawn for each that is kept: the same one comes up again."""


def permuted(tokens: np.ndarray, targets: SparseTargets) -> tuple[np.ndarray, SparseTargets]:
    """All ids renamed at random: without the order of a tokenizer's ids."""
    names = np.random.default_rng(1).permutation(VOCAB_SIZE).astype(np.int32)
    return names[tokens], replace(targets, ids=names[targets.ids])


def without_context(tokens: np.ndarray, targets: SparseTargets) -> tuple[np.ndarray, SparseTargets]:
    """Every position's ids drawn by how often the teacher names them: neither text nor the other ids tell of one."""
    return tokens, replace(targets, ids=_drawn(targets.ids.shape, np.bincount(targets.ids.ravel())))


def uniform(tokens: np.ndarray, targets: SparseTargets) -> tuple[np.ndarray, SparseTargets]:
    """Every position's ids drawn from the vocabulary, all alike: no teacher's ids can take more."""
    return tokens, replace(targets, ids=_drawn(targets.ids.shape, np.ones(VOCAB_SIZE, np.int64)))


def _drawn(shape: tuple[int, int], weights: np.ndarray) -> np.ndarray:
    """int32: rows of distinct ids, one after the other with the chances that are left."""
    random, ends = np.random.default_rng(2), np.cumsum(weights)
    ids = np.empty(shape, np.int32)
    for start in range(0, len(ids), BLOCK_ROWS):
        rows = ids[start : start + BLOCK_ROWS]
        draws = np.searchsorted(ends, random.integers(ends[-1], size=(len(rows), DRAWS * shape[1])), side="right")
        order = np.argsort(draws, axis=1, kind="stable")
        ordered = np.take_along_axis(draws, order, axis=1)
        is_new = np.ones(draws.shape, bool)
        np.put_along_axis(is_new, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
        is_kept = is_new & (np.cumsum(is_new, axis=1) <= shape[1])
        rows[:] = draws[is_kept].reshape(rows.shape)
    return ids


CONTROLS = {"ids permuted": permuted, "ids by frequency alone": without_context, "ids uniform": uniform}
