"""LM head and loss in one autograd step: the [tokens, vocabulary] matrix never exists.

The gradient is computed in the forward: logits of a chunk of tokens, then the loss and its gradient row by row over
the same memory, two more matrix products, and on to the next chunk. The backward only scales what is already there.
Owns chunking, precision and autograd; knows no formula of a loss.

Shapes: N tokens of a flattened batch, M of them target tokens, C rows of a chunk, B rows of a block, V the
vocabulary, H hidden size.
"""

import math
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
    needs_hidden_grad: bool
    needs_weight_grad: bool

    @property
    def row_weights(self) -> tuple[float, float] | None:
        """Factors of dCE/dz and of T dKL/dz in the gradient of the loss; None where no gradient is asked for."""
        if not (self.needs_hidden_grad or self.needs_weight_grad):
            return None
        return (1 - self.alpha) / self.denominator, self.alpha * self.temperature / self.denominator


class FusedHead(torch.autograd.Function):
    """loss, cross_entropy and kl; the gradient of the loss is complete when the forward returns."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, head_weight_VH: Tensor, batch: TargetTokens, settings: HeadSettings):
        with torch.autocast(hidden_NH.device.type, enabled=False):
            cross_entropy, kl, grad_hidden_NH, grad_weight_VH = _loss_and_gradients(
                hidden_NH, head_weight_VH, batch, settings
            )
        loss = (1 - settings.alpha) * cross_entropy
        if settings.alpha > 0:
            loss = loss + settings.alpha * settings.temperature**2 * kl
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH)  # freed by the backward unless the graph is retained
        ctx.dtypes = hidden_NH.dtype, head_weight_VH.dtype
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_distillation_loss: a backward with create_graph=True, expected first derivatives only; "
                "take second ones of a dense loss."
            )
        grad_hidden_NH, grad_weight_VH = (
            _scaled(gradient, grad_loss, dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return grad_hidden_NH, grad_weight_VH, None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A new tensor, multiplied before it is rounded to `dtype`: what was saved stays good for a retained graph.

    In place would spare one [V, H] tensor here, but not lower the peak of a step: the logits of the forward are gone.
    """
    return None if gradient is None else torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _loss_and_gradients(
    hidden_NH: Tensor, head_weight_VH: Tensor, batch: TargetTokens, settings: HeadSettings
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """cross_entropy, kl and the gradients of the loss, in hidden's dtype and in that of the loss."""
    dtype, product_dtype = loss_dtype(hidden_NH), settings.product_dtype
    weight_VH = head_weight_VH[: settings.vocab_size].to(product_dtype)
    grad_hidden_NH = torch.zeros_like(hidden_NH) if settings.needs_hidden_grad else None
    grad_weight_VH = torch.zeros_like(head_weight_VH, dtype=dtype) if settings.needs_weight_grad else None
    row_losses_2M = torch.empty(2, len(batch.rows_M), dtype=dtype, device=hidden_NH.device)
    logits_CV, scratch_BV = _buffers(weight_VH, len(batch.rows_M), settings.chunk_bytes, dtype)
    for start in range(0, len(batch.rows_M), len(logits_CV)):
        chunk = slice(start, start + len(logits_CV))
        rows_C = batch.rows_M[chunk]
        hidden_CH = hidden_NH[rows_C].to(product_dtype)
        chunk_logits_CV = logits_CV[: len(rows_C)]
        _product(hidden_CH, weight_VH.t(), out=chunk_logits_CV)
        _chunk_losses_(chunk_logits_CV, batch.rows(chunk), settings, scratch_BV, row_losses_2M[:, chunk])
        if settings.row_weights is None:
            continue
        grad_logits_CV = chunk_logits_CV.to(product_dtype)
        if grad_hidden_NH is not None:
            grad_hidden_NH.index_copy_(0, rows_C, torch.mm(grad_logits_CV, weight_VH).to(hidden_NH.dtype))
        if grad_weight_VH is not None:
            _product(grad_logits_CV.t(), hidden_CH, out=grad_weight_VH[: settings.vocab_size], accumulate=True)
    cross_entropy = row_losses_2M[0].sum() / settings.denominator
    has_targets = batch.targets is not None
    kl = row_losses_2M[1].sum() / settings.denominator if has_targets else torch.full_like(cross_entropy, math.nan)
    return cross_entropy, kl, grad_hidden_NH, grad_weight_VH


def _chunk_losses_(
    logits_CV: Tensor, batch: TargetTokens, settings: HeadSettings, scratch_BV: Tensor, row_losses_2C: Tensor
) -> None:
    """Fills the cross-entropy and the KL of a chunk's tokens; the logits become the gradient of the loss."""
    weights = settings.row_weights
    for start in range(0, len(logits_CV), len(scratch_BV)):
        block = slice(start, start + len(scratch_BV))
        logits_BV, labels_B = logits_CV[block], batch.labels_M[block]
        if batch.targets is None:
            row_losses_2C[0, block] = cross_entropy_rows_(logits_BV, labels_B, None if weights is None else weights[0])
        else:
            row_losses_2C[0, block], row_losses_2C[1, block] = distillation_rows_(
                logits_BV,
                labels_B,
                batch.targets.rows(block),
                settings.temperature,
                weights,
                scratch_BV[: len(logits_BV)],
            )


def _product(left: Tensor, right: Tensor, *, out: Tensor, accumulate: bool = False) -> None:
    """out = left @ right, or out += left @ right; CUDA can write float32 from bfloat16 factors."""
    mixed = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, left, right, **mixed, out=out)
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


def _buffers(weight_VH: Tensor, num_targets: int, chunk_bytes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of a chunk within the byte budget, and scratch for the rows of a block; at least a row of each.

    The chunks are evened out, so that none is a small remainder that pays for the head's whole gradient.
    """
    row_bytes = len(weight_VH) * dtype.itemsize
    num_chunks = math.ceil(num_targets / max(1, chunk_bytes // row_bytes))
    chunk_rows = math.ceil(num_targets / max(1, num_chunks))
    block_rows = max(1, BLOCK_BYTES[weight_VH.device.type] // row_bytes)
    logits_CV = weight_VH.new_empty(max(1, chunk_rows), len(weight_VH), dtype=dtype)
    return logits_CV, torch.empty_like(logits_CV[:block_rows])
