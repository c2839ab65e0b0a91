"""Cross-entropy, KL and their gradient for a block of rows of logits, in place.

Owns the maths of a row. Knows nothing of heads, chunks or autograd.

Shapes: N rows, K stored entries of a row, V the real vocabulary. `_N1` columns broadcast over V or K.

With Q the student's mass on the stored ids S, A and B the weights of the two gradients, and the weights
w, t, u and their total M from row_targets.py, the gradient of a row with respect to its logits z is

    A (softmax(z) - onehot(label)) + B (M q - w)                                  on S
    A (softmax(z) - onehot(label)) + B ((M (1 - Q) - t) softmax_rest(z/T) - u)    on the rest

The columns of S are taken out of the row first, so that every pass over V runs on the rest alone. That makes
1 - Q a sum of its own instead of a difference, which in float32 is noise once Q > 0.9999.

That is the forward KL. For another divergence (divergences.py) the two brackets after B are its pulls.

A sketch spreads t over the rest as r = softmax_rest(s/T) (tails.py). That adds t KL(r || q_rest) to the forward KL, and
makes the bracket of the rest M (1 - Q) softmax_rest(z/T) - t r; both terms are made of the rest alone. For another
divergence all ids are outcomes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stages.train_student.divergences import OUTCOME_DIVERGENCES
from stages.train_student.loss_settings import LossSettings
from stages.train_student.row_targets import RowTargets

_ABSENT = -1e30
"""Stands for the logit of what does not exist. Unlike -inf it stays finite under 0 * x, x - x and x / T."""


class _Rest(NamedTuple):
    """The columns that are not stored; both exponentials are relative to the maximum, hence both sums at least 1."""

    max_N1: Tensor
    exp_NV: Tensor
    """exp(z - max)"""
    softened_exp_NV: Tensor
    """exp((z - max) / T); the same tensor as `exp_NV` at T = 1."""
    exp_sum_N1: Tensor
    softened_exp_sum_N1: Tensor


class _Shape(NamedTuple):
    """How a sketch spreads a row's bucket over the columns that are not stored."""

    exp_NV: Tensor
    """exp(s/T - max); 0 in stored columns."""
    exp_sum_N1: Tensor
    cross_N1: Tensor
    """KL(r || q_rest) less the log of `softened_exp_sum_N1`, which is not known yet."""


class _Logprobs(NamedTuple):
    """A row of log softmax(z / T), where `shift` is the row's maximum of z."""

    entries_NK: Tensor
    rest_N1: Tensor
    """log(1 - Q)"""
    logsumexp_N1: Tensor
    """Of (z - shift) / T."""


def cross_entropy_rows_(logits_NV: Tensor, labels_N: Tensor, weight: float | None) -> Tensor:
    """Cross-entropy of every row in nats, [N]; `logits_NV` becomes `weight` times its gradient, or scratch if None."""
    labels_N1 = labels_N[:, None]
    max_N1 = logits_NV.amax(1, keepdim=True)
    label_logits_N1 = logits_NV.gather(1, labels_N1) - max_N1
    exp_sum_N1 = logits_NV.sub_(max_N1).exp_().sum(1, keepdim=True)
    if weight is not None:
        logits_NV.mul_(weight / exp_sum_N1)
        logits_NV.scatter_add_(1, labels_N1, torch.full_like(label_logits_N1, -weight))
    return (exp_sum_N1.log() - label_logits_N1).squeeze(1)


