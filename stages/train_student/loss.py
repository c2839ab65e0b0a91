"""The loss of stage two: cross-entropy and sparse distillation over the student's LM head.

Owns the public function, its checks and which tokens take part. fused_head.py computes value and gradient chunk by
chunk, row_loss.py has the maths of a row, row_targets.py the teacher's side and the tail policies.

Shapes: N tokens of a flattened batch, M of them target tokens, K stored entries of a token, V the vocabulary,
H hidden size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train_student.divergences import DIVERGENCES
from stages.train_student.fused_head import (
    DEFAULT_CHUNK_BYTES,
    FusedHead,
    HeadSettings,
    TargetTokens,
    loss_dtype,
    product_dtype,
)
from stages.train_student.row_targets import DRAWN_TAILS, TAIL_POLICIES, check_shapes, make_row_targets

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""Of hidden states and head. float16 lacks the range for the gradient of a uniform tail at the mean of a batch."""


class DistillationLoss(NamedTuple):
    """Scalars of one batch, float32 (float64 for float64 inputs); sums over target tokens / number of target tokens."""

    loss: Tensor
    """(1 - alpha) cross_entropy + alpha T^2 kl; the only one with a gradient."""
    cross_entropy: Tensor
    """-log softmax(z)[label] in nats, detached."""
    kl: Tensor
    """The divergence of p_T and q_T in nats under the tail policy, not times T^2, detached; nan without targets."""


