"""The grids that logits are rounded to: as coarse as a bound on the KL error allows, row by row.

Shape suffixes: N positions, K stored entries of a position, T captured temperatures.

A logit d <= 0 relative to its row's largest is rounded through its height

    f(d) = 1 - exp(b d) down to exp(b d) = 1 / (128 b), and from there on a straight line of slope -1 / 128

with b = 0.6 / T_min, T_min the smallest captured temperature: f lies on multiples of a step s, so that
d is fine near the top and coarse, 128 s at most, where little probability is. (For one temperature, even
steps in exp(d / 2T), the square root of a probability, add the least KL for the bits that they cost; 0.6
instead of 1/2 also keeps single probabilities close, and the line serves the other temperatures.) Every
row has the coarsest step of a ladder of half-halvings with which, measured and not estimated, its own
error is small; a row that is sure of its first token may take steps a hundred times those of a flat row.

Grid values are ordinary float32 numbers: whoever reads them needs nothing of this module.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

EXPONENT = 0.6
WARMEST = 1e4
"""Largest smallest temperature: there a grid takes 0.4 GB, and hardly tells logits apart."""
WIDEST = 128.0
"""Largest distance between two values of a level, in units of its step."""
DEEPEST = -60.0
"""Logits below this become this: exp(-30) of the largest probability at T=2."""
FINEST_LEVEL, COARSEST_STEP = 18, 1 / 64
"""Level l has the step COARSEST_STEP * 2 ** (-l / 2)."""
MAX_PROBABILITY_ERROR = 9e-4
"""Largest error of one stored probability at a captured temperature."""
EXPECTED = 1.6
"""Mean error of a row at the level that its estimate asks for is the bound times 1/EXPECTED or less."""
WORST_ROW = 8.0
"""Largest error of a single row, in units of the bound on the mean."""


@dataclass(frozen=True)
class Grid:
    """All levels of the grid for a set of temperatures."""

    temperatures: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """b of this module's docstring."""
        return EXPONENT / min(self.temperatures)

    @property
    def bend(self) -> float:
        """The logit below which f is a straight line."""
        return -float(np.log(WIDEST * self.exponent)) / self.exponent

    @cached_property
    def steps(self) -> np.ndarray:
        """float64 [levels]: the step of every level."""
        return COARSEST_STEP * 2.0 ** (-np.arange(FINEST_LEVEL + 1) / 2)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [levels]: values of every level."""
        highest = 1 - 1 / (WIDEST * self.exponent) + (self.bend - DEEPEST) / WIDEST
        return (highest / self.steps).astype(np.int64) + 1

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [levels]: where a level's values begin in `values`."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def values(self) -> np.ndarray:
        """float32: the logits of every level, each falling from 0, one level after the other."""
        heights = np.concatenate([np.arange(size) * step for step, size in zip(self.steps, self.sizes)])
        straight = 1 - 1 / (WIDEST * self.exponent)
        curved = np.log(np.maximum(1 - heights, 1 - straight)) / self.exponent
        return np.where(heights < straight, curved, self.bend - (heights - straight) * WIDEST).astype(np.float32)

    def places(self, logits_NK: np.ndarray, levels_N: np.ndarray) -> np.ndarray:
        """int32 [N, K]: which value of its row's level is nearest to each logit, as its height measures it."""
        # One of the two terms is 0 or constant; np.where would take longer than both.
        bend = np.float32(self.bend)
        heights = 1 - np.exp(np.maximum(logits_NK, bend) * np.float32(self.exponent))
        heights += (bend - np.minimum(logits_NK, bend)) * np.float32(1 / WIDEST)
        places = np.rint(heights * (1 / self.steps[levels_N]).astype(np.float32)[:, None])
        return np.minimum(places, (self.sizes[levels_N] - 1).astype(np.float32)[:, None]).astype(np.int32)

    def logits(self, places_NK: np.ndarray, levels_N: np.ndarray) -> np.ndarray:
        """float32 [N, K]: the grid values at the given places."""
        return self.values.take(places_NK + self.starts_of(levels_N)[:, None])

    def starts_of(self, levels_N: np.ndarray) -> np.ndarray:
        """int32 [N]: where the values of each row's level begin in `values`."""
        return self.starts.astype(np.int32).take(levels_N)

    def exact_places(self, logits_NK: np.ndarray, levels_N: np.ndarray) -> np.ndarray:
        """int32 [N, K]: the places of logits that are grid values; ValueError if one of them is not."""
        places = self.places(logits_NK, levels_N)
        if not np.array_equal(self.logits(places, levels_N), logits_NK):
            raise ValueError("logits that do not lie on the grid of their row's level")
        return places

    def estimated_levels(self, logits_NK: np.ndarray, probs_TNK: np.ndarray, max_kl_error: float) -> np.ndarray:
        """int64 [N]: the coarsest levels at which the row's error should be within the bound.

        A value that is off by up to half its width w, anywhere with equal chance, adds p w^2 / 24 T^2.
        """
        deepest = np.maximum(logits_NK[:, 1:], np.float32(self.bend))
        width = np.exp(deepest * np.float32(-self.exponent)) / np.float32(self.exponent)  # at a step of 1
        step = np.full(len(logits_NK), COARSEST_STEP)
        for temperature, probs in zip(self.temperatures, probs_TNK):
            weighted = probs[:, 1:] * width
            spread = np.einsum("nk,nk->n", weighted, width) / (24 * temperature**2)
            largest = weighted.max(axis=1, initial=0) / (2 * temperature)
            with np.errstate(divide="ignore", over="ignore"):  # rows without error may take any step
                step = np.minimum(step, np.sqrt(EXPECTED * max_kl_error / spread))
                step = np.minimum(step, 0.7 * MAX_PROBABILITY_ERROR / largest)
        levels = np.ceil(2 * np.log2(COARSEST_STEP / step))
        return np.clip(levels, 0, FINEST_LEVEL).astype(np.int64)


@lru_cache
def grid_of(temperatures: tuple[float, ...]) -> Grid:
    """The grid of a cache."""
    return Grid(temperatures)


TAIL_STEPS = 2048
"""Steps of the angle phi between a tail mass of 0 and one of 1: tail mass = sin(phi) ** 2."""


@lru_cache
def tail_values() -> np.ndarray:
    """float32 [TAIL_STEPS]: log of the tail mass at every step; -inf first. That the tail is all does not come up."""
    with np.errstate(divide="ignore"):
        return (2 * np.log(np.sin(np.arange(TAIL_STEPS) * (np.pi / 2 / TAIL_STEPS)))).astype(np.float32)


def tail_places(tail_logprobs: np.ndarray) -> np.ndarray:
    """uint16: the nearest step but the last; a tail that exists is never rounded to none."""
    mass = np.exp(tail_logprobs, dtype=np.float64)
    places = np.rint(np.arcsin(np.sqrt(np.minimum(mass, 1.0))) * (TAIL_STEPS * 2 / np.pi))
    return np.clip(places, tail_logprobs > -np.inf, TAIL_STEPS - 1).astype(np.uint16)
