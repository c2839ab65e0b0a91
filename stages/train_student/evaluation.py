"""Held-out metrics of a student against the teacher's targets, summed over all ranks.

All are means over the target tokens, at T = 1 unless said otherwise. q is the student's distribution over the real
vocabulary, p the teacher's, S the stored ids, t the teacher's mass outside them.

cross_entropy      -log q(label), nats; exact
kl_T               KL(p_T || q_T) with a ghost tail, nats: a lower bound of the full one, whatever tail trains
kl_sketch_T        the same with a sketched tail, where such a one trains and the cache has a sketch, nats: of whole
                   distributions, of which the teacher's is approximate outside S
top1_agreement     how often the student's most probable id is the teacher's; exact
acceptance_min     sum over S of min(p, q): a lower bound of the rate at which speculative decoding accepts a draft of
acceptance_max     the student (arXiv 2211.17192, sum over all ids of min(p, q)); with min(t, 1 - q(S)), an upper bound.
                   Both are exact where t = 0
calibration_error  expected calibration error of the student's most probable id against the label, 15 equal bins
"""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from stages.train_student.dataset import CacheDataset, Collate, coefficients_of
from stages.train_student.loss_settings import LossSettings
from stages.train_student.row_loss import whole_log_probs
from stages.train_student.row_targets import make_row_targets
from stages.train_student.sketch import SketchHead
from stages.train_student.targets import TeacherTargets

BINS = 15
CHUNK_BYTES = 64 * 2**20
"""Of the float32 logits that exist at the same time."""


class Evaluation:
    """A held-out cache, and what to measure on it."""

    def __init__(
        self,
        data: CacheDataset,
        settings: LossSettings,
        temperatures: tuple[float, ...],
        batch_size: int,
        sketch: SketchHead | None = None,
    ) -> None:
        self._settings = dataclasses.replace(settings, tail="ghost", divergence="forward")
        self._data, self._temperatures, self._batch_size = data, temperatures, batch_size
        self._collate, self._sketch = Collate(self._settings), sketch

    def sums(self, trainer: Any) -> dict[str, Tensor]:
        """What `finish` makes metrics of, the same on every rank. All call the model equally often, as FSDP asks."""
        args, model = trainer.args, trainer.model
        model.eval()
        totals: dict[str, Tensor] = {}
        for start in range(0, len(self._data), self._batch_size * args.world_size):
            first = start + args.process_index * self._batch_size
            rows = range(first, min(first + self._batch_size, len(self._data)))
            sums = self._measure(trainer, list(rows) or [0])
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value * bool(rows)
        model.train()
        names = sorted(totals)
        return {name: trainer.accelerator.reduce(totals[name], "sum") for name in names}

    def _measure(self, trainer: Any, rows: list[int]) -> dict[str, Tensor]:
        sequences = [self._data[row] for row in rows]
        batch = trainer._prepare_inputs(self._collate(sequences))
        teachers, device = {}, trainer.args.device
        for temperature in self._temperatures:
            parts = [(s.targets.probs(temperature), s.targets.tail_mass(temperature)) for s in sequences]
            probs, tail = (torch.cat([torch.from_numpy(part) for part in column]) for column in zip(*parts))
            teachers[temperature] = (probs.to(device), tail.to(device))
        sketched = None
        if self._sketch is not None:
            self._sketch = self._sketch.to(device)
            sketched = self._sketch, coefficients_of([sequence.targets for sequence in sequences]).to(device)
        measure = functools.partial(
            measure_rows,
            labels_M=batch["shift_labels"],
            ids_MK=batch["teacher_ids"],
            teachers=teachers,
            settings=self._settings,
            sketched=sketched,
        )
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "target_rows")}
        with torch.no_grad(), trainer.accelerator.autocast():
            return trainer.model(**inputs, measure=measure)


