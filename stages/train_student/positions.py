"""Which of a step's target positions carry its loss: the rule that `--positions` names. Loads no torch.

Shapes: N target positions.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.hashes import seeded

RULES = ("entropy", "student-entropy", "random")
"""By the teacher's entropy, by the student's (SE-KD, arXiv 2602.01395), and a control."""
ENTROPIES = "target_entropies"
"""The teacher's entropies of a micro-batch's targets, where a rule asks for them, by their name in a batch."""
KEPT = "kept_of_sequences"
"""Of every sequence, how many targets it has and how many are kept, by their name in a batch."""


@dataclass(frozen=True)
class PositionRule:
    """The loss is kept on a share of the target positions."""

    by: str
    """One of RULES."""
    share: float

    @classmethod
    def parse(cls, text: str) -> "PositionRule":
        """The rule of a setting such as 'entropy:0.2'; raises ConfigError."""
        by, _, share = text.partition(":")
        try:
            rule = cls(by, float(share))
        except ValueError:
            rule = cls(by, 0.0)
        if by not in RULES or not 0 < rule.share <= 1:
            raise ConfigError(
                f"positions is {text!r}; expected RULE:SHARE such as entropy:0.2, with a share above 0 and at most 1 "
                f"and one of the rules: {', '.join(RULES)}."
            )
        return rule

    def count(self, num_positions: int) -> int:
        """How many of so many positions are kept: the nearest number to the share, 1 at least where there is one."""
        return min(num_positions, max(1, round(self.share * num_positions)))


def largest(scores_N: np.ndarray, count: int) -> np.ndarray:
    """bool [N]: the `count` largest scores; of equal ones those that come first."""
    if count == 0:
        return np.zeros(len(scores_N), bool)
    lowest = np.partition(scores_N, len(scores_N) - count)[len(scores_N) - count]
    kept = scores_N > lowest
    kept[np.flatnonzero(scores_N == lowest)[: count - int(kept.sum())]] = True
    return kept


def random_scores(count: int, seed: int, step: int) -> np.ndarray:
    """uint64 [count]: numbers that look random, other ones in every step."""
    return seeded(np.arange(count, dtype=np.uint64), seed, step)
