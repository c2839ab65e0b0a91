"""What the teacher's stored top-k and the mass beyond it ask of the student, row by row.

Owns the arithmetic of a target that needs no student logits; tails.py has the policies. Knows nothing of logits, heads
or gradients.

Shapes: N target tokens, K stored entries of a token, V the real vocabulary.

Every policy is one formula with weights of its own, over the stored ids S and the rest of the vocabulary:

    KL = entropy_term - sum_S w_j log q_j - t log(1 - sum_S q_j) - u sum_rest log q_j

A sketch of the tail adds what tails.py has of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stages.train_student.loss_settings import LossSettings
from stages.train_student.sketch import SketchedTails
from stages.train_student.tails import TAILS
from stages.train_student.targets import TeacherTargets, real_entries


class RowTargets(NamedTuple):
    """The teacher's side of N target tokens, in the dtype of the loss."""

    ids_NK: Tensor
    """int64, unique in a row but for padding."""
    is_entry_NK: Tensor
    """False on padding slots, which repeat the id of slot 0."""
    weights_NK: Tensor
    """w of the module's formula; 0 on padding slots."""
    bucket_N: Tensor
    """t of the module's formula."""
    level_N: Tensor | None
    """u of the module's formula, None where it is 0 for the policy."""
    num_rest_N: Tensor
    """How many ids of the real vocabulary are not stored."""
    total_N: Tensor
    """Sum of all weights: the factor of q in the gradient. 1 but for the zero tail, to rounding."""
    entropy_term_N: Tensor
    """sum x log x over all weights, in nats: what makes the cross-entropy a divergence."""
    sketch: SketchedTails | None = None
    """How the bucket lies on the ids that are not stored, where the policy says."""

    def rows(self, rows: slice) -> "RowTargets":
        """The targets of some of the tokens (views)."""
        return RowTargets(*(None if field is None else field[rows] for field in self))


def make_row_targets(teacher: TeacherTargets, settings: LossSettings, dtype: torch.dtype) -> RowTargets:
    """Targets under the tail policy of the settings.

    The tail's mass is taken as given, never as 1 - sum p: that difference is rounding noise where it is small.
    It is dropped in rows that store the whole vocabulary, where nothing is left to bear it.
    """
    ids_NK, probs_NK = teacher.ids_MK.long(), teacher.probs_MK.to(dtype)
    is_entry_NK = real_entries(ids_NK)
    num_rest_N = settings.vocab_size - is_entry_NK.sum(1)
    tail_mass_N = teacher.tail_mass_M.to(dtype).clamp_min(0).masked_fill(num_rest_N == 0, 0)
    weights_NK, bucket_N, level_N = TAILS[settings.tail].weigh(probs_NK, tail_mass_N, num_rest_N)
    total_N = weights_NK.sum(1) + bucket_N
    entropy_term_N = torch.xlogy(weights_NK, weights_NK).sum(1) + torch.xlogy(bucket_N, bucket_N)
    if level_N is not None:
        total_N = total_N + num_rest_N * level_N
        entropy_term_N = entropy_term_N + num_rest_N * torch.xlogy(level_N, level_N)
    if teacher.entropy_M is not None:
        entropy_term_N = -teacher.entropy_M.to(dtype)
    sketch = None
    if TAILS[settings.tail].is_sketched:
        assert teacher.coefficients_MR is not None
        assert teacher.sketch is not None
        sketch = SketchedTails.of(
            teacher.coefficients_MR, teacher.sketch, settings.temperature, settings.vocab_size, dtype
        )
    return RowTargets(ids_NK, is_entry_NK, weights_NK, bucket_N, level_N, num_rest_N, total_N, entropy_term_N, sketch)
