"""Putting the fused loss into a student: its LM head returns the loss instead of logits.

The loss is computed inside the head module's own forward, so that whatever shards or gathers the
head (DDP, FSDP2) does so for us; reading the weight from outside would miss its gradient's
reduction. Without targets in the call the model behaves as before.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from pipeline.errors import ConfigError
from stages.train_student.compat.peft_hooks import head_factors
from stages.train_student.documents import target_hidden
from stages.train_student.loss import DistillationLoss, distillation_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.routers import RouterLoss
from stages.train_student.sketch import SketchHead
from stages.train_student.sources import SUMMED
from stages.train_student.student_entropy import least_sure_rows
from stages.train_student.targets import LABELS, TEACHER_COLUMNS, DistillationTargets

OTHER_COLUMNS = ("labels",)
"""Of a batch, beside those that are targets: for the Trainer alone."""
HeadFunction = Callable[..., Any]
"""Of hidden states [M, H], the head's weight [V, H] and, by name, its `adapter`, as `distillation_loss` takes them."""


@dataclass
class DistillationOutput(ModelOutput):
    """What the student's forward returns when it is given targets; scalars, float32."""

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    kl: Tensor | None = None
    router_loss: Tensor | None = None
    """Of a mixture of experts, its share of the step; in `loss` times its weight. None if nothing balances routers."""
    by_source: Tensor | None = None
    """[sources, SUMMED]: sums of a mixture of caches; None of one cache."""


def attach_fused_loss(
    model: PreTrainedModel,
    settings: LossSettings,
    router: RouterLoss | None = None,
    sketch: SketchHead | None = None,
    num_sources: int = 1,
) -> None:
    """Make `model(**batch)` of a batch by `dataset.Collate` return a DistillationOutput.

    `num_items_in_batch` is the number of target tokens of the whole step, over all micro-batches
    and ranks; without it the mean is over the batch. With `measure`, a HeadFunction, what it makes of the target rows
    is returned instead. With `kept_of_sequences`, how many targets every sequence has and how many of them are kept,
    the loss is that of the kept ones, where the student is least sure. With `sources`, the number of every target's
    source, the output has sums for each of `num_sources`. With the model's attribute `one_by_one` set,
    every document is computed as a row of its own.
    The sketch, which a tail that is sketched needs, goes to the device of the hidden states; it is no part of the
    model's state. Raises ConfigError for a head with a bias.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(f"{type(model).__name__}: its head has a bias, which the fused loss does not know.")
    model.one_by_one = False
    head.forward = types.MethodType(_hooked_head(head.forward), head)
    model.forward = types.MethodType(_hooked_model(model.forward, settings, router, sketch, num_sources), model)


def token_loss(
    targets: DistillationTargets,
    settings: LossSettings,
    alpha: float | None = None,
    num_target_tokens: float | None = None,
    kept: list[tuple[int, int]] | None = None,
    by_source: "SourceSums | None" = None,
) -> HeadFunction:
    """The loss of the target tokens, or of those that are `kept`, to be computed in the head's forward."""

    def loss(hidden_MH: Tensor, weight_VH: Tensor, *, adapter: tuple[Tensor, Tensor] | None) -> DistillationLoss:
        chosen, on_rows = targets, None if by_source is None else by_source.add
        if kept is not None:
            rows = least_sure_rows(hidden_MH, weight_VH, adapter, settings, kept)
            hidden_MH, chosen = hidden_MH[rows], targets.rows(rows)
            adapter = None if adapter is None else (adapter[0][rows], adapter[1])
            if by_source is not None:
                by_source.sources_M = by_source.sources_M[rows]
        return distillation_loss(
            hidden_MH,
            weight_VH,
            chosen,
            settings,
            alpha=alpha,
            num_target_tokens=num_target_tokens,
            adapter=adapter,
            on_rows=on_rows,
        )

    return loss


class SourceSums:
    """What is summed over the target tokens of each source of a mixture: `sources.SUMMED`."""

    def __init__(self, sources_M: Tensor, num_sources: int, alpha: float, temperature: float) -> None:
        self.sources_M = sources_M
        self._weights = 1 - alpha, alpha * temperature**2
        self.sums = torch.zeros(num_sources, len(SUMMED), device=sources_M.device)

    def add(self, row_losses_2M: Tensor) -> None:
        """Add cross-entropy and divergence of every token."""
        cross_entropy_M, kl_M = row_losses_2M.float()
        loss_M = self._weights[0] * cross_entropy_M + self._weights[1] * kl_M
        columns = torch.stack([torch.ones_like(loss_M), loss_M, cross_entropy_M, kl_M], dim=1)
        self.sums.index_add_(0, self.sources_M, columns)


def _hooked_head(head_forward: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def forward(self: Any, hidden: Tensor, function: HeadFunction | None = None) -> Any:
        if function is None:
            return head_forward(hidden)
        weight_VH, adapter = head_factors(self, hidden)
        return function(hidden, weight_VH, adapter=adapter)

    return forward


def _hooked_model(
    model_forward: Callable[..., Any],
    settings: LossSettings,
    router: RouterLoss | None,
    sketch: SketchHead | None,
    num_sources: int,
) -> Callable[..., Any]:
    sketch_on = functools.cache(lambda device: None if sketch is None else sketch.to(device))

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        target_rows: Tensor | None = None,
        alpha: float | None = None,
        num_items_in_batch: float | None = None,
        measure: HeadFunction | None = None,
        kept_of_sequences: list[tuple[int, int]] | None = None,
        sources: Tensor | None = None,
        **columns: Any,
    ) -> Any:
        if target_rows is None:
            return model_forward(input_ids=input_ids, position_ids=position_ids, **columns)
        _refuse_unknown(columns)
        balanced = router if measure is None else None
        how = {"one_by_one": self.one_by_one, "routers": balanced is not None}
        body = target_hidden(self, input_ids, position_ids, target_rows, **how)
        head = self.get_output_embeddings()
        if measure is not None:
            return head(body.hidden_MH, measure)
        targets = DistillationTargets.of_batch(columns, sketch_on(body.hidden_MH.device))
        by_source = None
        if sources is not None:
            weight = settings.alpha if alpha is None else alpha
            by_source = SourceSums(sources, num_sources, weight, settings.temperature)
        loss = token_loss(targets, settings, alpha, num_items_in_batch, kept_of_sequences, by_source)
        out = DistillationOutput(*head(body.hidden_MH, loss))
        out.by_source = None if by_source is None else by_source.sums
        if balanced is not None:
            num_kept = len(targets) if kept_of_sequences is None else sum(kept for _, kept in kept_of_sequences)
            share = 1.0 if num_items_in_batch is None else num_kept / num_items_in_batch
            _add_balance(out, balanced, body.router_logits, share)
        return out

    return forward


def _add_balance(out: DistillationOutput, router: RouterLoss, logits: tuple[Tensor, ...], share: float) -> None:
    """Add the balancing loss of the routers, by the micro-batch's share of the step."""
    balance = router(logits)
    if balance is not None:
        out.router_loss = balance.detach() * share
        out.loss = out.loss + router.weight * share * balance


def _refuse_unknown(columns: dict[str, Any]) -> None:
    """What wraps a model hands it arguments of its own, all of them None."""
    known = (LABELS, *TEACHER_COLUMNS.values(), *OTHER_COLUMNS)
    unknown = [name for name, value in columns.items() if value is not None and name not in known]
    if unknown:
        raise TypeError(f"a batch with {', '.join(unknown)}; the fused loss knows: {', '.join(known)}.")
