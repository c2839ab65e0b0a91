"""The fused loss against the dense formula, on a few rows of the model's own logits, where the model is trained.

The value finds an architecture that does to its logits what the fused loss does not know, and a head hook that is not
in use. The gradients, of the same rows in the training's own types and by the kernel that trains, are held against
dense ones of hidden states, of an adapter of the head, and of rows of the head; what the body makes of them is
autograd's.

Shapes: M target rows, V the vocabulary, H hidden size.
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from stages.train_student.evaluation import head_logits, logits_of_products
from stages.train_student.fused_head import product_dtype
from stages.train_student.head import token_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.routers import RouterLoss
from stages.train_student.row_loss import bucket_divergence, outcome_divergence, whole_log_probs
from stages.train_student.row_targets import RowTargets, make_row_targets
from stages.train_student.sketch import SketchHead
from stages.train_student.targets import DistillationTargets, TeacherTargets

ROWS = 8
HEAD_ROWS = 64
"""Of the head, evenly over the vocabulary, beside those of labels and stored ids."""
TOLERANCE = 1e-3
"""Relative, or absolute below 1: float32 products, or TF32 ones."""
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of a product's factors and result, relative to the sum of its terms' sizes."""
Computation = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class LossCheck:
    """The loss of a student against its own logits: at once, and once more where its parameters are sharded."""

    base: Any
    """The hooked model, inside whatever wraps it."""
    batch: dict[str, Any]
    settings: LossSettings
    router: RouterLoss | None
    sketch: SketchHead | None = None

    def at_once(self, model: Any, gradients_in: Computation) -> None:
        """Where the model lies: a whole one on its device; one that is to be sharded on the CPU, in float32."""
        self._require(model, gradients_in=gradients_in)

    def where_it_is_sharded(self, trainer: Any) -> None:
        """By every rank on the gathered weights, in the types of the training; a whole model was looked at before."""
        if not trainer.is_fsdp_enabled:
            return
        one_by_one, self.base.one_by_one = self.base.one_by_one, False  # a row's own logits are of all its documents
        autocast = trainer.accelerator.autocast
        try:
            self._require(trainer.model, values_in=autocast, gradients_in=autocast)
        finally:
            self.base.one_by_one = one_by_one

    def _require(self, model: Any, **types: Computation) -> None:
        require_agreement(model, self.batch, self.settings, router=self.router, sketch=self.sketch, **types)


def require_agreement(
    model: Any,
    batch: dict[str, Any],
    settings: LossSettings,
    *,
    router: RouterLoss | None = None,
    sketch: SketchHead | None = None,
    values_in: Computation = nullcontext,
    gradients_in: Computation = nullcontext,
) -> None:
    """Raise PipelineError unless both losses of the first rows of a batch of one sequence agree, and their gradients.

    `gradients_in` makes the autocast of the training; `values_in` too where a model knows no other types.
    """
    device = next(model.parameters()).device
    batch = first_rows(batch, device)
    targets = DistillationTargets.of_batch(batch, None if sketch is None else sketch.to(device))
    tokens = {name: batch[name] for name in ("input_ids", "position_ids")}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with values_in():
                out = model(**batch)
                logits = model(**tokens, use_cache=False).logits  # a cache would let attention cross packed documents
            _require_values(
                model, out, logits[0, batch["target_rows"], : settings.vocab_size], targets, settings, router
            )
            with gradients_in():
                compare = functools.partial(_require_gradients, model=model, targets=targets, settings=settings)
                model(**tokens, target_rows=batch["target_rows"], measure=compare)
    finally:
        model.train(was_training)


def _require_values(
    model: Any,
    out: Any,
    logits_MV: Tensor,
    targets: DistillationTargets,
    settings: LossSettings,
    router: RouterLoss | None,
) -> None:
    balance = 0.0 if router is None or out.router_loss is None else router.weight * out.router_loss
    fused = (out.loss - balance).item()
    dense = dense_loss(logits_MV.double(), targets, settings).item()
    allowed = TOLERANCE * max(1.0, abs(dense))
    if logits_MV.dtype in ROUNDING:  # of both terms: a logit enters each of them twice, and D as z / T, times T^2
        off = ROUNDING[logits_MV.dtype] * logits_MV.abs().max().item()
        allowed += 2 * off * (1 - settings.alpha + settings.alpha * settings.temperature)
    if not abs(fused - dense) <= allowed:
        raise PipelineError(
            f"{type(model).__name__}: the fused loss of {len(targets)} rows is {fused:.6g}, the dense "
            f"formula on the model's own logits gives {dense:.6g}; it does something to its logits that the fused loss "
            "does not know, so that it would be trained towards something else. This student is not supported."
        )


def _require_gradients(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    *,
    adapter: tuple[Tensor, Tensor] | None,
    model: Any,
    targets: DistillationTargets,
    settings: LossSettings,
) -> None:
    """In the head's forward, with the weight as it is gathered there. Both terms count, whatever alpha is at first."""
    settings = dataclasses.replace(settings, alpha=0.5)
    found = _fused_gradients((hidden_MH, weight_VH, *(adapter or ())), targets, settings)
    dtype = product_dtype(hidden_MH)
    rounded = [factor.to(dtype) for factor in (hidden_MH, weight_VH, *(adapter or ()))]
    with torch.autocast(hidden_MH.device.type, enabled=False):
        grad_logits_MV = _dense_gradient(rounded, targets, settings)
        rows = _head_rows(targets, settings.vocab_size)
        for pair, name in zip(range(0, len(rounded), 2), ("head", "head's adapter")):
            hidden, weight = (factor.to(grad_logits_MV.dtype) for factor in rounded[pair : pair + 2])
            weight = weight[: settings.vocab_size]
            _compare(model, f"hidden states of the {name}", found[pair], grad_logits_MV, weight, dtype)
            if (weight_gradient := found[pair + 1]) is not None:
                _compare(model, name, weight_gradient[rows], grad_logits_MV[:, rows].T, hidden, dtype)


