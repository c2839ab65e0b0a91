"""The choice of a step's positions, over all of its micro-batches and ranks.

By the teacher's entropy or at random the share is one of the whole step: the same positions, however micro-batches and
ranks share the sequences. The student's entropies of a step are there only when the model has seen all of it, so that
by these the share is one of every sequence, which no division of a step changes either: how many are kept is known
before, and student_entropy.py finds out which.

Shapes: M target rows of a micro-batch, N targets of a step.
"""

from typing import Any

import numpy as np
import torch

from stages.train_student.positions import ENTROPIES, KEPT, PositionRule, largest, random_scores
from stages.train_student.ranks import from_all_ranks, rank
from stages.train_student.sources import SOURCES
from stages.train_student.targets import DistillationTargets


class StepPositions:
    """Keeps a rule's share of the targets of every step."""

    def __init__(self, rule: PositionRule, seed: int) -> None:
        self._rule, self._seed = rule, seed

    def keep(self, batches: list[dict[str, Any]], step: int) -> int:
        """Leave the kept targets alone in this rank's micro-batches of a step; returns their number on all ranks.

        A collective. `step` counts the steps before this one.
        """
        if self._rule.by == "student-entropy":
            return self._announce(batches)
        scores = [self._scores(batch) for batch in batches]
        of_ranks = from_all_ranks(scores)
        order = [(micro_batch, of) for micro_batch in range(len(batches)) for of in range(len(of_ranks))]
        parts = [of_ranks[of][micro_batch] for micro_batch, of in order]  # the order of the sampler's stream
        scores_N = np.concatenate(parts)
        if self._rule.by == "random":
            scores_N = random_scores(len(scores_N), self._seed, step)
        kept_N = largest(scores_N, self._rule.count(len(scores_N)))
        kept = np.split(kept_N, np.cumsum([len(part) for part in parts])[:-1])
        for (micro_batch, of), kept_M in zip(order, kept):
            if of == rank():
                _take(batches[micro_batch], torch.from_numpy(np.flatnonzero(kept_M)))
        return int(kept_N.sum())

    def _scores(self, batch: dict[str, Any]) -> np.ndarray:
        """float32 [M]: what the rule goes by; of a random one the length alone is meant."""
        if self._rule.by == "random":
            return np.zeros(len(batch["target_rows"]), np.float32)
        entropies: torch.Tensor = batch.pop(ENTROPIES)
        return entropies.numpy()

    def _announce(self, batches: list[dict[str, Any]]) -> int:
        for batch in batches:
            rows, (num_rows, width) = batch["target_rows"], batch["input_ids"].shape
            sizes = torch.bincount(rows // width, minlength=num_rows).tolist()
            batch[KEPT] = [(size, self._rule.count(size)) for size in sizes]
        return sum(from_all_ranks(sum(kept for batch in batches for _, kept in batch[KEPT])))


def _take(batch: dict[str, Any], rows: torch.Tensor) -> None:
    """Leave some of a micro-batch's targets."""
    batch["target_rows"] = batch["target_rows"][rows]
    batch |= DistillationTargets.of_batch(batch).rows(rows).as_batch()
    for name in {"labels", SOURCES} & batch.keys():
        batch[name] = batch[name][rows]
