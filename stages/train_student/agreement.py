"""The fused loss against the dense formula, on a few rows of the model's own logits, before the first step.

Finds an architecture that does to its logits what the fused loss does not know, and a head hook that is not in use.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from stages.train_student.divergences import bucket_divergence
from stages.train_student.head import HeadLoss
from stages.train_student.row_targets import make_row_targets

ROWS = 8
TOLERANCE = 1e-3
"""Relative, or absolute below 1: float32 products, or TF32 ones."""


def require_agreement(model: Any, batch: dict[str, Any], head: HeadLoss) -> None:
    """Raise PipelineError unless both losses of the first rows of a batch of one sequence agree; no autocast."""
    batch = first_rows(batch, next(model.parameters()).device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch)
        balance = 0.0 if out.router_loss is None else head.router.weight * out.router_loss
        fused = (out.loss - balance).item()
        tokens = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = model(**tokens, use_cache=False).logits  # a cache would let attention cross packed documents
    model.train(was_training)
    dense = dense_loss(logits[0, batch["target_rows"], : head.vocab_size].double(), batch, head).item()
    if not abs(fused - dense) <= TOLERANCE * max(1.0, abs(dense)):
        raise PipelineError(
            f"{type(model).__name__}: the fused loss of {len(batch['target_rows'])} rows is {fused:.6g}, the dense "
            f"formula on the model's own logits gives {dense:.6g}; it does something to its logits that the fused loss "
            "does not know, so that it would be trained towards something else. This student is not supported."
        )


def dense_loss(logits_NV: Tensor, batch: dict[str, Any], head: HeadLoss) -> Tensor:
    """(1 - alpha) CE + alpha T^2 D by dense log-softmaxes in float64; a mean over the rows."""
    temperature, labels_N1 = batch["temperature"], batch["shift_labels"][:, None]
    cross_entropy_N = -torch.log_softmax(logits_NV, 1).gather(1, labels_N1).squeeze(1)
    values = (batch["teacher_probs"].double(), batch["teacher_tail"].double())
    targets = make_row_targets(batch["teacher_ids"], *values, batch["tail"], logits_NV.shape[1])
    if "teacher_entropy" in batch:
        targets = targets._replace(entropy_term_N=-batch["teacher_entropy"].double())
    log_q_NV = torch.log_softmax(logits_NV / temperature, 1)
    entries_NK = log_q_NV.gather(1, targets.ids_NK)
    is_stored_NV = torch.zeros_like(log_q_NV, dtype=torch.bool).scatter_(1, targets.ids_NK, True)
    rest_N = torch.logsumexp(log_q_NV.masked_fill(is_stored_NV, -1e30), 1)
    if head.divergence != "forward":
        entries_NK = entries_NK.masked_fill(~targets.is_entry_NK, -1e30)
        sides = (targets.weights_NK, targets.bucket_N, entries_NK, rest_N[:, None])
        divergence_N = bucket_divergence(head.divergence, *sides)[0]
    else:
        divergence_N = targets.entropy_term_N - (targets.weights_NK * entries_NK).sum(1) - targets.bucket_N * rest_N
        if targets.level_N is not None:
            divergence_N = divergence_N - targets.level_N * log_q_NV.masked_fill(is_stored_NV, 0.0).sum(1)
    return ((1 - head.alpha) * cross_entropy_N + head.alpha * temperature**2 * divergence_N).mean()


def first_rows(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The first ROWS target tokens, and no more of the sequence than they need."""
    columns = ("shift_labels", "target_rows", "teacher_ids", "teacher_probs", "teacher_tail", "teacher_entropy")
    cut = {name: batch[name][:ROWS] for name in columns if name in batch}
    length = int(cut["target_rows"].max()) + 1
    cut |= {name: batch[name][:1, :length] for name in ("input_ids", "position_ids")}
    on_device = {name: value.to(device) for name, value in cut.items()}
    return {**on_device, "temperature": batch["temperature"], "tail": batch["tail"]}
