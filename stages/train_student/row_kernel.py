"""The rows of row_loss.py in one Triton kernel: a program a row, two passes over its logits, nothing else of size V.

The same formulas and the same results as the torch path, which stays the reference; no atomics, no scratch. Loaded only
where triton is. The stored columns become -inf before the passes and get their gradient from registers after them, so
that both passes run over the rest alone, as in row_loss.py.

The gradient takes the place of the logits, also in a narrower dtype: the second pass has read a block, and every lane
of it, before it writes one, and what it writes ends where that block ends or before. So it costs 10 bytes a logit
instead of 18: two passes read 4, one writes 2, and no other kernel reads 4 and writes 2 to round.

The logits of a sketched tail, for the forward KL alone, are read in both passes: 8 bytes more, which an L2 cache holds
where they were written for a block of rows just before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.train_student.loss_settings import LossSettings
from stages.train_student.row_targets import RowTargets

BLOCK = 2048
"""Columns that a program holds at a time."""
VECTOR = 16
"""Triton reads vectors where strides and sizes are multiples of this."""
_ABSENT = tl.constexpr(-1e30)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _cap(logits, softcap):
    """softcap tanh(logits / softcap), from an exponential that cannot overflow."""
    shrunk = tl.exp(-2.0 * tl.abs(logits) / softcap)
    return softcap * tl.where(logits < 0, -1.0, 1.0) * (1.0 - shrunk) / (1.0 + shrunk)


@triton.jit
def _outcomes(log_p, log_q, p, q, DIVERGENCE: tl.constexpr):
    """What outcomes add to a bucket divergence, and its derivative dD/dQ up to a constant (divergences.py)."""
    if DIVERGENCE == "reverse":
        score = log_q - log_p
        return q * score, score
    else:
        tl.static_assert(DIVERGENCE == "js", "row_kernel.py does not know this divergence")
        larger = tl.maximum(log_p, log_q)
        log_mean = larger + tl.log(tl.exp(log_p - larger) + tl.exp(log_q - larger)) - 0.6931471805599453
        score = (log_q - log_mean) * 0.5
        return p * (log_p - log_mean) * 0.5 + q * score, score


@triton.jit
def _rows(
    logits_ptr, stride, gradient_ptr, gradient_stride, labels_ptr, ids_ptr, is_entry_ptr, weights_ptr, bucket_ptr,
    level_ptr, total_ptr, num_rest_ptr, entropy_ptr, tail_ptr, tail_stride, cross_entropy_ptr, divergence_ptr,
    hard_weight, soft_weight, inverse_T, softcap, V, width, K,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGETS: tl.constexpr, HAS_LEVEL: tl.constexpr,
    HAS_TAIL: tl.constexpr, DIVERGENCE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    gradient_ptr += row * gradient_stride
    label = tl.load(labels_ptr + row)
    raw_label = tl.load(logits_ptr + label)
    slots = tl.arange(0, SLOTS)
    if HAS_TARGETS:
        is_entry = tl.load(is_entry_ptr + row * K + slots, mask=slots < K, other=0) != 0
        ids = tl.load(ids_ptr + row * K + slots, mask=slots < K, other=0)
        w = tl.load(weights_ptr + row * K + slots, mask=is_entry, other=0.0)
        raw_entries = tl.load(logits_ptr + ids, mask=is_entry, other=0.0)
        bucket, total = tl.load(bucket_ptr + row), tl.load(total_ptr + row)
        tl.debug_barrier()  # every lane has read its entries
        tl.store(logits_ptr + ids, float("-inf"), mask=is_entry)
        tl.debug_barrier()

    if HAS_TAIL:
        tl.static_assert(DIVERGENCE == "forward", "row_kernel.py does not know this divergence with a sketch")
        tail_ptr += row * tail_stride
    largest, exp_sum, soft_exp_sum, rest_sum = -1e30, 0.0, 0.0, 0.0
    tail_largest, tail_sum, cross = -1e30, 0.0, 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + columns, mask=columns < width, other=0.0)
        raw = tl.where(columns < V, raw, float("-inf"))  # the mask alone would be no multiple of a vector
        z = raw
        if HAS_SOFTCAP:
            z = tl.where(raw == float("-inf"), raw, _cap(raw, softcap))
        new_largest = tl.maximum(largest, tl.max(z, 0))
        exp_sum = exp_sum * tl.exp(largest - new_largest) + tl.sum(tl.exp(z - new_largest), 0)
        if HAS_TARGETS:
            soft_exp_sum *= tl.exp((largest - new_largest) * inverse_T)
            soft_exp_sum += tl.sum(tl.exp((z - new_largest) * inverse_T), 0)
            if HAS_LEVEL:
                rest_sum += tl.sum(tl.where(z == float("-inf"), 0.0, z), 0)
            if HAS_TAIL:  # cross: sum of exp(s) (s - z / T), both relative to their maxima so far
                s = tl.load(tail_ptr + columns, mask=columns < width, other=0.0)
                s = tl.where(raw == float("-inf"), raw, s)
                new_tail_largest = tl.maximum(tail_largest, tl.max(s, 0))
                moved = (tail_largest - new_tail_largest) - (largest - new_largest) * inverse_T
                shrunk = tl.exp(tail_largest - new_tail_largest)
                differences = (s - new_tail_largest) - (z - new_largest) * inverse_T
                differences = tl.where(raw == float("-inf"), 0.0, differences)
                tail_exp = tl.exp(s - new_tail_largest)
                cross = (cross + tail_sum * moved) * shrunk + tl.sum(tail_exp * differences, 0)
                tail_sum = tail_sum * shrunk + tl.sum(tail_exp, 0)
                tail_largest = new_tail_largest
        largest = new_largest

    z_label = raw_label
    if HAS_SOFTCAP:
        z_label = _cap(raw_label, softcap)
    if HAS_TARGETS:
        z_entries = raw_entries
        if HAS_SOFTCAP:
            z_entries = _cap(raw_entries, softcap)
        z_entries = tl.where(is_entry, z_entries, _ABSENT)
        exp_sum, soft_exp_sum = tl.maximum(exp_sum, 1.0), tl.maximum(soft_exp_sum, 1.0)
        shift = tl.maximum(largest, tl.max(z_entries, 0))
        entries, rest = z_entries - shift, largest - shift
        all_sum = tl.exp(rest) * exp_sum + tl.sum(tl.exp(entries), 0)
        log_all = tl.log(all_sum)
        soft_log_all = tl.log(tl.exp(rest * inverse_T) * soft_exp_sum + tl.sum(tl.exp(entries * inverse_T), 0))
        log_q = entries * inverse_T - soft_log_all
        log_q_rest = rest * inverse_T + tl.log(soft_exp_sum) - soft_log_all
        q, q_rest = tl.exp(log_q), tl.exp(log_q_rest)
        tl.store(cross_entropy_ptr + row, log_all - (z_label - shift))
        level = 0.0
        if DIVERGENCE == "forward":
            value = tl.load(entropy_ptr + row) - tl.sum(w * log_q, 0) - bucket * log_q_rest
            if HAS_LEVEL:
                level = tl.load(level_ptr + row)
                normaliser = shift * inverse_T + soft_log_all
                value -= level * (rest_sum * inverse_T - tl.load(num_rest_ptr + row) * normaliser)
            pulls, rest_pull = total * q - w, total * q_rest
            if HAS_TAIL:
                tail_sum = tl.maximum(tail_sum, 1.0)
                value += bucket * (cross / tail_sum - tl.log(tail_sum) + tl.log(soft_exp_sum))
            else:
                rest_pull -= bucket
        else:
            log_p, log_p_rest = tl.log(tl.maximum(w, _TINY)), tl.log(tl.maximum(bucket, _TINY))
            shares, score = _outcomes(log_p, log_q, w, q, DIVERGENCE)
            rest_share, score_rest = _outcomes(log_p_rest, log_q_rest, bucket, q_rest, DIVERGENCE)
            value = tl.sum(shares, 0) + rest_share
            mean_score = tl.sum(q * score, 0) + q_rest * score_rest
            pulls, rest_pull = q * (score - mean_score), q_rest * (score_rest - mean_score)
        tl.store(divergence_ptr + row, value)
        hard_scale = hard_weight * tl.exp(rest - log_all)
        soft_scale = soft_weight * rest_pull / soft_exp_sum
        level = soft_weight * level
        tail_scale = soft_weight * bucket / tl.maximum(tail_sum, 1.0)
    else:
        tl.store(cross_entropy_ptr + row, largest + tl.log(exp_sum) - z_label)
        hard_scale = hard_weight / exp_sum

    if HAS_GRADIENT:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            raw = tl.load(logits_ptr + columns, mask=columns < width, other=0.0)
            raw = tl.where(columns < V, raw, float("-inf"))
            z, slope = raw, 1.0
            if HAS_SOFTCAP:
                z = tl.where(raw == float("-inf"), raw, _cap(raw, softcap))
                slope = tl.where(raw == float("-inf"), 0.0, 1.0 - (z / softcap) * (z / softcap))
            gradient = hard_scale * tl.exp(z - largest)
            if HAS_TARGETS:
                gradient += soft_scale * tl.exp((z - largest) * inverse_T) - level
            if HAS_TAIL:
                s = tl.load(tail_ptr + columns, mask=columns < width, other=0.0)
                s = tl.where(raw == float("-inf"), raw, s)
                gradient -= tail_scale * tl.exp(s - tail_largest)
            if gradient_ptr.dtype != logits_ptr.dtype:
                tl.debug_barrier()  # every lane has read this block: what is written lies in it and in those before
            tl.store(gradient_ptr + columns, gradient * slope, mask=columns < width)
        tl.debug_barrier()
        label_gradient = hard_scale * tl.exp(z_label - largest) - hard_weight
        if HAS_TARGETS:
            label_gradient += soft_scale * tl.exp((z_label - largest) * inverse_T) - level
            if HAS_TAIL:
                label_gradient -= tail_scale * tl.exp(tl.load(tail_ptr + label) - tail_largest)
            entry_gradients = hard_weight * tl.exp(entries - log_all) + soft_weight * pulls
            entry_gradients -= tl.where(ids == label, hard_weight, 0.0)
            if HAS_SOFTCAP:
                entry_gradients *= 1.0 - (z_entries / softcap) * (z_entries / softcap)
            tl.store(gradient_ptr + ids, entry_gradients, mask=is_entry)
            label_is_stored = tl.sum(tl.where(is_entry & (ids == label), 1, 0), 0) > 0
        else:
            label_is_stored = False
        if HAS_SOFTCAP:
            label_gradient *= 1.0 - (z_label / softcap) * (z_label / softcap)
        if not label_is_stored:
            tl.store(gradient_ptr + label, label_gradient)


def kernel_rows_(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: RowTargets | None,
    settings: LossSettings,
    weights: tuple[float, float] | None,
    gradient_NV: Tensor,
    tail_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and divergence of every row, as row_loss.py's functions after the soft cap; float32 logits.

    With `weights`, `gradient_NV` becomes the gradient of the loss with respect to the logits before the cap: the logits
    themselves, or a view in a narrower dtype of which every row begins where that of the logits does. What a row has
    behind its columns, up to the next, is overwritten. The second is None without targets.

    `tail_NV` are the logits over T that the sketch of the targets makes, if they have one; its rows are as far apart as
    those of the logits, and the divergence is the forward KL.
    """
    num_rows, vocab_size = logits_NV.shape
    hard_weight, soft_weight = weights or (0.0, 0.0)
    cross_entropy_N = logits_NV.new_empty(num_rows)
    divergence_N = logits_NV.new_empty(num_rows) if targets is not None else None
    unused = logits_NV
    fields = (unused,) * 8
    k, level_N = 1, None
    if targets is not None:
        k, level_N = targets.ids_NK.shape[1], targets.level_N
        assert (tail_NV is None) == (targets.sketch is None)
        fields = (
            *(targets.ids_NK.contiguous(), targets.is_entry_NK.contiguous(), targets.weights_NK.contiguous()),
            *(targets.bucket_N, unused if level_N is None else level_N, targets.total_N),
            *(targets.num_rest_N.float(), targets.entropy_term_N),
        )
    if num_rows == 0:
        return cross_entropy_N, divergence_N
    with torch.cuda.device_of(logits_NV):  # triton launches on the current device, wherever the tensors lie
        _rows[(num_rows,)](
            logits_NV,
            logits_NV.stride(0),
            gradient_NV,
            gradient_NV.stride(0),
            labels_N,
            *fields,
            unused if tail_NV is None else tail_NV,
            logits_NV.stride(0) if tail_NV is None else tail_NV.stride(0),
            cross_entropy_N,
            unused if divergence_N is None else divergence_N,
            hard_weight,
            soft_weight,
            1.0 / settings.temperature,
            settings.logit_softcap or 1.0,
            vocab_size,
            _width(logits_NV),
            k,
            SLOTS=triton.next_power_of_2(k),
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
            HAS_TARGETS=targets is not None,
            HAS_LEVEL=level_N is not None,
            HAS_TAIL=tail_NV is not None,
            DIVERGENCE=settings.divergence,
            HAS_SOFTCAP=settings.logit_softcap is not None,
            HAS_GRADIENT=weights is not None,
            num_warps=8,
        )
    return cross_entropy_N, divergence_N


def _width(logits_NV: Tensor) -> int:
    """Columns that are read and written: with so much of the padding behind a row that vectors come out even."""
    num_columns, stride = logits_NV.shape[1], logits_NV.stride(0)
    padded = -(-num_columns // VECTOR) * VECTOR
    return padded if stride % VECTOR == 0 and padded <= stride else num_columns
