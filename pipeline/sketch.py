"""The tail sketch: a few coefficients a target that say what the teacher's tail looks like.

Owns the sketch of a whole cache, offset and basis. Knows nothing of shards, temperatures or students.

Shapes: N targets, V the teacher's vocabulary, R coefficients of a target.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class TailSketch:
    """Makes approximate logits of a teacher from the coefficients of a target: offset + basis @ coefficients.

    They serve for ids that are not stored alone: what is stored is exact, and so is the mass of the rest.
    """

    offset: np.ndarray
    """float32 [V]: the logits where all coefficients are 0."""
    basis: np.ndarray
    """float32 [V, R]."""
    softcap: float | None = None
    """c then makes the logits c tanh(logits / c), as the teacher does (Gemma 2)."""

    def __post_init__(self) -> None:
        assert self.offset.ndim == 1
        assert self.basis.ndim == 2
        assert len(self.basis) == len(self.offset)

    @property
    def rank(self) -> int:
        """Coefficients of a target."""
        return self.basis.shape[1]

    def logits(self, coefficients_NR: np.ndarray) -> np.ndarray:
        """float32 [N, V]: the approximate logits, at T = 1, up to a constant of the row."""
        logits_NV = coefficients_NR.astype(np.float32) @ self.basis.T + self.offset
        if self.softcap is None:
            return logits_NV
        cap = np.float32(self.softcap)
        return cap * np.tanh(logits_NV / cap)
