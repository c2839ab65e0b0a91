"""What the teacher's stored top-k and the mass beyond it ask of the student, row by row.

Owns the tail policies and the arithmetic of a target that needs no student logits. Knows nothing
of logits, heads or gradients.

Shapes: N target tokens, K stored entries of a token, V the real vocabulary.

Every policy is one formula with other weights, over the stored ids S and the rest of the vocabulary:

    KL = entropy_term - sum_S w_j log q_j - t log(1 - sum_S q_j) - u sum_rest log q_j

| tail        | w (`weights_NK`) | t (`bucket_N`) | u (`level_N`)       |
|-------------|------------------|----------------|---------------------|
| ghost       | p                | tail mass      |                     |
| hybrid, sampled | p, and tail / D a draw |      |                     |
| zero        | p                |                |                     |
| renormalise | p / sum p        |                |                     |
| uniform     | p                |                | tail mass / (V - K) |
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 1e-3
"""How far a probability may lie outside [0, 1]: a bfloat16 sum."""

TailWeights = tuple[Tensor, Tensor, Tensor | None]
"""weights_NK, bucket_N and level_N (None where the policy sets no level)."""


def _ghost(probs_NK: Tensor, tail_mass_N: Tensor, num_rest_N: Tensor) -> TailWeights:
    """The tail is one bucket: its mass is learnt, its shape is left to the student (arXiv 2503.16870)."""
    return probs_NK, tail_mass_N, None


def _drawn(probs_NK: Tensor, tail_mass_N: Tensor, num_rest_N: Tensor) -> TailWeights:
    """The entries hold draws from the tail with their weights: an unbiased estimate of the full gradient."""
    return probs_NK, torch.zeros_like(tail_mass_N), None


def _zero(probs_NK: Tensor, tail_mass_N: Tensor, num_rest_N: Tensor) -> TailWeights:
    """The tail is dropped: biased, and the sum may be negative."""
    return probs_NK, torch.zeros_like(tail_mass_N), None


def _renormalise(probs_NK: Tensor, tail_mass_N: Tensor, num_rest_N: Tensor) -> TailWeights:
    """The stored entries are scaled up to a sum of one."""
    stored_mass_N1 = probs_NK.sum(1, keepdim=True).clamp_min(torch.finfo(probs_NK.dtype).tiny)
    return probs_NK / stored_mass_N1, torch.zeros_like(tail_mass_N), None


def _uniform(probs_NK: Tensor, tail_mass_N: Tensor, num_rest_N: Tensor) -> TailWeights:
    """The tail's mass is spread evenly over what is not stored."""
    return probs_NK, torch.zeros_like(tail_mass_N), tail_mass_N / num_rest_N.clamp_min(1)


TAIL_POLICIES: dict[str, Callable[[Tensor, Tensor, Tensor], TailWeights]] = {
    "ghost": _ghost,
    "hybrid": _drawn,
    "sampled": _drawn,
    "zero": _zero,
    "renormalise": _renormalise,
    "uniform": _uniform,
}

DRAWN_TAILS = ("hybrid", "sampled")
"""Policies whose entries include draws: with a top k, and alone (then the tail mass is 1; arXiv 2503.16870)."""


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

    def rows(self, rows: slice) -> "RowTargets":
        """The targets of some of the tokens (views)."""
        return RowTargets(*(None if field is None else field[rows] for field in self))


def make_row_targets(ids_NK: Tensor, probs_NK: Tensor, tail_mass_N: Tensor, tail: str, vocab_size: int) -> RowTargets:
    """Targets under the policy `tail` from p_T on the stored ids and the mass of the rest.

    The tail's mass is taken as given, never as 1 - sum p: that difference is rounding noise where it is small.
    It is dropped in rows that store the whole vocabulary, where nothing is left to bear it.
    """
    is_entry_NK = ids_NK != ids_NK[:, :1]
    is_entry_NK[:, 0] = True
    _check_values(ids_NK, probs_NK, tail_mass_N, is_entry_NK, vocab_size)
    num_rest_N = vocab_size - is_entry_NK.sum(1)
    tail_mass_N = tail_mass_N.clamp_min(0).masked_fill(num_rest_N == 0, 0)
    weights_NK, bucket_N, level_N = TAIL_POLICIES[tail](probs_NK, tail_mass_N, num_rest_N)
    total_N = weights_NK.sum(1) + bucket_N
    entropy_term_N = torch.xlogy(weights_NK, weights_NK).sum(1) + torch.xlogy(bucket_N, bucket_N)
    if level_N is not None:
        total_N = total_N + num_rest_N * level_N
        entropy_term_N = entropy_term_N + num_rest_N * torch.xlogy(level_N, level_N)
    return RowTargets(ids_NK, is_entry_NK, weights_NK, bucket_N, level_N, num_rest_N, total_N, entropy_term_N)


def check_shapes(ids_NK: Tensor, probs_NK: Tensor, tail_mass_N: Tensor, num_tokens: int, device: torch.device) -> None:
    """Raises ValueError unless the targets are those of `num_tokens` tokens and lie on `device`."""
    if ids_NK.ndim != 2 or ids_NK.shape[0] != num_tokens or ids_NK.shape[1] == 0:
        raise ValueError(f"ids_NK: shape {tuple(ids_NK.shape)}, expected ({num_tokens}, K) with K of at least 1.")
    if probs_NK.shape != ids_NK.shape:
        raise ValueError(f"probs_NK: shape {tuple(probs_NK.shape)}, expected that of ids_NK, {tuple(ids_NK.shape)}.")
    if tail_mass_N.shape != (num_tokens,):
        raise ValueError(f"tail_mass_N: shape {tuple(tail_mass_N.shape)}, expected ({num_tokens},).")
    if ids_NK.is_floating_point() or ids_NK.is_complex() or ids_NK.dtype == torch.bool:
        raise ValueError(f"ids_NK: dtype {ids_NK.dtype}, expected an integer dtype.")
    for name, tensor in (("probs_NK", probs_NK), ("tail_mass_N", tail_mass_N)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected a floating-point dtype.")
    for name, tensor in (("ids_NK", ids_NK), ("probs_NK", probs_NK), ("tail_mass_N", tail_mass_N)):
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, expected {device} as hidden_NH; move it there.")


def _check_values(ids_NK: Tensor, probs_NK: Tensor, tail_mass_N: Tensor, is_entry_NK: Tensor, vocab_size: int) -> None:
    if len(ids_NK) == 0:
        return
    smallest_id, largest_id = (int(bound) for bound in ids_NK.aminmax())
    if smallest_id < 0 or largest_id >= vocab_size:
        raise ValueError(
            f"ids_NK: holds ids from {smallest_id} to {largest_id}, expected 0 to {vocab_size - 1}; "
            "the targets are of another vocabulary, or vocab_size is wrong."
        )
    for name, masses in (("probs_NK", probs_NK), ("tail_mass_N", tail_mass_N)):
        smallest, largest = (float(bound) for bound in masses.aminmax())
        if not (smallest >= -_ROUNDING and largest <= 1 + _ROUNDING):  # also true of nan
            raise ValueError(
                f"{name}: holds values from {smallest:.6g} to {largest:.6g}, expected probabilities in [0, 1]; "
                "logprobs have to be exponentiated first."
            )
    padded_mass = float(probs_NK.masked_fill(is_entry_NK, 0).sum())
    if padded_mass != 0:
        raise ValueError(
            f"probs_NK: a repeated id carries probability, {padded_mass:.6g} in all, expected 0; "
            "ids are unique in a row, and padding repeats slot 0 with probability 0."
        )
