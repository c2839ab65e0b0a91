"""Fitting a tail sketch to a teacher: principal components first, then gradients of what counts.

The start is a principal-component analysis of the last hidden states in the metric of the centred head, its rows
weighted by the mean probability that they have outside the stored ids: the directions of h along which tails differ.
From there basis, offset and encoder move against

    sum over T of tail mass * KL(p_T || p-hat_T), both outside the top k and normalised there

by Adam on batches of the sample. A part of the sample is left out, and the errors in the record are measured on it,
coefficients rounded as they will be.

Shapes: N positions, V vocabulary, R coefficients, H hidden size, K stored entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.progress import Progress
from pipeline.sketch import FittedSketch, SketchEncoder, SketchRecord, TailSketch
from stages.cache_logits.sketching import RowSketch, capped, tail_errors

CHECKED_SHARE = 0.2
"""Of the sample: not fitted to."""
CHECKED_ROWS = 1024
"""At most."""
WEIGHT_ROWS = 512
"""From which the mean tail is estimated."""
STEPS, BATCH_ROWS, LEARNING_RATE = 200, 128, 0.05
"""Of Adam. The rate is in nats of a logit a step: basis and offset are in nats, the encoder is scaled to them."""
ROWS = 64
"""Whose logits exist at a time where no gradient is taken."""
COARSEST, FINER, FINEST = 4.0, 0.7, 2.0**-6
"""Steps of the coefficients that are tried, in units of an estimate: from the first to the last, by factors."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A teacher's head as its engine computes it: logits are weight h + bias, then capped."""

    weight_VH: Tensor
    """float32"""
    bias_V: Tensor
    """float32"""
    softcap: float | None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, V]"""
        return capped(hidden_NH @ self.weight_VH.T + self.bias_V, self.softcap)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a sketch is asked for."""

    rank: int
    top_k: int
    temperatures: tuple[float, ...]
    max_error: float
    """Bound on what the rounding of the coefficients adds to the mean KL, nats, at every T."""


def fit_sketch(hidden_NH: Tensor, head: Head, wanted: Wanted, progress: Progress, seed: int = 0) -> FittedSketch:
    """The sketch of the teacher's tails at float32 hidden states of a sample of its positions.

    Deterministic on one machine. Raises ValueError for a rank above the hidden size or a sample below twice the rank.
    """
    num_rows, width = hidden_NH.shape
    if not 0 < wanted.rank <= width or num_rows < 2 * wanted.rank + 2:
        raise ValueError(f"a sketch of rank {wanted.rank} from {num_rows} hidden states of {width} values")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_rows, generator=generator)
    num_checked = max(1, min(CHECKED_ROWS, round(CHECKED_SHARE * num_rows)))
    checked_NH, fitted_NH = hidden_NH[order[:num_checked]], hidden_NH[order[num_checked:]]
    raw = _principal(fitted_NH, head, _mean_tail(fitted_NH[:WEIGHT_ROWS], head, wanted), wanted.rank)
    raw = _refined(raw, fitted_NH, head, wanted, generator, progress)
    sketch, errors, rounding = _rounded(raw, checked_NH, head, wanted)
    record = SketchRecord(
        top_k=wanted.top_k,
        temperatures=wanted.temperatures,
        num_fitted=len(fitted_NH),
        num_checked=num_checked,
        mean_kl=tuple(errors),
        mean_kl_of_rounding=tuple(rounding),
        softcap=head.softcap,
    )
    decoder = TailSketch(offset=sketch.offset_V.numpy(), basis=sketch.basis_VR.numpy(), softcap=head.softcap)
    encoder = SketchEncoder(mean=sketch.mean_H.numpy(), encoder=sketch.encoder_RH.numpy())
    return FittedSketch(decoder=decoder, encoder=encoder, record=record)


def _mean_tail(hidden_NH: Tensor, head: Head, wanted: Wanted) -> Tensor:
    """float64 [V], adding up to 1: the mean probability of every id outside the stored ones, at the warmest T."""
    weights_V = torch.zeros(len(head.weight_VH), dtype=torch.float64)
    for rows_NH in hidden_NH.split(ROWS):
        logits_NV = head.logits(rows_NH) / max(wanted.temperatures)
        ids_NK = logits_NV.topk(wanted.top_k, 1).indices
        weights_V += torch.softmax(logits_NV, 1).scatter(1, ids_NK, 0.0).sum(0).double()
    weights_V += 1e-6 * weights_V.sum() / len(weights_V)  # so that no id is without one
    return weights_V / weights_V.sum()


def _principal(hidden_NH: Tensor, head: Head, weights_V: Tensor, rank: int) -> RowSketch:
    """With G = sum of w (W - mean W)(W - mean W)^T = L L^T, the components U of L^T h: c = U^T L^T (h - mean)."""
    mean_H = hidden_NH.mean(0)
    centre_H = (weights_V.float() @ head.weight_VH).double()
    metric_HH = torch.zeros(len(centre_H), len(centre_H), dtype=torch.float64)
    for rows_VH, part_V in zip(head.weight_VH.split(4096), weights_V.split(4096)):
        apart_VH = (rows_VH - centre_H.float()) * part_V.sqrt().float()[:, None]
        metric_HH += (apart_VH.T @ apart_VH).double()
    metric_HH.diagonal().add_(1e-9 * metric_HH.trace() / len(metric_HH))
    factor_HH = torch.linalg.cholesky(metric_HH)
    turned_NH = (hidden_NH - mean_H) @ factor_HH.float()
    covariance_HH = (turned_NH.T @ turned_NH).double() / len(turned_NH)
    values, vectors = torch.linalg.eigh(covariance_HH)
    directions_HR = vectors[:, -rank:].flip(1)
    spread_R = values[-rank:].flip(0).clamp(min=1e-12).sqrt()
    encoder_RH = (factor_HH @ directions_HR / spread_R).T.float()  # coefficients of variance 1
    decoder_HR = (torch.linalg.solve(factor_HH.T, directions_HR) * spread_R).float()
    return RowSketch(
        mean_H=mean_H,
        encoder_RH=encoder_RH,
        offset_V=head.weight_VH @ mean_H + head.bias_V,
        basis_VR=(head.weight_VH - centre_H.float()) @ decoder_HR,
        softcap=head.softcap,
    )


