"""The student's cross-entropies at the targets of a cache, one pass: what `pipeline select` calls learnability by.

Shapes: M target rows, C rows of a chunk, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.errors import ConfigError
from pipeline.formats.layout import CachedSequence
from pipeline.hidden import first_forward
from pipeline.hub import located
from pipeline.progress import Reporter
from pipeline.selection.settings import SelectConfig
from stages.train_student.agreement import require_agreement
from stages.train_student.dataset import CacheDataset, Collate, stack_rows
from stages.train_student.evaluation import CHUNK_BYTES, head_logits
from stages.train_student.head import attach_fused_loss
from stages.train_student.isolation import isolate_documents, probe
from stages.train_student.loss_settings import LossSettings
from stages.train_student.student import Student, read_student


def student_losses(
    config: SelectConfig, cache: Cache, reporter: Reporter
) -> Iterator[tuple[CachedSequence, np.ndarray]]:
    """Every sequence with the student's cross-entropies in nats at its targets, float32 [N], at T = 1."""
    config = located(config, "student", reporter)
    assert config.student is not None
    student = read_student(config.student, cache, trust_remote_code=config.trust_remote_code)
    if not student.has_weights:
        raise ConfigError(f"{config.student}: a student without weights has learnt nothing; give its folder.")
    settings = _settings(student, cache)
    with reporter.waiting("loading the student"):
        model = _ready(student, cache, settings, reporter)
    with reporter.progress("student", len(cache), "sequences") as progress:
        for start in range(0, len(cache), config.batch_size):
            sequences = [cache[row] for row in range(start, min(start + config.batch_size, len(cache)))]
            losses = _label_losses(model, sequences, settings).split([len(each.targets) for each in sequences])
            progress.advance(len(sequences))
            yield from ((sequence, own.numpy()) for sequence, own in zip(sequences, losses))


def _settings(student: Student, cache: Cache) -> LossSettings:
    """Of the loss that is compared with the model's own logits before anything is believed."""
    manifest = cache.manifest
    draws_alone = manifest.top_k == 0
    return LossSettings(
        vocab_size=student.vocab_size,
        temperature=manifest.draw_temperature or 1.0 if draws_alone else manifest.temperatures[0],
        tail="sampled" if draws_alone else "ghost",
        logit_scale=student.model.logit_scale,
        logit_softcap=student.model.logit_softcap,
    )


def _ready(student: Student, cache: Cache, settings: LossSettings, reporter: Reporter) -> Any:
    model = student.load(seed=0)
    attach_fused_loss(model, settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = CacheDataset(cache, student.vocab_size)
    batch = Collate(settings)([next(sequence for sequence in data if len(sequence.targets))])
    with first_forward(type(model).__name__):
        require_agreement(model, batch, settings)
        note = isolate_documents(model, model, probe(cache, cache.manifest.packing))
    for said in (*student.notes, *([] if note is None else [note])):
        reporter.note(said)
    return model.eval()


@torch.no_grad()
def _label_losses(model: Any, sequences: list[CachedSequence], settings: LossSettings) -> Tensor:
    """float32 [M]: of the target rows of a batch, sequence by sequence."""
    input_ids, position_ids = stack_rows([(each.token_ids, each.document_lengths) for each in sequences])
    starts = np.arange(len(sequences)) * input_ids.shape[1]
    rows = np.concatenate([start + each.target_positions for start, each in zip(starts, sequences)])
    labels = np.concatenate([each.token_ids[each.target_positions + 1] for each in sequences])
    device = next(model.parameters()).device
    target_rows = torch.from_numpy(rows.astype(np.int64))
    labels_M = torch.from_numpy(labels.astype(np.int64)).to(device)

    def measure(hidden_MH: Tensor, weight_VH: Tensor, *, adapter: tuple[Tensor, Tensor] | None) -> Tensor:
        size = max(1, CHUNK_BYTES // (4 * settings.vocab_size))
        parts = [torch.zeros(0, device=device)]
        for start in range(0, len(hidden_MH), size):
            logits_CV = head_logits(hidden_MH[start : start + size], weight_VH, adapter, settings)
            parts.append(torch.nn.functional.cross_entropy(logits_CV, labels_M[start : start + size], reduction="none"))
        return torch.cat(parts)

    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "target_rows": target_rows,
    }
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    with half:
        losses_M: Tensor = model(**{name: value.to(device) for name, value in batch.items()}, measure=measure)
    return losses_M.float().cpu()
