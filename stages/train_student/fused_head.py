"""LM head and loss in one autograd step: the [tokens, vocabulary] matrix never exists.

The gradient is computed in the forward: logits of a chunk of tokens, then the loss and its gradient row by row over
the same memory, two more matrix products, and on to the next chunk. The backward only scales what is already there.
Owns chunking, precision and autograd; knows no formula of a loss.

The logits are s times a sum of products, one a pair of factors: hidden states and head, and what a low-rank adapter
of the head makes of the hidden states and its second matrix. A soft cap c makes them c tanh(logits / c).

Shapes: M target tokens, C rows of a chunk, B rows of a block, V the vocabulary, H hidden size (of an adapter's factors:
its rank).
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train_student.loss_settings import LossSettings
from stages.train_student.row_loss import cross_entropy_rows_, distillation_rows_
from stages.train_student.row_targets import RowTargets

DEFAULT_CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Bytes of one chunk's logits. Every chunk reads and writes the head's whole gradient: few large ones are fast."""

BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Bytes of the logits that are turned into loss and gradient at a time: a cache on a CPU, few launches on a GPU."""

ROW_ALIGNMENT = {"cpu": 1, "cuda": 16}
"""Memory of a row of logits is a multiple of so many elements, whatever the vocabulary.

A GPU reads rows in vectors, and multiplies them without a detour, where each begins at a multiple of 16 bytes.
"""


@dataclass(frozen=True, kw_only=True)
class HeadStep:
    """How one call of the loss is weighted, and computed."""

    settings: LossSettings
    alpha: float
    denominator: float
    """What sums over target tokens are divided by."""
    chunk_bytes: int
    product_dtype: torch.dtype
    """What the three matrix products read."""
    needs_grad: tuple[bool, ...]
    """For every factor in the order of FusedHead.apply."""
    on_rows: Callable[[Tensor], None] | None = None
    """Told of cross-entropy and divergence of every target token, [2, M]."""

    @property
    def row_weights(self) -> tuple[float, float] | None:
        """Factors of dCE/dz and of T dKL/dz in the gradient of the loss; None where no gradient is asked for."""
        if not any(self.needs_grad):
            return None
        return (1 - self.alpha) / self.denominator, self.alpha * self.settings.temperature / self.denominator


@dataclass
class _Pair:
    """Two factors of the logits and their gradients, None where none is asked for."""

    hidden_MH: Tensor
    weight_VH: Tensor
    """Its real rows, in the dtype of the products."""
    grad_hidden_MH: Tensor | None
    grad_weight_VH: Tensor | None
    """In the dtype of the loss."""


class _Scratch(NamedTuple):
    """Memory for the rows of a block."""

    rows_BV: Tensor
    slope_BV: Tensor | None
    """Of a soft cap."""
    tail_BV: Tensor | None
    """Of a sketch."""


class FusedHead(torch.autograd.Function):
    """loss, cross_entropy and kl; the gradient of the loss is complete when the forward returns.

    `factors` are hidden states [M, H] and head [V, H], then those of an adapter.
    """

    @staticmethod
    def forward(ctx, labels_M: Tensor, targets: RowTargets | None, step: HeadStep, *factors: Tensor):
        with torch.autocast(factors[0].device.type, enabled=False):
            cross_entropy, kl, gradients = _loss_and_gradients(labels_M, targets, step, factors)
        loss = (1 - step.alpha) * cross_entropy
        if step.alpha > 0:
            loss = loss + step.alpha * step.settings.temperature**2 * kl
        ctx.save_for_backward(*gradients)  # freed by the backward unless the graph is retained
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.mark_non_differentiable(cross_entropy, kl)
        return loss, cross_entropy, kl

    @staticmethod
    def backward(ctx, grad_loss: Tensor, grad_cross_entropy: Tensor, grad_kl: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_distillation_loss: a backward with create_graph=True, expected first derivatives only; "
                "take second ones of a dense loss."
            )
        gradients = (_scaled(gradient, grad_loss, dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return None, None, None, *gradients


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A new tensor, multiplied before it is rounded to `dtype`: what was saved stays good for a retained graph.

    In place would spare one [V, H] tensor here, but not lower the peak of a step: the logits of the forward are gone.
    """
    return None if gradient is None else torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _loss_and_gradients(
    labels_M: Tensor, targets: RowTargets | None, step: HeadStep, factors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """cross_entropy, kl and the gradients of the loss: those of hidden states in their dtype, of weights in its own."""
    dtype = loss_dtype(factors[0])
    pairs = _pairs(step, factors)
    row_losses_2M = torch.empty(2, len(labels_M), dtype=dtype, device=factors[0].device)
    has_sketch = targets is not None and targets.sketch is not None
    logits_CV, scratch = _buffers(pairs[0].weight_VH, len(labels_M), step, dtype, has_sketch=has_sketch)
    for start in range(0, len(labels_M), len(logits_CV)):
        chunk = slice(start, min(start + len(logits_CV), len(labels_M)))
        hiddens = [pair.hidden_MH[chunk].to(step.product_dtype) for pair in pairs]
        chunk_logits_CV = logits_CV[: chunk.stop - chunk.start]
        for index, (pair, hidden_CH) in enumerate(zip(pairs, hiddens)):
            _product(hidden_CH, pair.weight_VH.t(), chunk_logits_CV, step.settings.logit_scale, accumulate=index > 0)
        chunk_targets = None if targets is None else targets.rows(chunk)
        grad_logits_CV = _chunk_losses_(
            chunk_logits_CV, labels_M[chunk], chunk_targets, step, scratch, row_losses_2M[:, chunk]
        )
        if step.row_weights is None:
            continue
        for pair, hidden_CH in zip(pairs, hiddens):
            _accumulate_gradients(pair, grad_logits_CV, hidden_CH, chunk, step.settings)
    if step.on_rows is not None:
        step.on_rows(row_losses_2M)
    cross_entropy = row_losses_2M[0].sum() / step.denominator
    has_targets = targets is not None
    kl = row_losses_2M[1].sum() / step.denominator if has_targets else torch.full_like(cross_entropy, math.nan)
    return cross_entropy, kl, [grad for pair in pairs for grad in (pair.grad_hidden_MH, pair.grad_weight_VH)]


def _pairs(step: HeadStep, factors: tuple[Tensor, ...]) -> list[_Pair]:
    dtype = loss_dtype(factors[0])
    return [
        _Pair(
            hidden_MH,
            weight_VH[: step.settings.vocab_size].to(step.product_dtype),
            torch.empty_like(hidden_MH) if needs_hidden_grad else None,
            torch.zeros_like(weight_VH, dtype=dtype) if needs_weight_grad else None,
        )
        for hidden_MH, weight_VH, needs_hidden_grad, needs_weight_grad in zip(
            factors[::2], factors[1::2], step.needs_grad[::2], step.needs_grad[1::2]
        )
    ]


def _accumulate_gradients(
    pair: _Pair, grad_logits_CV: Tensor, hidden_CH: Tensor, chunk: slice, settings: LossSettings
) -> None:
    """Writes what a chunk's logits say about its hidden states, and adds what they say about the weights."""
    scale = settings.logit_scale
    if pair.grad_hidden_MH is not None:
        grad_hidden_CH = torch.mm(grad_logits_CV, pair.weight_VH)
        if scale != 1.0:
            grad_hidden_CH *= scale
        pair.grad_hidden_MH[chunk] = grad_hidden_CH
    if pair.grad_weight_VH is not None:
        out = pair.grad_weight_VH[: settings.vocab_size]
        _product(grad_logits_CV.t(), hidden_CH, out, scale, accumulate=True)


def _chunk_losses_(
    logits_CV: Tensor,
    labels_C: Tensor,
    targets: RowTargets | None,
    step: HeadStep,
    scratch: _Scratch,
    row_losses_2C: Tensor,
) -> Tensor:
    """The gradient of the loss with respect to a chunk's logits, which are lost, in the dtype of the products.

    Fills the cross-entropy and the KL of its tokens.
    """
    settings, weights = step.settings, step.row_weights
    kernel, is_sketched = _row_kernel(logits_CV), targets is not None and targets.sketch is not None
    if kernel is not None and (settings.divergence == "forward" or not is_sketched):
        grad_logits_CV = logits_CV.view(step.product_dtype)[:, : settings.vocab_size]  # in the logits' memory
        launch_rows = len(scratch.rows_BV) if is_sketched else len(logits_CV)
        for start in range(0, len(logits_CV), launch_rows):
            block = slice(start, start + launch_rows)
            rows = None if targets is None else targets.rows(block)
            tail_BV = _tail_logits(rows, scratch)
            row_losses_2C[0, block], divergence_B = kernel(
                logits_CV[block], labels_C[block], rows, settings, weights, grad_logits_CV[block], tail_BV
            )
            if divergence_B is not None:
                row_losses_2C[1, block] = divergence_B
        return grad_logits_CV
    for start in range(0, len(logits_CV), len(scratch.rows_BV)):
        block = slice(start, start + len(scratch.rows_BV))
        logits_BV, labels_B = logits_CV[block], labels_C[block]
        scratch_BV, slope_BV, _ = (None if rows is None else rows[: len(logits_BV)] for rows in scratch)
        if settings.logit_softcap is not None:
            _cap_(logits_BV, settings.logit_softcap, slope_BV)
        if targets is None:
            row_losses_2C[0, block] = cross_entropy_rows_(logits_BV, labels_B, None if weights is None else weights[0])
        else:
            rows = targets.rows(block)
            row_losses_2C[0, block], row_losses_2C[1, block] = distillation_rows_(
                logits_BV, labels_B, rows, settings, weights, scratch_BV, _tail_logits(rows, scratch)
            )
        if settings.logit_softcap is not None and weights is not None:
            logits_BV.mul_(slope_BV)
    return logits_CV.to(step.product_dtype)


def _tail_logits(targets: RowTargets | None, scratch: _Scratch) -> Tensor | None:
    """Over T, of the rows of a block, None without a sketch."""
    if targets is None or targets.sketch is None:
        return None
    assert scratch.tail_BV is not None
    return targets.sketch.write_(scratch.tail_BV[: len(targets.ids_NK)])


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


def _buffers(
    weight_VH: Tensor, num_targets: int, step: HeadStep, dtype: torch.dtype, *, has_sketch: bool
) -> tuple[Tensor, _Scratch]:
    """Logits of a chunk within the byte budget, and scratch for the rows of a block; at least a row of each.

    The chunks are evened out, so that none is a small remainder that pays for the head's whole gradient.
    """
    alignment = ROW_ALIGNMENT[weight_VH.device.type]
    row_size = math.ceil(len(weight_VH) / alignment) * alignment
    row_bytes = row_size * dtype.itemsize
    num_chunks = math.ceil(num_targets / max(1, step.chunk_bytes // row_bytes))
    chunk_rows = math.ceil(num_targets / max(1, num_chunks))
    block_rows = max(1, BLOCK_BYTES[weight_VH.device.type] // row_bytes)
    chunk_rows, vocab_size = max(1, chunk_rows), len(weight_VH)
    is_needed = (True, step.settings.logit_softcap is not None, has_sketch)
    sizes = (chunk_rows, *(min(block_rows, chunk_rows) if needed else None for needed in is_needed))
    logits_CV, *rows = (
        None if size is None else weight_VH.new_empty(size, row_size, dtype=dtype)[:, :vocab_size] for size in sizes
    )
    return logits_CV, _Scratch(*rows)
