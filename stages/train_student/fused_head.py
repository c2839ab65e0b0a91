"""LM head and loss in one autograd step: the [tokens, vocabulary] matrix never exists.

The gradient is computed in the forward: logits of a chunk of tokens, then the loss and its gradient row by row over
the same memory, two more matrix products, and on to the next chunk. The backward only scales what is already there.
Owns chunking, precision and autograd; knows no formula of a loss.

The logits are s times a sum of products, one a pair of factors: hidden states and head, and what a low-rank adapter
of the head makes of the hidden states and its second matrix. A soft cap c makes them c tanh(logits / c).

Shapes: N tokens of a flattened batch, M of them target tokens, C rows of a chunk, B rows of a block, V the
vocabulary, H hidden size (of an adapter's factors: its rank).
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train_student.row_loss import cross_entropy_rows_, distillation_rows_
from stages.train_student.row_targets import RowTargets

DEFAULT_CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Bytes of one chunk's logits. Every chunk reads and writes the head's whole gradient: few large ones are fast."""

BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Bytes of the logits that are turned into loss and gradient at a time: a cache on a CPU, few launches on a GPU."""


class TargetTokens(NamedTuple):
    """What the loss is computed on: the target tokens of a batch."""

    rows_M: Tensor
    """Their positions among the N tokens."""
    labels_M: Tensor
    targets: RowTargets | None

    def rows(self, rows: slice) -> "TargetTokens":
        """Some of the target tokens (views)."""
        targets = None if self.targets is None else self.targets.rows(rows)
        return TargetTokens(self.rows_M[rows], self.labels_M[rows], targets)


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the loss is weighted, and computed."""

    alpha: float
    temperature: float
    denominator: float
    """What sums over target tokens are divided by."""
    vocab_size: int
    chunk_bytes: int
    product_dtype: torch.dtype
    """What the three matrix products read."""
    divergence: str
    logit_scale: float
    logit_softcap: float | None
    needs_grad: tuple[bool, ...]
    """For every factor in the order of FusedHead.apply."""

    @property
    def row_weights(self) -> tuple[float, float] | None:
        """Factors of dCE/dz and of T dKL/dz in the gradient of the loss; None where no gradient is asked for."""
        if not any(self.needs_grad):
            return None
        return (1 - self.alpha) / self.denominator, self.alpha * self.temperature / self.denominator


@dataclass
class _Pair:
    """Two factors of the logits and their gradients, None where none is asked for."""

    hidden_NH: Tensor
    weight_VH: Tensor
    """Its real rows, in the dtype of the products."""
    grad_hidden_NH: Tensor | None
    grad_weight_VH: Tensor | None
    """In the dtype of the loss."""


