"""Sparse targets of a language model, exact at every captured temperature.

Shape suffixes: N positions, K stored entries of a position, T captured temperatures.

The teacher's softened distribution is p_T = softmax(z / T) over the whole vocabulary. Stored are
the K largest logits of a position relative to its largest, d_i = z_i - max z, and for every
temperature one full-vocabulary scalar L_T = log sum_v exp(d_v / T). Then, exactly,

    log p_T(i) = d_i / T - L_T

Being relative to the maximum, a rounding of d_i by a factor 1 + e moves p_T(i) by at most
e / 2.718 at any T. The mass outside the stored ids is kept as a logarithm, summed where the
logits were: it is never a difference of rounded probabilities.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """A teacher's distributions at N positions. All arrays are in position order."""

    temperatures: tuple[float, ...]
    ids: np.ndarray
    """int32 [N, K], most probable first, unique in a row; ties by ascending id."""
    logits: np.ndarray
    """float32 [N, K]: logits relative to the row's largest, so 0 first and never above 0."""
    logsumexps: np.ndarray
    """float32 [N, T]: L_T of this module's docstring, over the full vocabulary."""
    tail_logprobs: np.ndarray
    """float32 [N, T]: log of the probability outside `ids`; -inf where `ids` is the whole vocabulary."""
    entropies: np.ndarray
    """float32 [N, T]: entropy of p_T over the full vocabulary, nats."""
    label_logits: np.ndarray
    """float32 [N]: logit of the token that follows in the text, relative to the row's largest."""
    draws: np.ndarray
    """int32 [N, D]: draws from p_T outside `ids`, each standing for tail mass / D; an id can come up again.

    -1 in a row that has no tail. D is 0 and T of no meaning unless the capture was asked for draws.
    """

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def top_k(self) -> int:
        """Stored entries of a position."""
        return self.ids.shape[1]

    def logprobs(self, temperature: float) -> np.ndarray:
        """float32 [N, K]: natural log of p_T over the full vocabulary, restricted to `ids`."""
        return self.logits / np.float32(temperature) - self._of(self.logsumexps, temperature)[:, None]

    def probs(self, temperature: float) -> np.ndarray:
        """float32 [N, K]: p_T over the full vocabulary, restricted to `ids`; a row sums to 1 - tail_mass."""
        return np.exp(self.logprobs(temperature))

    def tail_mass(self, temperature: float) -> np.ndarray:
        """float32 [N]: the probability that p_T gives to ids that are not stored."""
        return np.exp(self._of(self.tail_logprobs, temperature))

    def entropy(self, temperature: float) -> np.ndarray:
        """float32 [N]: entropy of p_T over the full vocabulary, nats."""
        return self._of(self.entropies, temperature)

    def label_logprobs(self, temperature: float) -> np.ndarray:
        """float32 [N]: log p_T of the token that follows in the text, stored or not."""
        return self.label_logits / np.float32(temperature) - self._of(self.logsumexps, temperature)

    def __getitem__(self, rows: slice) -> "SparseTargets":
        """The targets of some positions, without a copy."""
        return SparseTargets(temperatures=self.temperatures, **{name: getattr(self, name)[rows] for name in COLUMNS})

    def _of(self, values_NT: np.ndarray, temperature: float) -> np.ndarray:
        return values_NT[:, column_of(self.temperatures, temperature)]


COLUMNS = ("ids", "logits", "logsumexps", "tail_logprobs", "entropies", "label_logits", "draws")
"""The array fields of SparseTargets."""


def column_of(temperatures: tuple[float, ...], temperature: float) -> int:
    """Index of a captured temperature; raises ConfigError that lists the captured ones."""
    if float(temperature) not in temperatures:
        captured = ", ".join(f"{value:g}" for value in temperatures)
        raise ConfigError(f"temperature {temperature:g} was not captured; the cache is exact at: {captured}.")
    return temperatures.index(float(temperature))


def concatenate(parts: list[SparseTargets]) -> SparseTargets:
    """The targets of several pieces of a sequence, one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    return SparseTargets(temperatures=parts[0].temperatures, **columns)
