"""Targets at temperatures that were not captured: approximate, by what the tail sketch says of the tail's shape.

Of the log of the sum that p_T is divided by, L_T = log(sum exp(d / T) over the stored ids + exp(M_T)), the tail's part
M_T is known at captured temperatures alone. The sketch's logits s are those of the tail up to a constant a of the row:

    M_T = log sum exp((s + a) / T)  over the ids that are not stored

so that every captured T, at which M_T is exact, says what a is there. Were the sketch exact, all would say the same;
they nearly do. Between two captured temperatures a is taken from the line in 1 / T through both, so that the result
moves smoothly to what is exact at both ends; outside of them it is that of the nearest one.

Shapes: N positions, V vocabulary, R coefficients, K stored entries, T captured temperatures.
"""

from dataclasses import replace

import numpy as np

from pipeline.errors import ConfigError
from pipeline.sketch import TailSketch
from pipeline.targets import SparseTargets

CHUNK_BYTES = 32 << 20
"""Of the float32 logits that exist at a time."""


def approximated(targets: SparseTargets, sketch: TailSketch | None, temperature: float) -> SparseTargets:
    """The same targets with one temperature more, at which they are approximate.

    The stored ids' odds, p_T(i) / p_T(j), are exact at any T; approximate are the tail's mass, by which they are
    scaled, and the entropy. A captured temperature changes nothing. Raises ConfigError for targets without
    coefficients, and for one that is no temperature.
    """
    if float(temperature) in targets.temperatures:
        return targets
    if not 0 < temperature < np.inf:
        raise ConfigError(f"temperature is {temperature}; it must be a positive number.")
    if sketch is None or targets.coefficients.shape[1] != sketch.rank:
        raise ConfigError(
            f"temperature {temperature:g} was not captured, and targets of {targets.coefficients.shape[1]} "
            f"coefficients cannot be approximated by {'no sketch' if sketch is None else f'a sketch of {sketch.rank}'}."
        )
    shares_2T = shares_of_captured(targets.temperatures, temperature)
    columns_3N = np.empty((3, len(targets)), np.float32)
    rows = max(1, CHUNK_BYTES // (4 * len(sketch.offset)))
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        columns_3N[:, chunk] = _columns(targets[chunk], sketch, temperature, shares_2T)
    names = ("logsumexps", "tail_logprobs", "entropies")
    columns = {name: np.hstack([getattr(targets, name), new[:, None]]) for name, new in zip(names, columns_3N)}
    return replace(targets, temperatures=(*targets.temperatures, float(temperature)), **columns)


def shares_of_captured(temperatures: tuple[float, ...], temperature: float) -> np.ndarray:
    """float64 [2, T]: shares of what captured temperatures say in a row's constant, and how they change with 1 / T."""
    inverse_T = 1 / np.array(temperatures)
    order = np.argsort(inverse_T)
    step = 1e-4 / temperature
    near_3 = np.array([1 / temperature, 1 / temperature - step, 1 / temperature + step])
    near_T3 = np.array([np.interp(near_3, inverse_T[order], one) for one in np.eye(len(order))[:, order]])
    return np.stack([near_T3[:, 0], (near_T3[:, 2] - near_T3[:, 1]) / (2 * step)])


def _columns(targets: SparseTargets, sketch: TailSketch, temperature: float, shares_2T: np.ndarray) -> np.ndarray:
    """float64 [3, N]: L_T, log of the tail's mass, entropy."""
    sketched_NV = sketch.logits(targets.coefficients)
    np.put_along_axis(sketched_NV, targets.ids.astype(np.int64), -np.inf, axis=1)
    constant_N, slope_N = np.zeros((2, len(targets)))
    for index in np.flatnonzero(shares_2T.any(0)):
        exact_N = targets.tail_logprobs[:, index].astype(np.float64) + targets.logsumexps[:, index]
        sum_N, _ = _tail(sketched_NV, targets.temperatures[index])
        with np.errstate(invalid="ignore"):
            said_N = targets.temperatures[index] * (exact_N - sum_N)  # nan or -inf: there is no tail
        constant_N += shares_2T[0, index] * said_N
        slope_N += shares_2T[1, index] * said_N
    sum_N, mean_N = _tail(sketched_NV, temperature)
    tail_N = np.where(np.isfinite(constant_N), sum_N + constant_N / temperature, -np.inf)
    scaled_NK = targets.logits.astype(np.float64) / temperature
    whole_N = np.logaddexp(np.logaddexp.reduce(scaled_NK, axis=1), tail_N)
    probs_NK, mass_N = np.exp(scaled_NK - whole_N[:, None]), np.exp(tail_N - whole_N)
    of_entries_N = (probs_NK * np.where(probs_NK > 0, scaled_NK, 0.0)).sum(1)
    logit_N = mean_N + constant_N + slope_N / temperature  # the tail's mean: what M_T changes by with 1 / T
    of_tail_N = np.where(mass_N > 0, mass_N * logit_N / temperature, 0.0)
    return np.stack([whole_N, tail_N - whole_N, whole_N - of_entries_N - of_tail_N])


def _tail(sketched_NV: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N]: log sum exp(s / T), -inf of a row without a tail; and the mean of s by softmax(s / T)."""
    largest_N = sketched_NV.max(axis=1)
    is_there = largest_N > -np.inf
    relative_NV = sketched_NV - np.where(is_there, largest_N, 0.0)[:, None]
    powers_NV = np.exp(relative_NV / np.float32(temperature))
    sum_N = powers_NV.sum(axis=1, dtype=np.float64)
    apart_N = np.einsum("nv,nv->n", powers_NV, np.maximum(relative_NV, np.float32(-1e30)), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return largest_N / temperature + np.log(sum_N), np.where(is_there, largest_N + apart_N / sum_N, 0.0)
