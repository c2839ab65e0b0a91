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

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from pipeline.errors import ConfigError
from stages.train_student.documents import target_hidden
from stages.train_student.lora import head_adapter
from stages.train_student.loss import fused_distillation_loss
from stages.train_student.routers import RouterLoss


@dataclass
class DistillationOutput(ModelOutput):
    """What the student's forward returns when it is given targets; scalars, float32."""

    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    kl: Tensor | None = None
    router_loss: Tensor | None = None
    """Of a mixture of experts, its share of the step; in `loss` times its weight. None where nothing balances routers."""


@dataclass(frozen=True, kw_only=True)
class HeadLoss:
    """What the loss of a student's head is, beside the batch."""

    vocab_size: int
    """Rows of the head from here on are padding."""
    alpha: float = 0.5
    """Where a call does not say."""
    divergence: str = "forward"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    router: RouterLoss | None = None


def attach_fused_loss(model: PreTrainedModel, settings: HeadLoss) -> None:
    """Make `model(**batch)` of a batch by `dataset.Collate` return a DistillationOutput.

    `num_items_in_batch` is the number of target tokens of the whole step, over all micro-batches
    and ranks; without it the mean is over the batch. With `measure`, what
    `measure(hidden_MH, head_weight_VH, adapter=...)` makes of the target rows is returned instead. With the model's
    attribute `one_by_one` set, every document is computed as a row of its own. Raises ConfigError for a head with a bias.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(f"{type(model).__name__}: its head has a bias, which the fused loss does not know.")
    head_forward, model_forward = head.forward, model.forward
    model.one_by_one = False

    def fused_head(self: Any, hidden: Tensor, function: Callable[..., Any] | None = None) -> Any:
        if function is None:
            return head_forward(hidden)
        return function(hidden, getattr(self, "base_layer", self).weight, adapter=head_adapter(self, hidden))

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        shift_labels: Tensor | None = None,
        target_rows: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        teacher_probs: Tensor | None = None,
        teacher_tail: Tensor | None = None,
        teacher_entropy: Tensor | None = None,
        temperature: float | None = None,
        tail: str | None = None,
        alpha: float | None = None,
        num_items_in_batch: Tensor | int | None = None,
        measure: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if target_rows is None:
            return model_forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        router = settings.router if measure is None else None
        how = {"one_by_one": self.one_by_one, "routers": router is not None}
        body = target_hidden(self, input_ids, position_ids, target_rows, **how)
        if measure is not None:
            return self.get_output_embeddings()(body.hidden_MH, measure)
        loss = functools.partial(
            fused_distillation_loss,
            labels_N=shift_labels,
            ids_NK=teacher_ids,
            probs_NK=teacher_probs,
            tail_mass_N=teacher_tail,
            teacher_entropy_N=teacher_entropy,
            alpha=settings.alpha if alpha is None else alpha,
            temperature=temperature,
            tail=tail,
            num_target_tokens=num_items_in_batch,
            vocab_size=settings.vocab_size,
            divergence=settings.divergence,
            logit_scale=settings.logit_scale,
            logit_softcap=settings.logit_softcap,
        )
        out = DistillationOutput(*self.get_output_embeddings()(body.hidden_MH, loss))
        balance = router(body.router_logits) if router is not None else None
        if balance is not None:
            share = 1.0 if num_items_in_batch is None else len(target_rows) / num_items_in_batch
            out.router_loss = balance.detach() * share
            out.loss = out.loss + router.weight * share * balance
        return out

    head.forward = types.MethodType(fused_head, head)
    model.forward = types.MethodType(forward, model)
