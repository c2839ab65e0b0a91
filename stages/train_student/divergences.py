"""Divergences between teacher and student over the stored ids and one bucket for the rest.

Owns reverse KL and Jensen-Shannon; the forward KL under every tail policy is row_loss.py's own. Both are defined on
the K + 1 outcomes of the ghost tail, P = (p_S, t) and Q = (q_S, 1 - Q_S). Merging outcomes never raises either of
them (data processing inequality), so each is a lower bound of its full-vocabulary self, with equality for k = V.

For a divergence of Q with derivative f_b = dD/dQ_b, the gradient is T dD/dz_j = q_j (f_b(j) - sum_b Q_b f_b): exact on
the stored ids; in the rest it moves the bucket as a whole and leaves its shape to the student.

| divergence | D                                        | f_b, up to a constant      |
|------------|------------------------------------------|----------------------------|
| reverse    | KL(Q || P), at most 88 nats an outcome   | log Q_b - log P_b          |
| js         | KL(P || M) / 2 + KL(Q || M) / 2, M the mean, at most log 2 | (log Q_b - log M_b) / 2    |

A teacher's probability of 0 counts as the smallest normal number (1e-38 in float32): the reverse KL stays finite.

Shapes: N rows, K stored entries. `_N1` is the bucket.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Pulls = tuple[Tensor, Tensor, Tensor]
"""The divergence in nats [N], and T dD/dz on the entries [N, K] and summed over the rest [N, 1]."""


def _reverse(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    score = log_q - log_p
    return (q * score).sum(1), score


def _jensen_shannon(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    score = (log_q - log_mean) / 2
    return (p * (log_p - log_mean)).sum(1) / 2 + (q * score).sum(1), score


BUCKET_DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "reverse": _reverse,
    "js": _jensen_shannon,
}
DIVERGENCES = ("forward", *BUCKET_DIVERGENCES)


def bucket_divergence(
    divergence: str, probs_NK: Tensor, bucket_N: Tensor, entries_NK: Tensor, rest_N1: Tensor
) -> Pulls:
    """The divergence of a student with the given log-probabilities of entries and rest; padding has q = p = 0."""
    p = torch.cat([probs_NK, bucket_N[:, None]], 1)
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    log_q = torch.cat([entries_NK, rest_N1], 1)
    q = log_q.exp()
    value_N, score = BUCKET_DIVERGENCES[divergence](log_p, log_q, p, q)
    pull = q * (score - (q * score).sum(1, keepdim=True))
    return value_N, pull[:, :-1], pull[:, -1:]
