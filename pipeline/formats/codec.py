"""How the floating-point columns are rounded before they are stored.

The user states a bound on the KL error; the precision follows from it. What is stored are ordinary
float32 values, which every reader understands; that most of them are equal is what makes them small.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.errors import CacheError
from pipeline.formats.grid import (
    FINEST_LEVEL,
    MAX_PROBABILITY_ERROR,
    WORST_ROW,
    Grid,
    grid_of,
    tail_places,
    tail_values,
)
from pipeline.targets import SparseTargets, logsumexps_of, reconstruction_errors

LOSSLESS = 0.0
"""The bound that stands for no rounding at all."""
ENTROPY_STEP = 1 / 64
"""Nats."""
LABEL_STEP, DEEPEST_LABEL = 1 / 1024, 65_535
"""Step of the logits of labels that are not among the stored ids, and how many of them the deepest one takes."""


def is_lossless(max_kl_error: float) -> bool:
    """Whether a cache with this bound keeps every float32 as it was captured."""
    return max_kl_error == LOSSLESS


def round_targets(
    targets: SparseTargets, labels_N: np.ndarray, max_kl_error: float, sequences: Sequence[slice] = (slice(None),)
) -> tuple[SparseTargets, np.ndarray]:
    """The targets that are stored and, uint8 [N], the level of the grid that each row's logits lie on.

    The mean KL error of the rows of each of the sequences, which follow each other, is at most `max_kl_error` at every
    captured temperature, no stored probability is off by more than MAX_PROBABILITY_ERROR, and the tail mass by no more
    than half of that. Entries that become equal are put in order of their ids; places without entry stay such. What
    becomes of a sequence does not depend on those beside it.
    """
    if is_lossless(max_kl_error) or targets.ids.size == 0:
        return targets, np.zeros(len(targets), np.uint8)
    tails = tail_values()[tail_places(targets.tail_logprobs)]
    entropies = np.rint(np.abs(targets.entropies) * np.float32(1 / ENTROPY_STEP)) * np.float32(ENTROPY_STEP)
    label_steps = np.minimum(np.rint(np.abs(targets.label_logits) * np.float32(1 / LABEL_STEP)), DEEPEST_LABEL)
    labels = label_steps * np.float32(-LABEL_STEP)  # so that 0 is -0.0, as what is read back
    rounded = replace(targets, tail_logprobs=tails, entropies=entropies, label_logits=labels)
    rounded, levels = _on_grid(targets, rounded, max_kl_error, sequences)
    rounded = order_ties(rounded)
    return with_labels(rounded, labels_N), levels


def with_labels(rounded: SparseTargets, labels_N: np.ndarray) -> SparseTargets:
    """The targets with the logit of every label that is among the stored ids taken from there."""
    is_label = rounded.ids == labels_N[:, None]
    stored = np.take_along_axis(rounded.logits, is_label.argmax(axis=1)[:, None], axis=1)[:, 0]
    return replace(rounded, label_logits=np.where(is_label.any(axis=1), stored, rounded.label_logits))


def order_ties(targets: SparseTargets) -> SparseTargets:
    """The targets with the ids of equal logits in rising order, as they were before the logits were rounded."""
    inside = np.zeros(targets.logits.shape, bool)
    np.equal(targets.logits[:, 1:], targets.logits[:, :-1], out=inside[:, 1:])
    ids = rising_in_runs(targets.ids, run_numbers(inside))
    return replace(targets, ids=np.where(targets.logits > -np.inf, ids, ids[:, :1]) if targets.is_ragged else ids)


def run_numbers(inside_NK: np.ndarray) -> np.ndarray:
    """int32 [N, K]: the number of every entry's run in its row; `inside_NK` says which entries go on a run."""
    return np.cumsum(~inside_NK, axis=1, dtype=np.int32)


def rising_in_runs(values_NK: np.ndarray, runs_NK: np.ndarray) -> np.ndarray:
    """int32 values from 0, sorted inside each run of a row; `runs_NK` are numbers that rise from run to run.

    Both may be flat, and a run then end with its row.
    """
    bits = int(values_NK.max(initial=0)).bit_length()
    narrow = bits + int(runs_NK.max(initial=0)).bit_length() < 32
    keys: np.ndarray[Any, np.dtype[np.signedinteger]] = runs_NK.astype(np.int32 if narrow else np.int64)
    keys <<= bits
    keys |= values_NK
    keys.sort(axis=-1)
    keys &= (1 << bits) - 1
    return keys.astype(np.int32, copy=False)


def _on_grid(
    exact: SparseTargets, rounded: SparseTargets, max_kl_error: float, sequences: Sequence[slice]
) -> tuple[SparseTargets, np.ndarray]:
    """Logits on the coarsest levels that hold the bound, measured; finer where the estimate was not enough."""
    grid = grid_of(exact.temperatures)
    probs = np.stack([exact.probs(temperature) for temperature in exact.temperatures])
    levels = grid.estimated_levels(exact.logits, probs, max_kl_error)
    kl, rounded = _measured(grid, exact, rounded, levels, max_kl_error)
    for rows in sequences:
        if (kl[rows].mean(axis=0) > max_kl_error).any():
            finer, levels[rows] = _finer(grid, exact[rows], rounded[rows], levels[rows], kl[rows], max_kl_error)
            rounded.logits[rows], rounded.logsumexps[rows] = finer.logits, finer.logsumexps
    return rounded, levels.astype(np.uint8)


def _finer(
    grid: Grid,
    exact: SparseTargets,
    rounded: SparseTargets,
    levels: np.ndarray,
    kl: np.ndarray,
    max_kl_error: float,
) -> tuple[SparseTargets, np.ndarray]:
    """The rounded targets of a sequence and their levels, made finer until the mean of their errors holds the bound."""
    while (kl.mean(axis=0) > max_kl_error).any():
        worse = kl.max(axis=1) > max_kl_error / 2
        if (levels[worse] == FINEST_LEVEL).all():
            raise CacheError(f"max_kl_error is {max_kl_error:g}: finer than the grid can hold here; use lossless.")
        levels = np.minimum(levels + worse, FINEST_LEVEL)
        kl, rounded = _measured(grid, exact, rounded, levels, max_kl_error)
    return rounded, levels


def _measured(
    grid: Grid, exact: SparseTargets, rounded: SparseTargets, levels: np.ndarray, max_kl_error: float
) -> tuple[np.ndarray, SparseTargets]:
    """The rows' errors [N, T] and the rounded targets; moves single rows of `levels` that are far off to finer ones."""
    rows = np.arange(len(exact))
    kl = np.zeros((len(exact), len(exact.temperatures)), np.float32)
    logits, logsumexps = np.empty_like(exact.logits), np.empty_like(exact.logsumexps)
    while len(rows):
        part = exact.take(rows)
        logits[rows] = grid.logits(grid.places(part.logits, levels[rows]), levels[rows])
        if part.is_ragged:
            logits[rows] = np.where(part.logits > -np.inf, logits[rows], part.logits)
        logsumexps[rows] = logsumexps_of(logits[rows], rounded.tail_logprobs[rows], exact.temperatures)
        rounded = replace(rounded, logits=logits, logsumexps=logsumexps)
        kl[rows], largest = reconstruction_errors(part, rounded.take(rows))
        bad = (kl[rows].max(axis=1) > WORST_ROW * max_kl_error) | (largest.max(axis=1) > MAX_PROBABILITY_ERROR)
        rows = rows[bad & (levels[rows] < FINEST_LEVEL)]
        levels[rows] += 1
    return kl, rounded
