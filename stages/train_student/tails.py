"""What stands for the teacher's mass beyond its stored entries: a table of policies, by the names that settings take.

Loads no torch: the choices of a setting are read from here. row_targets.py has the formula that the weights enter:

| tail        | w (`weights_NK`) | t (`bucket_N`) | u (`level_N`)       |
|-------------|------------------|----------------|---------------------|
| ghost       | p                | tail mass      |                     |
| hybrid, sampled | p, and tail / D a draw |      |                     |
| zero        | p                |                |                     |
| renormalise | p / sum p        |                |                     |
| uniform     | p                |                | tail mass / (V - K) |
| sketch      | p                | tail mass      |                     |

`sketch` is `ghost` with the bucket's shape known: its mass lies on the ids that are not stored in proportion to
exp(s_v / T), where s are the logits that the cache's sketch makes of a target's coefficients. To the formula comes

    t KL(r || q_rest),  r = softmax_rest(s / T), q_rest the student's softmax over the rest

which makes it the KL of two whole distributions.

Shapes: N target tokens, K stored entries of a token, V the real vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_MASS = 1.1754943508222875e-38
"""The smallest normal float32: what a division by a mass of 0 takes instead."""

TailWeights = tuple["Tensor", "Tensor", "Tensor | None"]
"""weights_NK, bucket_N and level_N (None where the policy sets no level)."""


@dataclass(frozen=True)
class Tail:
    """A policy for the mass outside the stored ids."""

    weigh: Callable[["Tensor", "Tensor", "Tensor"], TailWeights]
    """Of p_T on the stored ids, the mass of the rest, and how many ids are not stored."""
    is_drawn: bool = False
    """The entries include draws from the tail (arXiv 2503.16870)."""
    is_sketched: bool = False
    """The bucket has the shape that the cache's sketch gives it."""
    takes_all_divergences: bool = False
    """Makes a distribution to which every divergence applies (divergences.py)."""


def _bucket(probs_NK: "Tensor", tail_mass_N: "Tensor", num_rest_N: "Tensor") -> TailWeights:
    """The tail is one bucket: its mass is learnt; its shape is a sketch's, or the student's (arXiv 2503.16870)."""
    return probs_NK, tail_mass_N, None


def _drawn(probs_NK: "Tensor", tail_mass_N: "Tensor", num_rest_N: "Tensor") -> TailWeights:
    """The entries hold draws from the tail with their weights: an unbiased estimate of the full gradient."""
    return probs_NK, tail_mass_N.new_zeros(tail_mass_N.shape), None


def _zero(probs_NK: "Tensor", tail_mass_N: "Tensor", num_rest_N: "Tensor") -> TailWeights:
    """The tail is dropped: biased, and the sum may be negative."""
    return probs_NK, tail_mass_N.new_zeros(tail_mass_N.shape), None


def _renormalise(probs_NK: "Tensor", tail_mass_N: "Tensor", num_rest_N: "Tensor") -> TailWeights:
    """The stored entries are scaled up to a sum of one."""
    stored_mass_N1 = probs_NK.sum(1, keepdim=True).clamp_min(SMALLEST_MASS)
    return probs_NK / stored_mass_N1, tail_mass_N.new_zeros(tail_mass_N.shape), None


def _uniform(probs_NK: "Tensor", tail_mass_N: "Tensor", num_rest_N: "Tensor") -> TailWeights:
    """The tail's mass is spread evenly over what is not stored."""
    return probs_NK, tail_mass_N.new_zeros(tail_mass_N.shape), tail_mass_N / num_rest_N.clamp_min(1)


TAILS = {
    "ghost": Tail(_bucket, takes_all_divergences=True),
    "hybrid": Tail(_drawn, is_drawn=True),
    "sampled": Tail(_drawn, is_drawn=True),
    "zero": Tail(_zero),
    "renormalise": Tail(_renormalise),
    "uniform": Tail(_uniform),
    "sketch": Tail(_bucket, is_sketched=True, takes_all_divergences=True),
}

DRAWN_TAILS = tuple(name for name, tail in TAILS.items() if tail.is_drawn)
"""Policies whose entries include draws: with a top k, and alone (then the tail mass is 1)."""

DIVERGING_TAILS = tuple(name for name, tail in TAILS.items() if tail.takes_all_divergences)
"""Policies for every divergence; the others are for the forward KL."""