def distillation_rows_(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: RowTargets,
    settings: LossSettings,
    weights: tuple[float, float] | None,
    scratch_NV: Tensor,
    tail_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence D of p_T and q_T of every row in nats, both [N].

    With `weights` (A, B), `logits_NV` becomes A dCE/dz + B T dD/dz; without it is left as scratch.
    `scratch_NV` is overwritten and must not overlap the logits; so is `tail_NV`, the logits over T that the sketch of
    the targets makes, if they have one.
    """
    assert (tail_NV is None) == (targets.sketch is None)
    if tail_NV is not None and settings.divergence != "forward":
        return _whole_rows_(logits_NV, labels_N, targets, settings, weights, tail_NV)
    temperature = settings.temperature
    label_logits_N1 = logits_NV.gather(1, labels_N[:, None])
    entry_logits_NK = logits_NV.gather(1, targets.ids_NK)
    level = None
    if targets.level_N is not None:
        level = targets.level_N, logits_NV.scatter_(1, targets.ids_NK, 0.0).sum(1)
    logits_NV.scatter_(1, targets.ids_NK, float("-inf"))
    entry_logits_NK.masked_fill_(~targets.is_entry_NK, _ABSENT)
    max_N1 = _centre_(logits_NV)
    shape = None if tail_NV is None else _shape_(logits_NV, targets.ids_NK, temperature, tail_NV, scratch_NV)
    rest = _exponentiate_rest_(logits_NV, max_N1, temperature, scratch_NV)

    shift_N1 = torch.maximum(rest.max_N1, entry_logits_NK.amax(1, keepdim=True))
    entry_logits_NK -= shift_N1
    rest_max_N1 = rest.max_N1 - shift_N1
    hard = _logprobs(entry_logits_NK, rest_max_N1, rest.exp_sum_N1, 1.0)
    soft = _logprobs(entry_logits_NK, rest_max_N1, rest.softened_exp_sum_N1, temperature)
    cross_entropy_N = (hard.logsumexp_N1 - (label_logits_N1 - shift_N1)).squeeze(1)
    if settings.divergence == "forward":
        divergence_N, pulls = _kl_rows(targets, soft, level, shift_N1, temperature), _kl_pulls(targets, soft)
        if shape is not None:
            divergence_N += targets.bucket_N * (shape.cross_N1 + rest.softened_exp_sum_N1.log()).squeeze(1)
    else:
        divergence_N, pulls = bucket_divergence(settings.divergence, targets, soft.entries_NK, soft.rest_N1)
    if weights is not None:
        _gradient_rows_(logits_NV, labels_N, targets, rest, shape, hard, pulls, weights)
    return cross_entropy_N, divergence_N


def _whole_rows_(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: RowTargets,
    settings: LossSettings,
    weights: tuple[float, float] | None,
    tail_NV: Tensor,
) -> tuple[Tensor, Tensor]:
    """`distillation_rows_` of a divergence whose outcomes are all ids, given the sketch's logits over T."""
    log_p_NV = _log_probs_(tail_NV, targets)
    log_q_NV = torch.log_softmax(logits_NV / settings.temperature, 1)
    divergence_N, pull_NV = outcome_divergence(settings.divergence, log_p_NV, log_q_NV, log_p_NV.exp())
    cross_entropy_N = cross_entropy_rows_(logits_NV, labels_N, None if weights is None else weights[0])
    if weights is not None:
        logits_NV.add_(pull_NV, alpha=weights[1])
    return cross_entropy_N, divergence_N


def whole_log_probs(targets: RowTargets) -> Tensor:
    """log p_T of the whole vocabulary [N, V], of targets with a sketch: what is stored, and the bucket spread by it.

    A stored probability or a bucket of 0 counts as the smallest normal number.
    """
    assert targets.sketch is not None
    return _log_probs_(targets.sketch.logits(), targets)


def _log_probs_(tail_NV: Tensor, targets: RowTargets) -> Tensor:
    """The sketch's logits over T become `whole_log_probs`."""
    smallest = torch.finfo(tail_NV.dtype).tiny
    tail_NV.scatter_(1, targets.ids_NK, _ABSENT)
    bucket_N1 = targets.bucket_N[:, None].clamp_min(smallest)
    tail_NV += bucket_N1.log() - torch.logsumexp(tail_NV, 1, keepdim=True)
    entries_NK = targets.weights_NK.clamp_min(smallest).log()
    entries_NK = torch.where(targets.is_entry_NK, entries_NK, entries_NK[:, :1])  # padding writes slot 0 again
    return tail_NV.scatter_(1, targets.ids_NK, entries_NK)


def bucket_divergence(
    divergence: str, targets: RowTargets, entries_NK: Tensor, rest_N1: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The divergence in nats [N], and its pulls: T dD/dz on the entries [N, K], and summed over the rest [N, 1].

    Of a student with the given log-probabilities of entries and rest; padding has q = p = 0.
    """
    p = torch.cat([targets.weights_NK, targets.bucket_N[:, None]], 1)
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    divergence_N, pull = outcome_divergence(divergence, log_p, torch.cat([entries_NK, rest_N1], 1), p)
    return divergence_N, (pull[:, :-1], pull[:, -1:])


def outcome_divergence(divergence: str, log_p: Tensor, log_q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence in nats [N], and T dD/dz summed over each outcome."""
    q = log_q.exp()
    divergence_N, score = OUTCOME_DIVERGENCES[divergence](log_p, log_q, p, q)
    return divergence_N, q * (score - (q * score).sum(1, keepdim=True))


def _centre_(logits_NV: Tensor) -> Tensor:
    """Takes its maximum from a row whose stored columns are -inf, and returns it."""
    max_N1 = logits_NV.amax(1, keepdim=True).clamp_min_(_ABSENT)  # nothing is left where k = V
    logits_NV.sub_(max_N1)
    return max_N1


def _shape_(centred_NV: Tensor, ids_NK: Tensor, temperature: float, tail_NV: Tensor, scratch_NV: Tensor) -> _Shape:
    """Of the student's centred logits and the sketch's over T, which become exponentials; the scratch is lost."""
    tail_NV.scatter_(1, ids_NK, float("-inf"))
    _centre_(tail_NV)
    differences_NV = torch.add(tail_NV, centred_NV, alpha=-1.0 / temperature, out=scratch_NV)
    differences_NV.scatter_(1, ids_NK, 0.0)  # both were -inf
    exp_sum_N1 = tail_NV.exp_().sum(1, keepdim=True).clamp_min_(1.0)
    cross_N1 = differences_NV.mul_(tail_NV).sum(1, keepdim=True) / exp_sum_N1 - exp_sum_N1.log()
    return _Shape(tail_NV, exp_sum_N1, cross_N1)


def _exponentiate_rest_(logits_NV: Tensor, max_N1: Tensor, temperature: float, scratch_NV: Tensor) -> _Rest:
    """Both exponentials of a centred row, one in the place of the logits, the other in the scratch."""
    if temperature == 1.0:
        exp_NV = softened_exp_NV = logits_NV.exp_()
    elif temperature == 2.0:  # one exponential instead of two
        softened_exp_NV = logits_NV.mul_(0.5).exp_()
        exp_NV = torch.mul(softened_exp_NV, softened_exp_NV, out=scratch_NV)
    else:
        softened_exp_NV = torch.mul(logits_NV, 1.0 / temperature, out=scratch_NV).exp_()
        exp_NV = logits_NV.exp_()
    exp_sum_N1 = exp_NV.sum(1, keepdim=True).clamp_min_(1.0)
    softened_exp_sum_N1 = exp_sum_N1
    if temperature != 1.0:
        softened_exp_sum_N1 = softened_exp_NV.sum(1, keepdim=True).clamp_min_(1.0)
    return _Rest(max_N1, exp_NV, softened_exp_NV, exp_sum_N1, softened_exp_sum_N1)


def _logprobs(entry_logits_NK: Tensor, rest_max_N1: Tensor, rest_exp_sum_N1: Tensor, temperature: float) -> _Logprobs:
    entries_NK = entry_logits_NK / temperature
    rest_N1 = rest_max_N1 / temperature + rest_exp_sum_N1.log()
    logsumexp_N1 = torch.logaddexp(rest_N1, torch.logsumexp(entries_NK, 1, keepdim=True))
    return _Logprobs(entries_NK - logsumexp_N1, rest_N1 - logsumexp_N1, logsumexp_N1)


def _kl_rows(
    targets: RowTargets, soft: _Logprobs, level: tuple[Tensor, Tensor] | None, shift_N1: Tensor, temperature: float
) -> Tensor:
    """The formula of row_targets.py; `level` is its u and the sum of the unstored logits, both [N]."""
    kl_N = targets.entropy_term_N - (targets.weights_NK * soft.entries_NK).sum(1)
    kl_N -= targets.bucket_N * soft.rest_N1.squeeze(1)
    if level is not None:
        level_N, rest_sum_N = level
        normaliser_N = (shift_N1 / temperature + soft.logsumexp_N1).squeeze(1)
        kl_N -= level_N * (rest_sum_N / temperature - targets.num_rest_N * normaliser_N)
    return kl_N


def _kl_pulls(targets: RowTargets, soft: _Logprobs) -> tuple[Tensor, Tensor]:
    """T dKL/dz on the entries [N, K], and summed over the rest [N, 1] (less its level, and a bucket with a shape)."""
    total_N1 = targets.total_N[:, None]
    entries_NK = total_N1 * soft.entries_NK.exp() - targets.weights_NK
    rest_N1 = total_N1 * soft.rest_N1.exp()
    return entries_NK, rest_N1 if targets.sketch is not None else rest_N1 - targets.bucket_N[:, None]


def _gradient_rows_(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: RowTargets,
    rest: _Rest,
    shape: _Shape | None,
    hard: _Logprobs,
    pulls: tuple[Tensor, Tensor],
    weights: tuple[float, float],
) -> None:
    """Writes the gradient of the module's formula over `logits_NV`, which is one of the exponentials of `rest`."""
    hard_weight, soft_weight = weights
    entry_pulls_NK, rest_pull_N1 = pulls
    hard_scale_N1 = hard_weight * hard.rest_N1.exp() / rest.exp_sum_N1
    soft_scale_N1 = soft_weight * rest_pull_N1 / rest.softened_exp_sum_N1
    if rest.exp_NV is rest.softened_exp_NV:
        logits_NV.mul_(hard_scale_N1 + soft_scale_N1)
    else:
        torch.addcmul(rest.exp_NV.mul_(hard_scale_N1), rest.softened_exp_NV, soft_scale_N1, out=logits_NV)
    if targets.level_N is not None:
        logits_NV.sub_(soft_weight * targets.level_N[:, None])
    if shape is not None:
        logits_NV.addcmul_(shape.exp_NV, -soft_weight * targets.bucket_N[:, None] / shape.exp_sum_N1)

    entries_NK = hard_weight * hard.entries_NK.exp()
    entries_NK += soft_weight * entry_pulls_NK
    entries_NK = torch.where(targets.is_entry_NK, entries_NK, entries_NK[:, :1])  # padding writes slot 0 again
    logits_NV.scatter_(1, targets.ids_NK, entries_NK)
    labels_N1 = labels_N[:, None]
    logits_NV.scatter_add_(1, labels_N1, torch.full_like(labels_N1, -hard_weight, dtype=logits_NV.dtype))