def measure_rows(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    *,
    adapter: tuple[Tensor, Tensor] | None,
    labels_M: Tensor,
    ids_MK: Tensor,
    teachers: dict[float, tuple[Tensor, Tensor]],
    settings: LossSettings,
    sketched: tuple[SketchHead, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Sums over the target tokens, float64: what `finish` makes metrics of.

    `teachers` are p_T and tail mass by T, `sketched` a sketch with the tokens' coefficients [M, R], if there is one.
    """
    totals: dict[str, Tensor] = {}
    rows = max(1, CHUNK_BYTES // (4 * settings.vocab_size))
    with torch.autocast(hidden_MH.device.type, enabled=False):
        for start in range(0, len(hidden_MH), rows):
            chunk = slice(start, start + rows)
            logits_CV = head_logits(hidden_MH[chunk], weight_VH, _rows_of(adapter, chunk), settings)
            given = {T: (probs[chunk], tail[chunk]) for T, (probs, tail) in teachers.items()}
            sums = _chunk_sums(logits_CV, labels_M[chunk], ids_MK[chunk], given)
            if sketched is not None:
                sketch, coefficients_MR = sketched
                sums |= _sketch_sums(logits_CV, ids_MK[chunk], given, sketch, coefficients_MR[chunk], settings)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value
    return totals


def head_logits(
    hidden_MH: Tensor, weight_VH: Tensor, adapter: tuple[Tensor, Tensor] | None, settings: LossSettings
) -> Tensor:
    """float32 (float64 for float64 weights) logits over the real vocabulary, as the model itself would give them."""
    dtype = torch.promote_types(weight_VH.dtype, torch.float32)
    logits = hidden_MH.to(dtype) @ weight_VH[: settings.vocab_size].to(dtype).T
    if adapter is not None:
        logits += adapter[0].to(dtype) @ adapter[1][: settings.vocab_size].to(dtype).T
    return logits_of_products(logits, settings)


def logits_of_products(products_MV: Tensor, settings: LossSettings) -> Tensor:
    """What a model makes of the products of hidden states and head: scaled, and capped if it caps."""
    scale, cap = settings.logit_scale, settings.logit_softcap
    logits_MV = products_MV if scale == 1.0 else scale * products_MV
    return logits_MV if cap is None else cap * torch.tanh(logits_MV / cap)


def _rows_of(adapter: tuple[Tensor, Tensor] | None, chunk: slice) -> tuple[Tensor, Tensor] | None:
    return None if adapter is None else (adapter[0][chunk], adapter[1])


def _chunk_sums(
    logits_CV: Tensor, labels_C: Tensor, ids_CK: Tensor, teachers: dict[float, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    logprobs = torch.log_softmax(logits_CV, 1)
    confidence, best = logprobs.exp().max(1)
    correct = (best == labels_C).double()
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    columns = torch.stack([torch.ones_like(correct), confidence.double(), correct])
    sums = {
        "count": torch.tensor(len(labels_C), dtype=torch.float64, device=logits_CV.device),
        "cross_entropy": -logprobs.gather(1, labels_C[:, None]).double().sum(),
        "top1_agreement": (best == ids_CK[:, 0]).double().sum(),
        "calibration": columns.new_zeros(3, BINS).index_add_(1, bins, columns),
    }
    for temperature, (probs, tail) in teachers.items():
        log_q = logprobs if temperature == 1.0 else torch.log_softmax(logits_CV / temperature, 1)
        kept = log_q.gather(1, ids_CK)
        rest = torch.logsumexp(log_q.scatter(1, ids_CK, -math.inf), 1)
        kl = (torch.xlogy(probs, probs) - probs * kept).sum(1)
        kl += torch.where(tail > 0, torch.xlogy(tail, tail) - tail * rest, 0.0)
        sums[f"kl_{temperature:g}"] = kl.double().sum()
        if temperature == 1.0:
            low = torch.minimum(probs, kept.exp()).sum(1)
            sums["acceptance_min"] = low.double().sum()
            sums["acceptance_max"] = (low + torch.minimum(tail, rest.exp())).double().sum()
    return sums


def _sketch_sums(
    logits_CV: Tensor,
    ids_CK: Tensor,
    teachers: dict[float, tuple[Tensor, Tensor]],
    sketch: SketchHead,
    coefficients_CR: Tensor,
    settings: LossSettings,
) -> dict[str, Tensor]:
    """KL(p_T || q_T) at every T, where the sketch says how p_T lies on what is not stored."""
    sums = {}
    for temperature, (probs, tail) in teachers.items():
        teacher = TeacherTargets(
            ids_MK=ids_CK, probs_MK=probs, tail_mass_M=tail, coefficients_MR=coefficients_CR, sketch=sketch
        )
        at_T = dataclasses.replace(settings, tail="sketch", temperature=temperature)
        rows = make_row_targets(teacher, at_T, logits_CV.dtype)
        log_p_CV = whole_log_probs(rows)
        log_q_CV = torch.log_softmax(logits_CV / temperature, 1)
        sums[f"kl_sketch_{temperature:g}"] = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1).double().sum()
    return sums


def measured(sums_of: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Metrics over several caches together, as far as all of them have them, and `name/cache` of each alone."""
    parts = list(sums_of.values())
    common = [name for name in parts[0] if all(name in part for part in parts)]
    metrics = finish({name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in common})
    if len(parts) > 1:
        metrics |= {f"{name}/{cache}": value for cache, sums in sums_of.items() for name, value in finish(sums).items()}
    return metrics


def finish(sums: dict[str, Tensor]) -> dict[str, float]:
    """Metrics from sums over all target tokens."""
    count = sums["count"].item()
    totals, confidences, hits = sums["calibration"]
    metrics = {name: value.item() / count for name, value in sums.items() if name not in ("count", "calibration")}
    assert totals.sum().item() == count
    metrics["calibration_error"] = ((confidences - hits).abs().sum() / count).item()
    return metrics