def _refined(
    sketch: RowSketch, hidden_NH: Tensor, head: Head, wanted: Wanted, generator: torch.Generator, progress: Progress
) -> RowSketch:
    scale = sketch.encoder_RH.abs().mean().item()
    moved = {
        "offset_V": sketch.offset_V.clone().requires_grad_(),
        "basis_VR": sketch.basis_VR.clone().requires_grad_(),
        "encoder_RH": (sketch.encoder_RH / scale).requires_grad_(),
    }
    optimizer = torch.optim.Adam(moved.values(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    with torch.enable_grad():
        for _ in range(STEPS):
            rows_NH = hidden_NH[torch.randint(len(hidden_NH), (BATCH_ROWS,), generator=generator)]
            with torch.no_grad():
                logits_NV = head.logits(rows_NH)
                ids_NK = logits_NV.topk(wanted.top_k, 1).indices
            coefficients_NR = (rows_NH - sketch.mean_H) @ (moved["encoder_RH"] * scale).T
            sketched_NV = capped(torch.addmm(moved["offset_V"], coefficients_NR, moved["basis_VR"].T), sketch.softcap)
            loss = _tail_loss(logits_NV, sketched_NV, ids_NK, wanted.temperatures)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(1, f"{loss.item():.3f} nats")
    found = {name: values.detach() for name, values in moved.items()}
    return RowSketch(
        mean_H=sketch.mean_H,
        encoder_RH=found["encoder_RH"] * scale,
        offset_V=found["offset_V"],
        basis_VR=found["basis_VR"],
        softcap=sketch.softcap,
    )


def _tail_loss(logits_NV: Tensor, sketched_NV: Tensor, ids_NK: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """The mean of `tail_errors` over rows and T, with what is needed for its gradient alone."""
    total = torch.zeros(())
    for temperature in temperatures:
        probs_NV = torch.softmax(logits_NV / temperature, 1).scatter(1, ids_NK, 0.0)
        tail_N = torch.logsumexp((sketched_NV / temperature).scatter(1, ids_NK, -torch.inf), 1)
        mass_N = probs_NV.sum(1)
        cross_N = mass_N * tail_N.nan_to_num(0.0, neginf=0.0) - (probs_NV * sketched_NV).sum(1) / temperature
        with torch.no_grad():
            own_N = torch.xlogy(probs_NV, probs_NV / mass_N.clamp(min=1e-30)[:, None]).sum(1)
        total = total + (cross_N + own_N).mean()
    return total / len(temperatures)


def _rounded(
    sketch: RowSketch, checked_NH: Tensor, head: Head, wanted: Wanted
) -> tuple[RowSketch, list[float], list[float]]:
    """The sketch by whose integers the bound holds, its errors, and what of them rounding has added.

    An error of variance step^2 / 12 in a coefficient costs about half of its variance under the tail's distribution:
    the steps of all coefficients cost the same, and become finer until what is measured is within the bound.
    """
    weights_V = _mean_tail(checked_NH[:WEIGHT_ROWS], head, wanted).float()
    apart_VR = sketch.basis_VR - weights_V @ sketch.basis_VR
    spread_R = (weights_V @ apart_VR.square()).clamp(min=1e-12).sqrt()
    steps_R = math.sqrt(24 * wanted.max_error / wanted.rank) * min(wanted.temperatures) / spread_R
    exact = _errors(sketch, checked_NH, head, wanted, sketch.coefficients)
    factor = COARSEST
    while True:
        scaled = RowSketch(
            mean_H=sketch.mean_H,
            encoder_RH=sketch.encoder_RH / (factor * steps_R)[:, None],
            offset_V=sketch.offset_V,
            basis_VR=(sketch.basis_VR * (factor * steps_R)).half().float(),  # as it is stored
            softcap=sketch.softcap,
        )
        errors = _errors(scaled, checked_NH, head, wanted, scaled.levels)
        added = errors - exact
        if (added <= wanted.max_error).all() or factor < FINEST:
            return scaled, errors.tolist(), added.tolist()
        factor *= FINER


def _errors(
    sketch: RowSketch, hidden_NH: Tensor, head: Head, wanted: Wanted, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """float64 [T]: means of `tail_errors`."""
    total = torch.zeros(len(wanted.temperatures), dtype=torch.float64)
    for rows_NH in hidden_NH.split(ROWS):
        logits_NV = head.logits(rows_NH)
        ids_NK = logits_NV.topk(wanted.top_k, 1).indices
        sketched_NV = sketch.logits(encode(rows_NH))
        total += tail_errors(logits_NV, sketched_NV, ids_NK, wanted.temperatures).double().sum(0)
    return total / len(hidden_NH)
