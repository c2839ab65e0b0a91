"""Cached sequences as training batches.

Shapes: B sequences of a batch, S their padded length, M target tokens of the whole batch,
K stored entries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.approximate import approximated
from pipeline.cache.reader import Cache
from pipeline.formats.layout import CachedSequence
from pipeline.targets import SparseTargets, restricted
from stages.train_student.loss_settings import LossSettings
from stages.train_student.positions import ENTROPIES
from stages.train_student.sources import SOURCES
from stages.train_student.tails import DRAWN_TAILS, TAILS
from stages.train_student.targets import DistillationTargets, TeacherTargets, require_values


class CacheDataset(Dataset[CachedSequence]):
    """A cache as a torch dataset, in the student's vocabulary; every worker process opens its own files.

    With `approximate`, a temperature, targets have that one too, approximated by the cache's sketch of the tail if it
    was not captured; a cache without either raises ConfigError when it is read.
    """

    def __init__(self, cache: Cache, vocab_size: int, approximate: float | None = None) -> None:
        self.cache, self._vocab_size = cache, vocab_size
        self._approximate = None if approximate in cache.manifest.temperatures else approximate
        self._is_restricted = vocab_size < cache.manifest.vocab_size

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> CachedSequence:
        sequence = self.cache[index]
        if self._approximate is not None:
            targets = approximated(sequence.targets, self.cache.sketch, self._approximate)
            sequence = replace(sequence, targets=targets)
        if self._is_restricted:
            sequence = replace(sequence, targets=restricted(sequence.targets, self._vocab_size))
        return sequence


@dataclass(frozen=True, kw_only=True)
class SourcedSequence(CachedSequence):
    """A sequence of a mixture."""

    source: int
    """Number of the cache or view that it is from."""


class MixedDataset(Dataset[CachedSequence]):
    """Several caches as one, each behind the one before."""

    def __init__(self, parts: Sequence[CacheDataset]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> CachedSequence:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of a mixture of {len(self)}")
        source = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[source]
        sequence = part[index - int(self._ends[source]) + len(part)]
        values = {field.name: getattr(sequence, field.name) for field in fields(CachedSequence)}
        return SourcedSequence(**values, source=source)


class Collate:
    """Makes a batch of sequences; a callable object, so that worker processes can be sent it.

    Position ids restart with every document: most kinds of models then keep attention inside it, and isolation.py finds
    the others.
    """

    def __init__(self, settings: LossSettings, *, with_entropies: bool = False) -> None:
        """`with_entropies` for a choice of positions by the teacher's entropy."""
        self._settings, self._with_entropies = settings, with_entropies

    def __call__(self, sequences: list[CachedSequence]) -> dict[str, Any]:
        """Tensors named as the student's forward takes them; raises ValueError for targets that cannot be.

        input_ids, position_ids  int64 [B, S]
        target_rows              int64 [M]: the rows of the flattened [B * S] hidden states that predict the labels
        shift_labels             int64 [M]: the tokens to predict, sequence by sequence
        teacher_ids              int64 [M, K]
        teacher_probs            float32 [M, K]: p_T over the full vocabulary, restricted to the ids
        teacher_tail             float32 [M]: p_T of all other ids
        teacher_entropy          float32 [M], for a tail of draws alone: of p_T over the full vocabulary, nats
        teacher_coefficients     float32 [M, R], for a tail that is sketched alone
        labels                   the labels again
        keys                     hexadecimal names of the sequences
        sources                  int64 [M], of a mixture: the number of the source of every target
        target_entropies         float32 [M], if asked for: of the teacher's p_T over the full vocabulary, nats

        With a tail of draws, K counts the draws too: a repeated draw is one entry with its draws' weight,
        and the place of the others is padding, which repeats the row's first id with probability 0.
        """
        input_ids, position_ids = stack_rows(
            [(sequence.token_ids, sequence.document_lengths) for sequence in sequences]
        )
        starts = np.arange(len(sequences)) * input_ids.shape[1]
        rows = np.concatenate([start + sequence.target_positions for start, sequence in zip(starts, sequences)])
        targets = self.targets(sequences)
        batch = {"input_ids": input_ids, "position_ids": position_ids, "target_rows": _int64(rows)}
        batch |= targets.as_batch()
        batch["labels"] = targets.labels_M  # the Trainer counts target tokens only where it sees this name
        if sourced := [each for each in sequences if isinstance(each, SourcedSequence)]:
            batch[SOURCES] = _int64(np.concatenate([np.full(len(each.targets), each.source) for each in sourced]))
        if self._with_entropies:
            entropies = [sequence.targets.entropy(self._settings.temperature) for sequence in sequences]
            batch[ENTROPIES] = torch.from_numpy(np.concatenate(entropies))
        return batch | {"keys": [sequence.key.hex() for sequence in sequences]}

    def targets(self, sequences: list[CachedSequence]) -> DistillationTargets:
        """What is learnt from the sequences, one after the other."""
        temperature, teachers = self._settings.temperature, [sequence.targets for sequence in sequences]
        labels = [sequence.token_ids[sequence.target_positions + 1] for sequence in sequences]
        ids, probs = _equally_wide(list(map(self._entries, teachers)))
        entropy = None
        if self._settings.tail in DRAWN_TAILS:
            entropy = torch.from_numpy(np.concatenate([teacher.entropy(temperature) for teacher in teachers]))
        coefficients = None
        if TAILS[self._settings.tail].is_sketched:
            coefficients = coefficients_of(teachers)
        targets = DistillationTargets(
            labels_M=_int64(np.concatenate(labels)),
            teacher=TeacherTargets(
                ids_MK=_int64(ids),
                probs_MK=torch.from_numpy(probs),
                tail_mass_M=torch.from_numpy(np.concatenate([teacher.tail_mass(temperature) for teacher in teachers])),
                entropy_M=entropy,
                coefficients_MR=coefficients,
            ),
        )
        require_values(targets, self._settings.vocab_size)
        return targets

    def _entries(self, targets: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
        """int32 and float32 [N, K]: the ids that are given, and their weights."""
        temperature = self._settings.temperature
        if self._settings.tail not in DRAWN_TAILS:
            return targets.ids, targets.probs(temperature)
        drawn, weights = merge_draws(targets.draws, targets.tail_mass(temperature))
        ids, probs = np.hstack([targets.ids, drawn]), np.hstack([targets.probs(temperature), weights])
        return np.where((probs > 0) | (np.arange(ids.shape[1]) < targets.top_k), ids, ids[:, :1]), probs


def _equally_wide(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [N, K] of several parts, filled up to the widest with the row's first id and weight 0."""
    width = max(ids.shape[1] for ids, _ in parts)
    filled = []
    for ids, probs in parts:
        if missing := width - ids.shape[1]:
            ids = np.hstack([ids, np.repeat(ids[:, :1], missing, axis=1)])
            probs = np.pad(probs, ((0, 0), (0, missing)))
        filled.append((ids, probs))
    all_ids, all_probs = (np.concatenate(column) for column in zip(*filled))
    return all_ids, all_probs


def stack_rows(rows: Sequence[tuple[np.ndarray, Iterable[int]]]) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids, int64 [B, S], of rows of token ids and the lengths of their documents.

    Padding is a document of its own behind the others, without targets.
    """
    longest = max(len(token_ids) for token_ids, _ in rows)
    input_ids, position_ids = np.zeros((2, len(rows), longest), np.int64)
    for row, (token_ids, lengths) in enumerate(rows):
        length = len(token_ids)
        input_ids[row, :length] = token_ids
        padding = [longest - length] if length < longest else []
        position_ids[row] = np.concatenate([np.arange(n) for n in [*lengths, *padding]])
    return torch.from_numpy(input_ids), torch.from_numpy(position_ids)


def merge_draws(draws_ND: np.ndarray, tail_mass_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 and float32 [N, D]: each drawn id once, with tail mass / D a draw; weight 0 on what is left over.

    The first id of a row keeps a weight wherever the row has a tail.
    """
    num_rows, num_draws = draws_ND.shape
    ids = np.sort(draws_ND, axis=1)
    is_first = np.ones(ids.shape, bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(is_first)
    counts = np.zeros(ids.size, np.float32)
    counts[starts] = np.diff([*starts, ids.size])
    return ids, counts.reshape(num_rows, num_draws) * (tail_mass_N / np.float32(num_draws))[:, None]


def coefficients_of(teachers: Sequence[SparseTargets]) -> Tensor:
    """float32 [M, R]: of the tails' sketches, one piece of targets after the other."""
    return torch.from_numpy(np.concatenate([teacher.coefficients for teacher in teachers]).astype(np.float32))


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