class FusedHead(torch.autograd.Function):
    """loss, cross_entropy and kl; the gradient of the loss is complete when the forward returns.

    `factors` are hidden states [N, H] and head [V, H], then those of an adapter.
    """

    @staticmethod
    def forward(ctx, batch: TargetTokens, settings: HeadSettings, *factors: Tensor):
        with torch.autocast(factors[0].device.type, enabled=False):
            cross_entropy, kl, gradients = _loss_and_gradients(batch, settings, factors)
        loss = (1 - settings.alpha) * cross_entropy
        if settings.alpha > 0:
            loss = loss + settings.alpha * settings.temperature**2 * kl
        ctx.save_for_backward(*gradients)  # freed by the backward unless the graph is retained
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_distillation_loss: a backward with create_graph=True, expected first derivatives only; "
                "take second ones of a dense loss."
            )
        gradients = (_scaled(gradient, grad_loss, dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return None, None, *gradients


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A new tensor, multiplied before it is rounded to `dtype`: what was saved stays good for a retained graph.

    In place would spare one [V, H] tensor here, but not lower the peak of a step: the logits of the forward are gone.
    """
    return None if gradient is None else torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _loss_and_gradients(
    batch: TargetTokens, settings: HeadSettings, factors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """cross_entropy, kl and the gradients of the loss: those of hidden states in their dtype, of weights in its own."""
    dtype = loss_dtype(factors[0])
    pairs = _pairs(settings, factors)
    row_losses_2M = torch.empty(2, len(batch.rows_M), dtype=dtype, device=factors[0].device)
    logits_CV, *scratch = _buffers(pairs[0].weight_VH, len(batch.rows_M), settings, dtype)
    for start in range(0, len(batch.rows_M), len(logits_CV)):
        chunk = slice(start, start + len(logits_CV))
        rows_C = batch.rows_M[chunk]
        hiddens = [pair.hidden_NH[rows_C].to(settings.product_dtype) for pair in pairs]
        chunk_logits_CV = logits_CV[: len(rows_C)]
        for index, (pair, hidden_CH) in enumerate(zip(pairs, hiddens)):
            _product(hidden_CH, pair.weight_VH.t(), chunk_logits_CV, settings.logit_scale, accumulate=index > 0)
        _chunk_losses_(chunk_logits_CV, batch.rows(chunk), settings, scratch, row_losses_2M[:, chunk])
        if settings.row_weights is None:
            continue
        grad_logits_CV = chunk_logits_CV.to(settings.product_dtype)
        for pair, hidden_CH in zip(pairs, hiddens):
            _accumulate_gradients(pair, grad_logits_CV, hidden_CH, rows_C, settings)
    cross_entropy = row_losses_2M[0].sum() / settings.denominator
    has_targets = batch.targets is not None
    kl = row_losses_2M[1].sum() / settings.denominator if has_targets else torch.full_like(cross_entropy, math.nan)
    return cross_entropy, kl, [grad for pair in pairs for grad in (pair.grad_hidden_NH, pair.grad_weight_VH)]


def _pairs(settings: HeadSettings, factors: tuple[Tensor, ...]) -> list[_Pair]:
    dtype = loss_dtype(factors[0])
    return [
        _Pair(
            hidden_NH,
            weight_VH[: settings.vocab_size].to(settings.product_dtype),
            torch.zeros_like(hidden_NH) if needs_hidden_grad else None,
            torch.zeros_like(weight_VH, dtype=dtype) if needs_weight_grad else None,
        )
        for hidden_NH, weight_VH, needs_hidden_grad, needs_weight_grad in zip(
            factors[::2], factors[1::2], settings.needs_grad[::2], settings.needs_grad[1::2]
        )
    ]


def _accumulate_gradients(
    pair: _Pair, grad_logits_CV: Tensor, hidden_CH: Tensor, rows_C: Tensor, settings: HeadSettings
) -> None:
    """Adds what a chunk's logits say about both factors."""
    scale = settings.logit_scale
    if pair.grad_hidden_NH is not None:
        grad_hidden_CH = torch.mm(grad_logits_CV, pair.weight_VH)
        if scale != 1.0:
            grad_hidden_CH *= scale
        pair.grad_hidden_NH.index_copy_(0, rows_C, grad_hidden_CH.to(pair.grad_hidden_NH.dtype))
    if pair.grad_weight_VH is not None:
        out = pair.grad_weight_VH[: settings.vocab_size]
        _product(grad_logits_CV.t(), hidden_CH, out, scale, accumulate=True)


def _chunk_losses_(
    logits_CV: Tensor, batch: TargetTokens, settings: HeadSettings, scratch: list[Tensor], row_losses_2C: Tensor
) -> None:
    """Fills the cross-entropy and the KL of a chunk's tokens; the logits become the gradient of the loss."""
    weights = settings.row_weights
    kernel = _row_kernel(logits_CV)
    if kernel is not None:
        cross_entropy_C, divergence_C = kernel(
            logits_CV,
            batch.labels_M,
            batch.targets,
            settings.temperature,
            weights,
            settings.divergence,
            settings.logit_softcap,
        )
        row_losses_2C[0] = cross_entropy_C
        if divergence_C is not None:
            row_losses_2C[1] = divergence_C
        return
    for start in range(0, len(logits_CV), len(scratch[0])):
        block = slice(start, start + len(scratch[0]))
        logits_BV, labels_B = logits_CV[block], batch.labels_M[block]
        scratch_BV, *slope_BV = (buffer[: len(logits_BV)] for buffer in scratch)
        if settings.logit_softcap is not None:
            _cap_(logits_BV, settings.logit_softcap, slope_BV[0])
        if batch.targets is None:
            row_losses_2C[0, block] = cross_entropy_rows_(logits_BV, labels_B, None if weights is None else weights[0])
        else:
            row_losses_2C[0, block], row_losses_2C[1, block] = distillation_rows_(
                logits_BV,
                labels_B,
                batch.targets.rows(block),
                settings.temperature,
                weights,
                scratch_BV,
                settings.divergence,
            )
        if settings.logit_softcap is not None and weights is not None:
            logits_BV.mul_(slope_BV[0])


def _row_kernel(logits_CV: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The Triton kernel for the rows of a chunk, on a GPU with triton; None asks for the torch path."""
    if not logits_CV.is_cuda or logits_CV.dtype != torch.float32 or importlib.util.find_spec("triton") is None:
        return None
    from stages.train_student.row_kernel import kernel_rows_

    return kernel_rows_


def _cap_(logits_BV: Tensor, softcap: float, slope_BV: Tensor) -> None:
    """Logits become softcap tanh(logits / softcap), the slope its derivative."""
    logits_BV.div_(softcap).tanh_()
    torch.mul(logits_BV, logits_BV, out=slope_BV)
    slope_BV.neg_().add_(1)
    logits_BV.mul_(softcap)


def _product(left: Tensor, right: Tensor, out: Tensor, scale: float, *, accumulate: bool) -> None:
    """out = scale left @ right, or out += the same; CUDA can write float32 from bfloat16 factors."""
    mixed = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate or scale != 1.0:
        torch.addmm(out, left, right, **mixed, beta=1 if accumulate else 0, alpha=scale, out=out)
    else:
        torch.mm(left, right, **mixed, out=out)


def loss_dtype(hidden_NH: Tensor) -> torch.dtype:
    """Dtype of logits, sums and scalars: float32, or float64 for float64 hidden states."""
    return torch.promote_types(hidden_NH.dtype, torch.float32)


def product_dtype(hidden_NH: Tensor) -> torch.dtype:
    """Dtype that the matrix products read: that of autocast or of the hidden states, on a CPU that of the loss.

    A CPU cannot write float32 from bfloat16 factors, so there the factors are widened.
    """
    device_type = hidden_NH.device.type
    if device_type == "cpu":
        return loss_dtype(hidden_NH)
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_NH.dtype


def _buffers(weight_VH: Tensor, num_targets: int, settings: HeadSettings, dtype: torch.dtype) -> list[Tensor]:
    """Logits of a chunk within the byte budget, and scratch for the rows of a block; at least a row of each.

    The chunks are evened out, so that none is a small remainder that pays for the head's whole gradient.
    """
    row_bytes = len(weight_VH) * dtype.itemsize
    num_chunks = math.ceil(num_targets / max(1, settings.chunk_bytes // row_bytes))
    chunk_rows = math.ceil(num_targets / max(1, num_chunks))
    block_rows = max(1, BLOCK_BYTES[weight_VH.device.type] // row_bytes)
    logits_CV = weight_VH.new_empty(max(1, chunk_rows), len(weight_VH), dtype=dtype)
    num_scratch = 1 if settings.logit_softcap is None else 2
    return [logits_CV, *(torch.empty_like(logits_CV[:block_rows]) for _ in range(num_scratch))]
