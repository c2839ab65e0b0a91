"""Sparse targets of a language model, exact at every captured temperature.

Shape suffixes: N positions, K stored entries of a position, T captured temperatures.

The teacher's softened distribution is p_T = softmax(z / T) over the whole vocabulary. Stored are
the K largest logits of a position relative to its largest, d_i = z_i - max z, and for every
temperature one full-vocabulary scalar L_T = log sum_v exp(d_v / T). Then, exactly,

    log p_T(i) = d_i / T - L_T

Being relative to the maximum, a rounding of d_i by a factor 1 + e moves p_T(i) by at most
e / 2.718 at any T. The mass outside the stored ids is kept as a logarithm, summed where the
logits were: it is never a difference of rounded probabilities.

A row may have fewer entries than K, where as many are kept as reach a mass: in memory its other places repeat its
first id with the logit -inf, which is probability 0.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What is kept of a teacher's distribution at a position, and how exactly."""

    top_k: int
    """Largest probabilities that are kept."""
    temperatures: tuple[float, ...]
    """Temperatures T at which targets are exact."""
    tail_samples: int = 0
    """Draws from the tail of each position."""
    draw_temperature: float | None = None
    """Temperature of the draws; None without draws."""
    tail_rank: int = 0
    """Coefficients of the tail sketch (pipeline.sketch) of each position."""
    max_kl_error: float = 0.0
    """Bound on the mean KL error of rounding, nats; 0 is lossless."""
    top_p: float | None = None
    """Mass that the entries of a position reach, with as few of the top k as that takes; None keeps all of them."""
    top_p_temperature: float | None = None
    """Temperature at which the mass counts; None without `top_p`."""
    min_k: int | None = None
    """Entries that a position has at least; None without `top_p`."""

    @property
    def is_ragged(self) -> bool:
        """Whether positions have different numbers of entries."""
        return self.top_p is not None


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """A teacher's distributions at N positions. All arrays are in position order."""

    temperatures: tuple[float, ...]
    ids: np.ndarray
    """int32 [N, K], most probable first, unique in a row; ties by ascending id. Without an entry, the first again."""
    logits: np.ndarray
    """float32 [N, K]: logits relative to the row's largest, so 0 first and never above 0. Without an entry, -inf."""
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
    coefficients: np.ndarray
    """int16 [N, R]: of the cache's tail sketch; R is 0 without one."""
    sketch_errors: np.ndarray
    """float32 [N, T]: KL(p_T || what the sketch makes of it), nats, of the positions at which a capture has measured it
    and nan at the others. Not stored: T is 0 of what is read back."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def top_k(self) -> int:
        """Stored entries of a position, at most."""
        return self.ids.shape[1]

    @property
    def counts(self) -> np.ndarray:
        """int32 [N]: stored entries of every position."""
        return np.count_nonzero(self.logits > -np.inf, axis=1).astype(np.int32)

    @property
    def is_ragged(self) -> bool:
        """Whether a position has fewer than K entries."""
        return bool((self.logits[:, -1:] == -np.inf).any())

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
        return self.take(rows)

    def take(self, rows: slice | np.ndarray) -> "SparseTargets":
        """The targets of positions that are named by a slice or by their indices."""
        return SparseTargets(temperatures=self.temperatures, **{name: getattr(self, name)[rows] for name in COLUMNS})

    def _of(self, values_NT: np.ndarray, temperature: float) -> np.ndarray:
        return values_NT[:, column_of(self.temperatures, temperature)]


COLUMNS = (
    "ids",
    "logits",
    "logsumexps",
    "tail_logprobs",
    "entropies",
    "label_logits",
    "draws",
    "coefficients",
    "sketch_errors",
)
"""The array fields of SparseTargets."""


SIGNED = ("coefficients", "sketch_errors")
"""Those of which any value is one that can be."""


def improper(targets: SparseTargets) -> str:
    """What no distribution has, and at which target; empty if every value is a number that one can have.

    Only the logarithm of an empty tail may be -inf.
    """
    for name in COLUMNS:
        values = getattr(targets, name)
        if name in SIGNED:
            continue
        if values.dtype.kind != "f":
            bad = values < (-1 if name == "draws" else 0)
        else:
            bad = ~np.isfinite(values) & (np.isnan(values) | (values > 0) | (name != "tail_logprobs"))
        if bad.any():
            row = int(np.argmax(bad.reshape(len(values), -1).any(axis=1)))
            return f"{name} of target {row} is {np.atleast_1d(values[row])[np.atleast_1d(bad[row])][0]}"
    return ""


def unsketched(num_targets: int) -> dict[str, np.ndarray]:
    """The fields of the tail sketch of targets that have none."""
    return {
        "coefficients": np.zeros((num_targets, 0), np.int16),
        "sketch_errors": np.zeros((num_targets, 0), np.float32),
    }


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


def restricted(targets: SparseTargets, vocab_size: int) -> SparseTargets:
    """The same for a vocabulary that ends at `vocab_size`: what is stored of other ids becomes part of the tail.

    Their places repeat the row's first remaining id with probability 0; a row that keeps none has its label's id no
    more than others have: it is all tail. A draw of such an id becomes another draw of its row.
    """
    outside = targets.ids >= vocab_size
    if not outside.any() and not (targets.draws >= vocab_size).any():
        return targets
    outside |= targets.logits == -np.inf  # places without entry go last
    order = np.argsort(outside, axis=1, kind="stable")
    ids, logits = (np.take_along_axis(values, order, axis=1) for values in (targets.ids, targets.logits))
    inside = cut(replace(targets, ids=ids, logits=logits), np.count_nonzero(~outside, axis=1))
    draws = targets.draws
    if draws.shape[1]:
        usable = np.argmax(draws < vocab_size, axis=1)
        draws = np.where(draws < vocab_size, draws, draws[np.arange(len(draws)), usable][:, None])
        draws = np.where(draws < vocab_size, draws, 0)
    return replace(inside, ids=np.where(inside.ids < vocab_size, inside.ids, 0), draws=draws)


def kept(targets: SparseTargets, spec: TargetSpec) -> SparseTargets:
    """What a cache keeps of the top k that an engine gave: as many entries as reach its `top_p`, or all.

    Cut here, and not where the logits are: behind the top k fewer entries save nothing there, their mass adds to the
    tail as exactly, and neither the engine nor the number of ranks comes into it.
    """
    if spec.top_p is None or spec.top_p_temperature is None or spec.min_k is None:
        return targets
    return cut(targets, counts_to_mass(targets, spec.top_p, spec.top_p_temperature, spec.min_k))


def counts_to_mass(targets: SparseTargets, top_p: float, temperature: float, min_k: int) -> np.ndarray:
    """int64 [N]: the fewest entries of a row whose probabilities add up to `top_p`, at least `min_k`, at most K.

    Summed in float64. A mass of 1 takes all entries.
    """
    scaled = targets.logits.astype(np.float64) / temperature
    held = np.cumsum(np.exp(scaled - targets._of(targets.logsumexps, temperature)[:, None]), axis=1)
    too_few = ~(held[:, :-1] >= top_p) if top_p < 1 else np.ones((len(held), targets.top_k - 1), bool)
    return np.maximum(1 + np.count_nonzero(too_few, axis=1), min_k)


def cut(targets: SparseTargets, counts_N: np.ndarray) -> SparseTargets:
    """The same with the first `counts_N` entries of each row alone; the others' mass becomes part of the tail.

    It is added to the tail in float64, as logarithms: exact whatever it is small beside.
    """
    is_kept = np.arange(targets.top_k) < counts_N[:, None]
    rows = np.flatnonzero(counts_N < targets.counts)
    if not len(rows):
        return targets
    logits, tails = targets.logits[rows].astype(np.float64), targets.tail_logprobs.copy()
    largest = logits[np.arange(len(rows)), counts_N[rows]]
    depths = np.where(is_kept[rows], -np.inf, logits - largest[:, None])
    for index, temperature in enumerate(targets.temperatures):
        dropped = np.log(np.exp(depths / temperature).sum(axis=1))
        dropped += largest / temperature - targets.logsumexps[rows, index]
        tails[rows, index] = np.logaddexp(tails[rows, index], dropped)
    return replace(
        targets,
        ids=np.where(is_kept, targets.ids, targets.ids[:, :1]),
        logits=np.where(is_kept, targets.logits, np.float32(-np.inf)),
        tail_logprobs=tails,
        sketch_errors=np.full_like(targets.sketch_errors, np.nan),  # measured of another tail
    )


def logsumexps_of(logits_NK: np.ndarray, tail_logprobs_NT: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    """float32 [N, T]: the L_T with which the stored entries and the tail add up to 1; K is at least 1."""
    heads = np.empty(tail_logprobs_NT.shape, np.float32)
    powers = np.empty(logits_NK.shape, np.float32)
    for index, temperature in enumerate(temperatures):
        np.exp(np.multiply(logits_NK, np.float32(1 / temperature), out=powers), out=powers)
        np.einsum("nk->n", powers, out=heads[:, index])  # a quarter of the time of sum
    return np.log(heads) - np.log1p(-np.exp(tail_logprobs_NT))


def logsumexps_of_rows(
    logits_E: np.ndarray, starts_N: np.ndarray, tail_logprobs_NT: np.ndarray, temperatures: tuple[float, ...]
) -> np.ndarray:
    """float32 [N, T]: the same of rows of any lengths, one after the other, which begin at `starts_N`."""
    heads = np.empty(tail_logprobs_NT.shape, np.float32)
    powers = np.empty(logits_E.shape, np.float32)
    for index, temperature in enumerate(temperatures):
        np.exp(np.multiply(logits_E, np.float32(1 / temperature), out=powers), out=powers)
        heads[:, index] = np.add.reduceat(powers, starts_N)
    return np.log(heads) - np.log1p(-np.exp(tail_logprobs_NT))


def reconstruction_errors(exact: SparseTargets, stored: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
    """What was lost between a capture and its stored form, which have the same ids: two float32 [N, T].

    KL(exact || stored) in nats, with everything outside `ids` as one entry, and the largest error of a
    single probability. The KL is summed as p (r + exp(-r) - 1), r = log p - log q, no term of which is
    negative: p log(p / q) would drown in its own rounding.
    """
    kl, largest = [], []
    for temperature in exact.temperatures:
        tails = (targets._of(targets.tail_logprobs, temperature)[:, None] for targets in (exact, stored))
        heads = (targets.logprobs(temperature) for targets in (exact, stored))
        parts = [_divergence(*pair) for pair in (tuple(heads), tuple(tails))]
        kl.append(sum(divergence.sum(axis=1) for divergence, _ in parts))
        largest.append(np.max([error.max(axis=1, initial=0) for _, error in parts], axis=0))
    return np.stack(kl, axis=1), np.stack(largest, axis=1)


def _divergence(logprobs: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every entry's share of the KL, and its probability's error."""
    with np.errstate(invalid="ignore"):
        ratio = logprobs - stored
    ratio[logprobs == -np.inf] = 0.0  # nothing there: it was nothing before
    probs = np.exp(logprobs)
    with np.errstate(over="ignore"):
        change = np.expm1(-np.clip(ratio, -80, 80))
    return probs * (ratio + change), np.abs(probs * change)
