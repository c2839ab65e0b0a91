"""The loss of stage two: cross-entropy and sparse distillation over the student's LM head.

Owns the two public functions and their checks: `fused_distillation_loss` for tensors of any origin, with every check,
and `distillation_loss` for targets whose values were looked at where they were made. fused_head.py computes value and
gradient chunk by chunk, row_loss.py has the maths of a row, row_targets.py the teacher's side, tails.py the policies.

Shapes: N tokens of a flattened batch, M of them target tokens, K stored entries of a token, V the vocabulary,
H hidden size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train_student.fused_head import DEFAULT_CHUNK_BYTES, FusedHead, HeadStep, loss_dtype, product_dtype
from stages.train_student.loss_settings import LossSettings, require_alpha
from stages.train_student.row_targets import make_row_targets
from stages.train_student.sketch import SketchHead
from stages.train_student.tails import DRAWN_TAILS, TAILS
from stages.train_student.targets import DistillationTargets, TeacherTargets, require_values

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
    coefficients_NR: Tensor | None = None,
    sketch: SketchHead | None = None,
) -> DistillationLoss:
    """(1 - alpha) CE + alpha T^2 KL(p_T || q_T) of a student whose logits are hidden_NH @ head_weight_VH.T.

    Row i of `hidden_NH` pairs with `labels_N[i]` and with the targets of row i: the labels are already shifted.
    q_T = softmax(logits / T); `probs_NK` is the teacher's p_T = softmax(teacher_logits / T) over the whole
    vocabulary, at `ids_NK` alone, and `tail_mass_N` the rest of it (Hinton et al., arXiv 1503.02531, eq. 1 and
    section 2.1 for T^2; row_targets.py has the formula of every `tail`). Ids are unique in a row; padding repeats
    slot 0 with probability 0. Without targets, all three None, alpha must be 0.

    With the tail "hybrid" the entries are the top k and draws from the tail that weigh tail mass / D each; the
    gradient is then an unbiased estimate of the full one; "sampled" is the same with draws alone. `teacher_entropy_N`,
    the full entropy of p_T in nats, makes the reported KL one too; it changes no gradient and goes with no other tail.

    With the tail "sketch" the tail's mass lies on the ids that are not stored in proportion to exp(s / T), where s are
    the logits that `sketch` (SketchHead.of) makes of `coefficients_NR`; both go with no other tail.

    `divergence` "reverse" takes KL(q_T || p_T) in the place of KL(p_T || q_T), "js" their Jensen-Shannon divergence:
    with the tail "ghost" on the stored ids and one bucket, with "sketch" on the whole vocabulary (divergences.py).

    `logit_scale` multiplies logits (Cohere, Granite), `logit_softcap` c then makes them c tanh(logits / c) (Gemma 2).
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
    settings = LossSettings(
        vocab_size=head_weight_VH.shape[0] if vocab_size is None else vocab_size,
        alpha=alpha,
        temperature=temperature,
        tail=tail,
        divergence=divergence,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )
    num_given = sum(target is not None for target in (ids_NK, probs_NK, tail_mass_N))
    if num_given not in (0, 3):
        raise ValueError(
            f"ids_NK, probs_NK and tail_mass_N: {num_given} of 3 given, expected all of them, or none at alpha 0."
        )
    teacher = None
    if ids_NK is not None and probs_NK is not None and tail_mass_N is not None:
        teacher = TeacherTargets(
            ids_MK=ids_NK,
            probs_MK=probs_NK,
            tail_mass_M=tail_mass_N,
            entropy_M=teacher_entropy_N,
            coefficients_MR=coefficients_NR,
            sketch=sketch,
        )
    targets = DistillationTargets(labels_M=labels_N, teacher=teacher)
    _check_student(hidden_NH, head_weight_VH, labels_N, settings.vocab_size)
    _check_teacher(targets.teacher, labels_N, settings)
    if adapter is not None:
        _check_adapter(adapter, hidden_NH, head_weight_VH)
    rows_M = (labels_N != ignore_index).nonzero().squeeze(1)
    if len(rows_M) < len(labels_N):
        hidden_NH, targets = hidden_NH.index_select(0, rows_M), targets.rows(rows_M)
        adapter = None if adapter is None else (adapter[0].index_select(0, rows_M), adapter[1])
    require_values(targets, settings.vocab_size, ignore_index)
    return distillation_loss(
        hidden_NH,
        head_weight_VH,
        targets,
        settings,
        num_target_tokens=None if num_target_tokens is None else float(num_target_tokens),
        chunk_bytes=chunk_bytes,
        adapter=adapter,
    )


