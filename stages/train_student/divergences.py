"""Divergences between teacher and student over outcomes, by the names of a setting.

Owns reverse KL and Jensen-Shannon; the forward KL under every tail policy is row_loss.py's own. With the tail `sketch`
the outcomes are the ids of the vocabulary, with `ghost` the stored ids and one bucket for the rest, P = (p_S, t) and
Q = (q_S, 1 - Q_S). Merging outcomes never raises either of them (data processing inequality), so with `ghost` each is
a lower bound of its full-vocabulary self, with equality for k = V.

For a divergence of Q with derivative f_b = dD/dQ_b, the gradient is T dD/dz_j = q_j (f_b(j) - sum_b Q_b f_b): with a
bucket it is exact on the stored ids; in the rest it moves the bucket as a whole and leaves its shape to the student.

| divergence | D                                        | f_b, up to a constant      |
|------------|------------------------------------------|----------------------------|
| reverse    | KL(Q || P), with a bucket at most 88 nats an outcome | log Q_b - log P_b |
| js         | KL(P || M) / 2 + KL(Q || M) / 2, M the mean, at most log 2 | (log Q_b - log M_b) / 2    |

A teacher's probability of 0 counts as the smallest normal number (1e-38 in float32): the reverse KL stays finite. So
does a sketched tail's mass, before it is spread.

Loads no torch: the choices of a setting are read from here. row_kernel.py has each of them once more, for a GPU, on
the outcomes of a bucket.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def _reverse(log_p: "Tensor", log_q: "Tensor", p: "Tensor", q: "Tensor") -> tuple["Tensor", "Tensor"]:
    score = log_q - log_p
    return (q * score).sum(1), score


def _jensen_shannon(log_p: "Tensor", log_q: "Tensor", p: "Tensor", q: "Tensor") -> tuple["Tensor", "Tensor"]:
    log_mean = log_p.logaddexp(log_q) - math.log(2)
    score = (log_q - log_mean) / 2
    return (p * (log_p - log_mean)).sum(1) / 2 + (q * score).sum(1), score


OUTCOME_DIVERGENCES: dict[str, Callable[["Tensor", "Tensor", "Tensor", "Tensor"], tuple["Tensor", "Tensor"]]] = {
    "reverse": _reverse,
    "js": _jensen_shannon,
}
"""The divergence of every row and f of every outcome, from log P, log Q, P and Q: [N, outcomes]."""

DIVERGENCES = ("forward", *OUTCOME_DIVERGENCES)
