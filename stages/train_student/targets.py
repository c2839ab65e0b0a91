"""What a student learns at the target tokens of a batch: the labels, and the teacher's stored probabilities.

Shapes: M target tokens, K stored entries of a token.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.train_student.sketch import SketchHead

LABELS = "shift_labels"
"""The labels' name in a batch: the Trainer counts by it."""
TEACHER_COLUMNS = {
    "ids_MK": "teacher_ids",
    "probs_MK": "teacher_probs",
    "tail_mass_M": "teacher_tail",
    "entropy_M": "teacher_entropy",
    "coefficients_MR": "teacher_coefficients",
}
"""Fields of TeacherTargets, and the names of their tensors in a batch."""
_ROUNDING = 1e-3
"""How far a probability may lie outside [0, 1]: a bfloat16 sum."""


@dataclass(frozen=True, kw_only=True)
class TeacherTargets:
    """What is stored of the teacher at M target tokens."""

    ids_MK: Tensor
    """Unique in a row; padding repeats slot 0 with probability 0."""
    probs_MK: Tensor
    """p_T over the full vocabulary, restricted to the ids."""
    tail_mass_M: Tensor
    """p_T of all other ids."""
    entropy_M: Tensor | None = None
    """Of p_T over the full vocabulary, in nats; with a tail of draws alone, and not needed there."""
    coefficients_MR: Tensor | None = None
    """Of the sketch, with a tail that is sketched alone."""
    sketch: SketchHead | None = None
    """What all tokens have in common, so that it is in no batch."""

    def as_batch(self) -> dict[str, Tensor]:
        """The tensors that there are, by their names in a batch."""
        found = {column: getattr(self, name) for name, column in TEACHER_COLUMNS.items()}
        return {column: tensor for column, tensor in found.items() if tensor is not None}

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor | None], sketch: SketchHead | None = None) -> "TeacherTargets | None":
        """Those that `as_batch` has put into a batch, None without any."""
        found = {name: batch.get(column) for name, column in TEACHER_COLUMNS.items()}
        return None if found["ids_MK"] is None else cls(**found, sketch=sketch)


@dataclass(frozen=True, kw_only=True)
class DistillationTargets:
    """Labels and teacher, if there is one, at M target tokens, all on one device."""

    labels_M: Tensor
    teacher: TeacherTargets | None = None

    def __len__(self) -> int:
        return len(self.labels_M)

    def to(self, device: torch.device | str) -> "DistillationTargets":
        """The same on another device, but for the sketch."""
        return self._each(lambda tensor: tensor.to(device))

    def rows(self, rows: slice | Tensor) -> "DistillationTargets":
        """Those of some of the target tokens; views where `rows` is a slice."""
        return self._each(lambda tensor: tensor[rows])

    def as_batch(self) -> dict[str, Tensor]:
        """The tensors by their names in a batch: what the Trainer and DDP move is a dict."""
        return {LABELS: self.labels_M} | ({} if self.teacher is None else self.teacher.as_batch())

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any], sketch: SketchHead | None = None) -> "DistillationTargets":
        """Those that `as_batch` has put into a batch, among its other entries; the sketch is in none."""
        return cls(labels_M=batch[LABELS], teacher=TeacherTargets.of_batch(batch, sketch))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "DistillationTargets":
        columns = {column: function(tensor) for column, tensor in self.as_batch().items()}
        return self.of_batch(columns, None if self.teacher is None else self.teacher.sketch)


def real_entries(ids_MK: Tensor) -> Tensor:
    """bool [M, K]: False on padding slots, which repeat the id of slot 0."""
    is_entry_MK = ids_MK != ids_MK[:, :1]
    is_entry_MK[:, 0] = True
    return is_entry_MK


def require_values(targets: DistillationTargets, vocab_size: int, ignore_index: int | None = None) -> None:
    """Raises ValueError unless ids lie in the vocabulary and probabilities are some; waits for the device once."""
    if len(targets) == 0:
        return
    bounded = {"labels_N": targets.labels_M}
    teacher = targets.teacher
    if teacher is not None:
        bounded |= {"ids_NK": teacher.ids_MK, "probs_NK": teacher.probs_MK, "tail_mass_N": teacher.tail_mass_M}
        if teacher.coefficients_MR is not None and teacher.coefficients_MR.numel():
            bounded["coefficients_NR"] = teacher.coefficients_MR
    bounds = [bound.double() for tensor in bounded.values() for bound in tensor.aminmax()]
    if teacher is not None:
        bounds.append(teacher.probs_MK.masked_fill(real_entries(teacher.ids_MK), 0).double().sum())
    found = torch.stack(bounds).tolist()
    ranges = dict(zip(bounded, zip(found[::2], found[1::2])))
    hint = "; the targets are of another vocabulary, or vocab_size is wrong."
    or_ignored = hint if ignore_index is None else f", or {ignore_index} for positions without a loss."
    _require_ids("labels_N", ranges["labels_N"], vocab_size, or_ignored)
    if teacher is None:
        return
    _require_ids("ids_NK", ranges["ids_NK"], vocab_size, hint)
    for name in ("probs_NK", "tail_mass_N"):
        smallest, largest = ranges[name]
        if not (smallest >= -_ROUNDING and largest <= 1 + _ROUNDING):  # also true of nan
            raise ValueError(
                f"{name}: holds values from {smallest:.6g} to {largest:.6g}, expected probabilities in [0, 1]; "
                "logprobs have to be exponentiated first."
            )
    smallest, largest = ranges.get("coefficients_NR", (0.0, 0.0))
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"coefficients_NR: holds values from {smallest} to {largest}, expected finite ones.")
    if found[-1] != 0:
        raise ValueError(
            f"probs_NK: a repeated id carries probability, {found[-1]:.6g} in all, expected 0; "
            "ids are unique in a row, and padding repeats slot 0 with probability 0."
        )


def _require_ids(name: str, bounds: tuple[float, float], vocab_size: int, hint: str) -> None:
    smallest, largest = map(int, bounds)
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(f"{name}: holds ids from {smallest} to {largest}, expected 0 to {vocab_size - 1}{hint}")
