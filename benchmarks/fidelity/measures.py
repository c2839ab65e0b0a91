"""What a student is measured by against a teacher that is wholly known, and how near one gradient is to another.

Full vocabulary, no bounds. Shapes: N target tokens, V vocabulary, B bins, H hidden size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15
TEMPERATURES = (1.0, 2.0)


class Direction(NamedTuple):
    """One gradient beside another."""

    degrees: float
    norm_ratio: float
    """Length of the first over that of the second."""
    norm: float
    """Length of the second."""
    error: float
    """Length of their difference."""


def kl_rows(teacher_logits_NV: Tensor, student_logits_NV: Tensor, temperature: float) -> Tensor:
    """[N] KL(p_T || q_T) over the full vocabulary, nats."""
    log_p_NV = torch.log_softmax(teacher_logits_NV / temperature, 1)
    log_q_NV = torch.log_softmax(student_logits_NV / temperature, 1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)


def acceptance_rows(teacher_logits_NV: Tensor, student_logits_NV: Tensor) -> Tensor:
    """[N] sum of min(p, q): how often speculative decoding takes a draft of the student (arXiv 2211.17192)."""
    return torch.minimum(torch.softmax(teacher_logits_NV, 1), torch.softmax(student_logits_NV, 1)).sum(1)


def calibration_sums(student_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """float64 [2, B]: by equal bins of the largest probability, its sum, and how often its id was the label."""
    confidence_N, best_N = torch.softmax(student_logits_NV, 1).max(1)
    bins_N = (confidence_N * BINS).long().clamp(max=BINS - 1)
    columns_2N = torch.stack([confidence_N.double(), (best_N == labels_N).double()])
    return columns_2N.new_zeros(2, BINS).index_add_(1, bins_N, columns_2N)


def calibration_error(sums_2B: Tensor, num_targets: int) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599)."""
    return float((sums_2B[0] - sums_2B[1]).abs().sum()) / num_targets


def measure_rows(teacher_logits_NV: Tensor, student_logits_NV: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """Sums over the rows, which add up over pieces of a held-out set; `finished` makes means of them."""
    logprobs_NV = torch.log_softmax(student_logits_NV, 1)
    sums = {
        "cross_entropy": -logprobs_NV.gather(1, labels_N[:, None]).double().sum(),
        "top1_agreement": (student_logits_NV.argmax(1) == teacher_logits_NV.argmax(1)).double().sum(),
        "acceptance": acceptance_rows(teacher_logits_NV, student_logits_NV).double().sum(),
        "calibration": calibration_sums(student_logits_NV, labels_N),
        "count": torch.tensor(float(len(labels_N))),
    }
    for temperature in TEMPERATURES:
        sums[f"kl_{temperature:g}"] = kl_rows(teacher_logits_NV, student_logits_NV, temperature).double().sum()
    return sums


def finished(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means over the target tokens."""
    count = sums["count"].item()
    means = {name: value.item() / count for name, value in sums.items() if name not in ("count", "calibration")}
    return means | {"calibration_error": calibration_error(sums["calibration"], int(count))}


def direction(gradient: Tensor, reference: Tensor) -> Direction:
    """Angle and lengths of two gradients of one shape."""
    one, other = gradient.flatten(), reference.flatten()
    lengths = one.norm().item(), other.norm().item()
    # From the difference of the unit vectors: the cosine of a small angle is 1 to rounding.
    half = ((one / lengths[0] - other / lengths[1]).norm().item() / 2) if all(lengths) else math.nan
    ratio = lengths[0] / lengths[1] if lengths[1] else math.nan
    return Direction(2 * math.degrees(math.asin(min(1.0, half))), ratio, lengths[1], (one - other).norm().item())