def _fused_gradients(
    factors: tuple[Tensor, ...], targets: DistillationTargets, settings: LossSettings
) -> list[Tensor | None]:
    """Of hidden states and weights, None of a weight that is frozen."""
    leaves = [
        factor.detach().requires_grad_(not index % 2 or factor.requires_grad) for index, factor in enumerate(factors)
    ]
    with torch.enable_grad():
        loss = token_loss(targets, settings)(*leaves[:2], adapter=tuple(leaves[2:]) or None).loss
        gradients = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


def _dense_gradient(factors: list[Tensor], targets: DistillationTargets, settings: LossSettings) -> Tensor:
    """[M, V]: of the dense loss with respect to the products of the factors; float32, or float64 for float64 ones."""
    products = dataclasses.replace(settings, logit_scale=1.0, logit_softcap=None)
    hidden_MH, weight_VH, *adapter = factors
    logits_MV = head_logits(hidden_MH, weight_VH, tuple(adapter) or None, products)
    with torch.enable_grad():
        leaf = logits_MV.double().requires_grad_()
        loss = dense_loss(logits_of_products(leaf, settings), targets, settings)
        return torch.autograd.grad(loss, leaf)[0].to(logits_MV.dtype)


def _head_rows(targets: DistillationTargets, vocab_size: int) -> Tensor:
    spread = torch.linspace(0, vocab_size - 1, HEAD_ROWS, device=targets.labels_M.device).long()
    return torch.cat([targets.labels_M, _teacher(targets).ids_MK.flatten(), spread]).unique()


def _teacher(targets: DistillationTargets) -> TeacherTargets:
    assert targets.teacher is not None  # a batch of a cache has one
    return targets.teacher


def _compare(model: Any, name: str, found: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Hold a gradient against left @ right, by the sum of the sizes of what is added up."""
    off = (found.to(left.dtype) - left @ right).norm()
    sizes = (left.abs() @ right.abs()).norm()
    allowed = max(TOLERANCE, ROUNDING.get(dtype, 0.0), ROUNDING.get(found.dtype, 0.0))
    if not (off <= allowed * sizes).item():
        raise PipelineError(
            f"{type(model).__name__}: the fused loss has another gradient for the {name} than the dense formula: they "
            f"differ by {(off / sizes).item():.2g} of the terms, rounding explains {allowed:.2g}. The loss of this "
            f"device ({found.device.type}) would train towards something else; `python -m pytest tests/test_loss.py "
            "tests/test_row_kernel.py` tells more."
        )


def dense_loss(logits_NV: Tensor, targets: DistillationTargets, settings: LossSettings) -> Tensor:
    """(1 - alpha) CE + alpha T^2 D by dense log-softmaxes in the logits' own type; a mean over the rows."""
    temperature, alpha = settings.temperature, settings.alpha
    cross_entropy_N = -torch.log_softmax(logits_NV, 1).gather(1, targets.labels_M[:, None]).squeeze(1)
    rows = make_row_targets(_teacher(targets), settings, logits_NV.dtype)
    log_q_NV = torch.log_softmax(logits_NV / temperature, 1)
    divergence_N = (_bucket_rows if rows.sketch is None else _whole_rows)(log_q_NV, rows, settings)
    return ((1 - alpha) * cross_entropy_N + alpha * temperature**2 * divergence_N).mean()


def _whole_rows(log_q_NV: Tensor, rows: RowTargets, settings: LossSettings) -> Tensor:
    """D of every row where a sketch makes p_T whole."""
    log_p_NV = whole_log_probs(rows)
    if settings.divergence != "forward":
        return outcome_divergence(settings.divergence, log_p_NV, log_q_NV, log_p_NV.exp())[0]
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)


def _bucket_rows(log_q_NV: Tensor, rows: RowTargets, settings: LossSettings) -> Tensor:
    """D of every row under the other policies."""
    entries_NK = log_q_NV.gather(1, rows.ids_NK)
    is_stored_NV = torch.zeros_like(log_q_NV, dtype=torch.bool).scatter_(1, rows.ids_NK, True)
    rest_N = torch.logsumexp(log_q_NV.masked_fill(is_stored_NV, -1e30), 1)
    if settings.divergence != "forward":
        entries_NK = entries_NK.masked_fill(~rows.is_entry_NK, -1e30)
        return bucket_divergence(settings.divergence, rows, entries_NK, rest_N[:, None])[0]
    divergence_N = rows.entropy_term_N - (rows.weights_NK * entries_NK).sum(1) - rows.bucket_N * rest_N
    if rows.level_N is not None:
        divergence_N = divergence_N - rows.level_N * log_q_NV.masked_fill(is_stored_NV, 0.0).sum(1)
    return divergence_N


def first_rows(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The first ROWS target tokens, and no more of the sequence than they need."""
    rows = batch["target_rows"][:ROWS]
    targets = DistillationTargets.of_batch(batch).rows(slice(ROWS)).to(device)
    length = int(rows.max()) + 1
    tokens = {name: batch[name][:1, :length].to(device) for name in ("input_ids", "position_ids")}
    return {**tokens, "target_rows": rows.to(device), **targets.as_batch()}