def fused_distillation_loss(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    labels_N: Tensor,
    ids_NK: Tensor | None,
    probs_NK: Tensor | None,
    tail_mass_N: Tensor | None,
    alpha: float = 0.5,
    temperature: float = 2.0,
    tail: str = "ghost",
    ignore_index: int = -100,
    *,
    num_target_tokens: int | float | Tensor | None = None,
    chunk_bytes: int | None = None,
    vocab_size: int | None = None,
    teacher_entropy_N: Tensor | None = None,
    divergence: str = "forward",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> DistillationLoss:
    """(1 - alpha) CE + alpha T^2 KL(p_T || q_T) of a student whose logits are hidden_NH @ head_weight_VH.T.

    Row i of `hidden_NH` pairs with `labels_N[i]` and with the targets of row i: the labels are already shifted.
    q_T = softmax(logits / T); `probs_NK` is the teacher's p_T = softmax(teacher_logits / T) over the whole
    vocabulary, at `ids_NK` alone, and `tail_mass_N` the rest of it (Hinton et al., arXiv 1503.02531, eq. 1 and
    section 2.1 for T^2; row_targets.py has the formula of every `tail`). Ids are unique in a row; padding repeats
    slot 0 with probability 0. Without targets, all three None, alpha must be 0.

    With the tail "hybrid" the entries are the top k and draws from the tail that weigh tail mass / D each; the
    gradient is then an unbiased estimate of the full one; "sampled" is the same with draws alone. `teacher_entropy_N`, the full entropy of p_T in nats,
    makes the reported KL one too; it changes no gradient and goes with no other tail.

    `divergence` "reverse" takes KL(q_T || p_T) in the place of KL(p_T || q_T), "js" their Jensen-Shannon divergence, both
    with a ghost tail alone: they are defined on the stored ids and one bucket (divergences.py).

    `logit_scale` multiplies the logits (Cohere, Granite), `logit_softcap` c then makes them c tanh(logits / c) (Gemma 2).
    `adapter` is a low-rank update of the head, ([N, R] and [V, R]) in place of (hidden_NH @ A.T, B): their product is
    added to the logits, in both gradients as in the values; a frozen head costs no gradient.

    Rows whose label is `ignore_index` cost nothing, have a zero gradient and may hold anything as targets.
    Sums over the others are divided by `num_target_tokens`, by default their number in this call. Give the number
    of the whole step and the results of its micro-batches add up to those of one batch.

    Only the first `vocab_size` rows of the head are real; the others are padding, take no part in any softmax and
    have a zero gradient. `chunk_bytes` bounds the float32 logits held at a time (256 MiB on a CPU, 1 GiB on a GPU).

    Logits, softmaxes and sums over tokens are float32 for bfloat16 inputs, and so is the head's gradient until it is
    handed over in the weight's dtype. Raises ValueError for inputs that do not fit; a second backward without
    retain_graph and any backward with create_graph are RuntimeErrors.
    """
    vocab_size = head_weight_VH.shape[0] if vocab_size is None else vocab_size
    has_targets = _has_targets(ids_NK, probs_NK, tail_mass_N)
    _check_settings(alpha, temperature, tail, chunk_bytes, has_targets)
    _check_logits(divergence, tail, logit_scale, logit_softcap)
    _check_student(hidden_NH, head_weight_VH, labels_N, vocab_size)
    rows_M = (labels_N != ignore_index).nonzero().squeeze(1)
    labels_M = labels_N[rows_M].long()
    _check_labels(labels_M, vocab_size, ignore_index)
    targets = None
    if has_targets:
        check_shapes(ids_NK, probs_NK, tail_mass_N, len(labels_N), hidden_NH.device)
        dtype = loss_dtype(hidden_NH)
        ids_MK, probs_MK, tail_mass_M = ids_NK[rows_M].long(), probs_NK[rows_M].to(dtype), tail_mass_N[rows_M].to(dtype)
        targets = make_row_targets(ids_MK, probs_MK, tail_mass_M, tail, vocab_size)
        if teacher_entropy_N is not None:
            _check_entropy(teacher_entropy_N, tail, len(labels_N))
            targets = targets._replace(entropy_term_N=-teacher_entropy_N[rows_M].to(dtype))
    factors = (hidden_NH, head_weight_VH) if adapter is None else (hidden_NH, head_weight_VH, *adapter)
    if adapter is not None:
        _check_adapter(adapter, hidden_NH, head_weight_VH)
    settings = HeadSettings(
        alpha=float(alpha),
        temperature=float(temperature),
        denominator=_denominator(num_target_tokens, len(rows_M)),
        vocab_size=vocab_size,
        chunk_bytes=chunk_bytes or DEFAULT_CHUNK_BYTES[hidden_NH.device.type],
        product_dtype=product_dtype(hidden_NH),
        divergence=divergence,
        logit_scale=float(logit_scale),
        logit_softcap=logit_softcap,
        needs_grad=tuple(torch.is_grad_enabled() and factor.requires_grad for factor in factors),
    )
    return DistillationLoss(*FusedHead.apply(TargetTokens(rows_M, labels_M, targets), settings, *factors))


def _has_targets(*targets: Tensor | None) -> bool:
    num_given = sum(target is not None for target in targets)
    if num_given not in (0, len(targets)):
        raise ValueError(
            f"ids_NK, probs_NK and tail_mass_N: {num_given} of 3 given, expected all of them, or none at alpha 0."
        )
    return num_given > 0


def _check_entropy(teacher_entropy_N: Tensor, tail: str, num_tokens: int) -> None:
    if tail not in DRAWN_TAILS or teacher_entropy_N.shape != (num_tokens,):
        raise ValueError(
            f"teacher_entropy_N: shape {tuple(teacher_entropy_N.shape)} with tail {tail!r}, "
            f"expected ({num_tokens},) with a tail of draws: {' or '.join(DRAWN_TAILS)}."
        )


def _denominator(num_target_tokens: int | float | Tensor | None, num_targets: int) -> float:
    if num_target_tokens is None:
        return float(max(1, num_targets))
    denominator = float(num_target_tokens)
    if num_targets > 0 and not (denominator > 0 and math.isfinite(denominator)):
        raise ValueError(
            f"num_target_tokens: {denominator:g} with {num_targets} target tokens in this call, expected a positive "
            "number; give the number of target tokens of the whole step."
        )
    return denominator if denominator > 0 else 1.0


def _check_settings(alpha: float, temperature: float, tail: str, chunk_bytes: int | None, has_targets: bool) -> None:
    if tail not in TAIL_POLICIES:
        raise ValueError(f"tail: {tail!r}, choose one of: {', '.join(TAIL_POLICIES)}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha}, expected a weight of the KL from 0 to 1.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: {temperature}, expected a positive number.")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: {chunk_bytes}, expected a positive number of bytes.")
    if alpha > 0 and not has_targets:
        raise ValueError(f"alpha: {alpha} without targets, expected 0; give all of ids_NK, probs_NK and tail_mass_N.")


def _check_logits(divergence: str, tail: str, logit_scale: float, logit_softcap: float | None) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: {divergence!r}, choose one of: {', '.join(DIVERGENCES)}.")
    if divergence != "forward" and tail != "ghost":
        raise ValueError(f"divergence: {divergence!r} with tail {tail!r}, expected tail 'ghost': it needs a whole p_T.")
    for name, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: {value}, expected a positive number.")


def _check_adapter(adapter: tuple[Tensor, Tensor], hidden_NH: Tensor, head_weight_VH: Tensor) -> None:
    hidden_NR, weight_VR = adapter
    expected = (len(hidden_NH), len(head_weight_VH), hidden_NR.shape[-1])
    if hidden_NR.ndim != 2 or weight_VR.ndim != 2 or (len(hidden_NR), *weight_VR.shape) != expected:
        raise ValueError(
            f"adapter: shapes {tuple(hidden_NR.shape)} and {tuple(weight_VR.shape)}; expected "
            f"({len(hidden_NH)}, R) and ({len(head_weight_VH)}, R)."
        )


def _check_student(hidden_NH: Tensor, head_weight_VH: Tensor, labels_N: Tensor, vocab_size: int) -> None:
    if hidden_NH.ndim != 2 or head_weight_VH.ndim != 2 or hidden_NH.shape[1] != head_weight_VH.shape[1]:
        raise ValueError(
            f"hidden_NH: shape {tuple(hidden_NH.shape)}, head_weight_VH: shape {tuple(head_weight_VH.shape)}; "
            "expected (N, H) and (V, H): flatten the batch, and give the head of this student."
        )
    if labels_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"labels_N: shape {tuple(labels_N.shape)}, expected ({len(hidden_NH)},) as hidden_NH.")
    if labels_N.is_floating_point() or labels_N.dtype == torch.bool:
        raise ValueError(f"labels_N: dtype {labels_N.dtype}, expected an integer dtype.")
    for name, tensor in (("head_weight_VH", head_weight_VH), ("labels_N", labels_N)):
        if tensor.device != hidden_NH.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {hidden_NH.device} as hidden_NH; move it there.")
    if hidden_NH.device.type not in DEFAULT_CHUNK_BYTES:
        raise ValueError(f"hidden_NH: on {hidden_NH.device}, choose one of: {', '.join(DEFAULT_CHUNK_BYTES)}.")
    _check_dtypes(hidden_NH, head_weight_VH)
    if not 1 <= vocab_size <= len(head_weight_VH):
        raise ValueError(f"vocab_size: {vocab_size}, expected 1 to {len(head_weight_VH)}, the rows of head_weight_VH.")


def _check_dtypes(hidden_NH: Tensor, head_weight_VH: Tensor) -> None:
    for name, tensor in (("hidden_NH", hidden_NH), ("head_weight_VH", head_weight_VH)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}, choose one of: {', '.join(map(str, DTYPES))}.")
    autocast = torch.is_autocast_enabled(hidden_NH.device.type)
    if hidden_NH.dtype != head_weight_VH.dtype and not autocast:
        raise ValueError(
            f"hidden_NH: dtype {hidden_NH.dtype}, head_weight_VH: dtype {head_weight_VH.dtype}; "
            "expected the same outside of autocast: cast one of them."
        )


def _check_labels(labels_M: Tensor, vocab_size: int, ignore_index: int) -> None:
    if len(labels_M) == 0:
        return
    smallest, largest = (int(bound) for bound in labels_M.aminmax())
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"labels_N: holds ids from {smallest} to {largest}, expected 0 to {vocab_size - 1}, or {ignore_index} for "
            "positions without a loss."
        )
