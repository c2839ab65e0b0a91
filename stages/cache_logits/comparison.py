"""How far two sets of targets of the same positions lie apart, in probabilities.

Shape suffixes: N positions, K stored entries.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.targets import SparseTargets


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
    """What tells the two apart at one temperature: stored probabilities, tail mass, the label's probability."""
    columns = {
        "p of a stored id": _matched_probs(found, wanted, temperature),
        "tail mass": (found.tail_mass(temperature)[:, None], wanted.tail_mass(temperature)[:, None]),
        "p of the label": tuple(np.exp(part.label_logprobs(temperature))[:, None] for part in (found, wanted)),
    }
    result = []
    for quantity, (ours, theirs) in columns.items():
        if ours.shape[1] == 0:
            continue
        apart = np.abs(ours - theirs)
        row, column = np.unravel_index(int(np.nan_to_num(apart, nan=np.inf).argmax()), apart.shape)
        values = (float(part[row, column]) for part in (apart, ours, theirs))
        value, one, other = values
        mean = float(apart.max(1).mean())
        result.append(Difference(quantity, temperature, value, mean, int(row), one, other))
    return result


def _matched_probs(found: SparseTargets, wanted: SparseTargets, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, 2K], twice: the probabilities of the ids of either, as both give them.

    An id that one of them has not kept has at most that one's smallest kept probability, and is taken to
    have that, or as much less as the other says.
    """
    ours, theirs = found.probs(temperature), wanted.probs(temperature)
    theirs_of_ours = _look_up(found.ids, wanted.ids, theirs, ours)
    ours_of_theirs = _look_up(wanted.ids, found.ids, ours, theirs)
    return np.hstack([ours, ours_of_theirs]), np.hstack([theirs_of_ours, theirs])


def _look_up(ids_NK: np.ndarray, other_ids_NK: np.ndarray, other_NK: np.ndarray, own_NK: np.ndarray) -> np.ndarray:
    """float32 [N, K]: what the other side gives to `ids_NK`."""
    if ids_NK.size == 0:
        return own_NK
    order = np.argsort(other_ids_NK, axis=1)
    ordered = np.take_along_axis(other_ids_NK, order, 1).astype(np.int64)
    width = int(max(ids_NK.max(), other_ids_NK.max())) + 1
    base = np.arange(len(ids_NK), dtype=np.int64)[:, None] * width
    flat = (ordered + base).ravel()
    place = np.searchsorted(flat, ids_NK + base).clip(max=flat.size - 1)
    is_there = flat[place] == ids_NK + base
    values = np.take_along_axis(other_NK, order, 1).ravel()[place]
    return np.where(is_there, values, np.minimum(own_NK, other_NK[:, -1:]))
