"""How far two sets of targets of the same positions lie apart, in probabilities.

Shape suffixes: N positions, K stored entries.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.targets import SparseTargets, cut

ALLOWED_OF_LOGITS = 1e-4
"""How far rounding may put a float32 logit, as a share of the largest."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of some quantity over the positions of a sequence."""

    quantity: str
    temperature: float
    value: float
    mean: float
    """Mean over the positions of the position's largest."""
    position: int
    """Index of the target that has the largest."""
    found: float
    wanted: float

    def __str__(self) -> str:
        return (
            f"{self.quantity} at T={self.temperature:g} is {self.found:.5f}, the teacher says {self.wanted:.5f} "
            f"(target {self.position})"
        )


def differences(found: SparseTargets, wanted: SparseTargets, temperature: float) -> list[Difference]:
    """What tells the two apart at one temperature: stored probabilities, tail mass, the label's probability.

    Where one has more entries of a position, those that the other has not count as its tail: `difference_of_cuts` says
    whether there may be more.
    """
    if found.is_ragged or wanted.is_ragged:
        shorter = np.minimum(found.counts, wanted.counts)
        found, wanted = cut(found, shorter), cut(wanted, shorter)
    columns = {
        "p of a stored id": _matched_probs(found, wanted, temperature),
        "tail mass": (found.tail_mass(temperature)[:, None], wanted.tail_mass(temperature)[:, None]),
        "p of the label": tuple(np.exp(part.label_logprobs(temperature))[:, None] for part in (found, wanted)),
    }
    return [
        _difference(quantity, temperature, ours, theirs)
        for quantity, (ours, theirs) in columns.items()
        if ours.shape[1]
    ]


def difference_of_cuts(found: SparseTargets, wanted: SparseTargets, top_p: float, temperature: float) -> Difference:
    """How far from `top_p` the mass is where the two end their rows at different entries.

    Arithmetic moves a border that lies on the mass itself, and no other: the shorter row says that it is reached there,
    the longer one that it is not reached before its last entry. In the longer one's numbers both places hold `top_p`.
    """
    ours, theirs = found.counts, wanted.counts
    is_ours_N1 = (ours > theirs)[:, None]
    held_NK = np.cumsum(np.where(is_ours_N1, found.probs(temperature), wanted.probs(temperature)), axis=1)
    ends_N2 = np.stack([np.minimum(ours, theirs) - 1, np.maximum(ours, theirs) - 2], axis=1)
    differ_N1 = (ours != theirs)[:, None]
    held_N2 = np.where(differ_N1, np.take_along_axis(held_NK, np.maximum(ends_N2, 0), 1), top_p)
    return _difference("mass at the end of the entries", temperature, held_N2, np.full_like(held_N2, top_p))


def _difference(quantity: str, temperature: float, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Of two [N, any] arrays."""
    apart = np.abs(ours - theirs)
    row, column = np.unravel_index(int(np.nan_to_num(apart, nan=np.inf).argmax()), apart.shape)
    value, one, other = (float(part[row, column]) for part in (apart, ours, theirs))
    return Difference(quantity, temperature, value, float(apart.max(1).mean()), int(row), one, other)


def disagreement(found: SparseTargets, logits_NV: np.ndarray, labels_N: np.ndarray) -> str:
    """What of the targets is not that of the whole float32 logits of their positions; empty if all is.

    Both come from one product of matrices, so that rounding alone may tell them apart. Positions at which the model's
    own logits are no numbers may have targets that are none either: these are left to the check of all targets.
    """
    is_sound = np.isfinite(logits_NV.max(1, initial=-np.inf))  # nan where a logit is
    if np.isfinite(found.logsumexps[~is_sound]).any():
        return "a logsumexp is a number where logits are none"
    found, logits_NV, labels_N = found.take(is_sound), logits_NV[is_sound], labels_N[is_sound]
    exact_NV = logits_NV.astype(np.float64)
    allowed = ALLOWED_OF_LOGITS * max(1.0, np.abs(exact_NV[np.isfinite(exact_NV)]).max(initial=0.0))
    exact_NV -= exact_NV.max(1, keepdims=True)
    best_NK = -np.sort(-exact_NV, axis=1)[:, : found.top_k]
    pairs = {
        "an id's logit": (found.logits, np.take_along_axis(exact_NV, found.ids.astype(np.int64), 1), allowed),
        "a largest logit": (found.logits, best_NK, allowed),
        "a label's logit": (found.label_logits, np.take_along_axis(exact_NV, labels_N[:, None], 1)[:, 0], allowed),
    }
    np.put_along_axis(rest_NV := exact_NV.copy(), found.ids.astype(np.int64), -np.inf, 1)
    for index, temperature in enumerate(found.temperatures):
        total_N = np.exp(exact_NV / temperature).sum(1)
        tails = np.exp(found.tail_logprobs[:, index]), np.exp(rest_NV / temperature).sum(1) / total_N
        stretched = allowed / min(temperature, 1.0)
        pairs[f"the logsumexp at T={temperature:g}"] = (found.logsumexps[:, index], np.log(total_N), stretched)
        pairs[f"the tail at T={temperature:g}"] = (*tails, stretched)
    for name, (ours, theirs, bound) in pairs.items():
        with np.errstate(invalid="ignore"):
            apart = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
        if not (apart <= bound).all():
            place = np.unravel_index(int(np.nan_to_num(apart, nan=np.inf).argmax()), apart.shape)
            return f"{name} is {ours[place]:.5g} for {theirs[place]:.5g}"
    return ""


def _matched_probs(found: SparseTargets, wanted: SparseTargets, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, 2K], twice: the probabilities of the ids of either, as both give them.

    An id that one of them has not kept has at most that one's smallest kept probability, and is taken to
    have that, or as much less as the other says. Both have as many entries in a row.
    """
    ours, theirs = found.probs(temperature), wanted.probs(temperature)
    if not found.top_k:
        return ours, theirs
    nothing = 1 + max(int(part.ids.max(initial=0)) for part in (found, wanted))
    our_ids, their_ids = (np.where(part.logits > -np.inf, part.ids, nothing) for part in (found, wanted))
    last_N1 = found.counts[:, None] - 1
    theirs_of_ours = _look_up(our_ids, their_ids, theirs, ours, last_N1)
    ours_of_theirs = _look_up(their_ids, our_ids, ours, theirs, last_N1)
    return np.hstack([ours, ours_of_theirs]), np.hstack([theirs_of_ours, theirs])


def _look_up(
    ids_NK: np.ndarray, other_ids_NK: np.ndarray, other_NK: np.ndarray, own_NK: np.ndarray, last_N1: np.ndarray
) -> np.ndarray:
    """float32 [N, K]: what the other side, whose last entry is where `last_N1` says, gives to `ids_NK`."""
    order = np.argsort(other_ids_NK, axis=1)
    ordered = np.take_along_axis(other_ids_NK, order, 1).astype(np.int64)
    width = int(max(ids_NK.max(), other_ids_NK.max())) + 1
    base = np.arange(len(ids_NK), dtype=np.int64)[:, None] * width
    flat = (ordered + base).ravel()
    place = np.searchsorted(flat, ids_NK + base).clip(max=flat.size - 1)
    is_there = flat[place] == ids_NK + base
    values = np.take_along_axis(other_NK, order, 1).ravel()[place]
    return np.where(is_there, values, np.minimum(own_NK, np.take_along_axis(other_NK, last_N1, 1)))