def distillation_loss(
    hidden_MH: Tensor,
    head_weight_VH: Tensor,
    targets: DistillationTargets,
    settings: LossSettings,
    *,
    alpha: float | None = None,
    num_target_tokens: float | None = None,
    chunk_bytes: int | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    on_rows: Callable[[Tensor], None] | None = None,
) -> DistillationLoss:
    """`fused_distillation_loss` of target tokens alone, which never waits for the device.

    `targets.require_values` has looked at what they hold. `alpha` is that of the settings unless it is given. `on_rows`
    is told of the cross-entropy and the divergence of every target token, [2, M].
    """
    alpha = settings.alpha if alpha is None else alpha
    require_alpha(alpha)
    _check_student(hidden_MH, head_weight_VH, targets.labels_M, settings.vocab_size)
    _check_teacher(targets.teacher, targets.labels_M, settings)
    if alpha > 0 and targets.teacher is None:
        raise ValueError(f"alpha: {alpha} without targets, expected 0; give all of ids_NK, probs_NK and tail_mass_N.")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: {chunk_bytes}, expected a positive number of bytes.")
    if adapter is not None:
        _check_adapter(adapter, hidden_MH, head_weight_VH)
    factors = (hidden_MH, head_weight_VH, *(adapter or ()))
    step = HeadStep(
        settings=settings,
        alpha=float(alpha),
        denominator=_denominator(num_target_tokens, len(targets)),
        chunk_bytes=chunk_bytes or DEFAULT_CHUNK_BYTES[hidden_MH.device.type],
        product_dtype=product_dtype(hidden_MH),
        needs_grad=tuple(torch.is_grad_enabled() and factor.requires_grad for factor in factors),
        on_rows=on_rows,
    )
    teacher = targets.teacher
    rows = None if teacher is None else make_row_targets(teacher, settings, loss_dtype(hidden_MH))
    return DistillationLoss(*FusedHead.apply(targets.labels_M.long(), rows, step, *factors))


def _denominator(num_target_tokens: float | None, num_targets: int) -> float:
    if num_target_tokens is None:
        return float(max(1, num_targets))
    if num_targets > 0 and not (num_target_tokens > 0 and math.isfinite(num_target_tokens)):
        raise ValueError(
            f"num_target_tokens: {num_target_tokens:g} with {num_targets} target tokens in this call, expected a "
            "positive number; give the number of target tokens of the whole step."
        )
    return num_target_tokens if num_target_tokens > 0 else 1.0


def _check_teacher(teacher: TeacherTargets | None, labels_N: Tensor, settings: LossSettings) -> None:
    """Raises ValueError unless a teacher's shapes and types go with the labels, and all lie on the labels' device."""
    if teacher is None:
        return
    num_tokens, device = len(labels_N), labels_N.device
    ids, probs, tail_mass, entropy = teacher.ids_MK, teacher.probs_MK, teacher.tail_mass_M, teacher.entropy_M
    if ids.ndim != 2 or ids.shape[0] != num_tokens or ids.shape[1] == 0:
        raise ValueError(f"ids_NK: shape {tuple(ids.shape)}, expected ({num_tokens}, K) with K of at least 1.")
    if probs.shape != ids.shape:
        raise ValueError(f"probs_NK: shape {tuple(probs.shape)}, expected that of ids_NK, {tuple(ids.shape)}.")
    if tail_mass.shape != (num_tokens,):
        raise ValueError(f"tail_mass_N: shape {tuple(tail_mass.shape)}, expected ({num_tokens},).")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids_NK: dtype {ids.dtype}, expected an integer dtype.")
    for name, tensor in (("probs_NK", probs), ("tail_mass_N", tail_mass)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected a floating-point dtype.")
    for name, tensor in (("ids_NK", ids), ("probs_NK", probs), ("tail_mass_N", tail_mass)):
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, expected {device} as hidden_NH; move it there.")
    if entropy is not None and (settings.tail not in DRAWN_TAILS or entropy.shape != (num_tokens,)):
        raise ValueError(
            f"teacher_entropy_N: shape {tuple(entropy.shape)} with tail {settings.tail!r}, "
            f"expected ({num_tokens},) with a tail of draws: {' or '.join(DRAWN_TAILS)}."
        )
    _check_sketch(teacher, labels_N, settings)


def _check_sketch(teacher: TeacherTargets, labels_N: Tensor, settings: LossSettings) -> None:
    """Raises ValueError unless coefficients and sketch are there with a tail that is sketched alone, and fit."""
    coefficients, sketch = teacher.coefficients_MR, teacher.sketch
    is_sketched = TAILS[settings.tail].is_sketched
    for name, given in (("coefficients_NR", coefficients), ("sketch", sketch)):
        if (given is not None) != is_sketched:
            raise ValueError(
                f"{name}: {'none' if given is None else 'given'} with tail {settings.tail!r}, expected both "
                "coefficients_NR and sketch with tail 'sketch', and neither with another."
            )
    if coefficients is None or sketch is None:
        return
    if coefficients.shape != (len(labels_N), sketch.rank) or not coefficients.is_floating_point():
        raise ValueError(
            f"coefficients_NR: shape {tuple(coefficients.shape)}, dtype {coefficients.dtype}; expected "
            f"({len(labels_N)}, {sketch.rank}) as the sketch's rank, of a floating-point dtype."
        )
    if sketch.vocab_size < settings.vocab_size:
        raise ValueError(
            f"sketch: of a vocabulary of {sketch.vocab_size}, expected at least vocab_size, {settings.vocab_size}."
        )
    for name, tensor in (("coefficients_NR", coefficients), ("sketch", sketch.weight_SP)):
        if tensor.device != labels_N.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {labels_N.device} as hidden_NH; move it there.")


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
