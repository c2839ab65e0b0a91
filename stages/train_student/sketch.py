"""The sketch of a teacher's tail, as the loss reads it: a second, thin head, for logits of ids that are not stored.

Owns these logits. Knows nothing of students, of what is stored, or of divergences.

Shapes: N target tokens, V the real vocabulary, R coefficients of a token, S = R + 1 with a 1 that takes the offset,
P the sketch's vocabulary with padding behind it.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # a machine with a GPU may have little more than torch
    from pipeline.sketch import TailSketch

_ALIGNMENT = 16
"""Rows are multiples of so many elements: the kernel of a GPU reads them in vectors."""


@dataclass(frozen=True, eq=False)
class SketchHead:
    """What all tokens have in common. No parameter and no buffer of a model: no checkpoint holds it."""

    weight_SP: Tensor
    """Columns of the basis as rows; the last one is the offset."""
    vocab_size: int
    softcap: float | None = None

    @classmethod
    def of(cls, offset_V: Tensor, basis_VR: Tensor, softcap: float | None = None) -> "SketchHead":
        """Of offset and basis; raises ValueError for what does not fit, or is not finite."""
        if basis_VR.ndim != 2 or offset_V.shape != basis_VR.shape[:1]:
            raise ValueError(
                f"sketch: offset_V of shape {tuple(offset_V.shape)} and basis_VR of {tuple(basis_VR.shape)}, expected "
                "(V,) and (V, R)."
            )
        if softcap is not None and not 0 < softcap < float("inf"):
            raise ValueError(f"sketch: a softcap of {softcap}, expected a positive number.")
        weight_SV = torch.cat([basis_VR.T, offset_V[None]])
        if not weight_SV.isfinite().all():
            raise ValueError("sketch: offset_V or basis_VR holds values that are not finite.")
        return cls(torch.nn.functional.pad(weight_SV, (0, -len(offset_V) % _ALIGNMENT)), len(offset_V), softcap)

    @classmethod
    def of_cache(cls, sketch: "TailSketch") -> "SketchHead":
        """Of what a cache holds."""
        return cls.of(torch.from_numpy(sketch.offset), torch.from_numpy(sketch.basis), sketch.softcap)

    @property
    def rank(self) -> int:
        """Coefficients of a token."""
        return len(self.weight_SP) - 1

    def to(self, device: torch.device) -> "SketchHead":
        """The same on another device."""
        return dataclasses.replace(self, weight_SP=self.weight_SP.to(device))


@dataclass(frozen=True, eq=False)
class SketchedTails:
    """The tails' logits over T, of N target tokens, in the dtype of the loss; up to a constant of the row."""

    coefficients_NS: Tensor
    """With the factors that the logits need before a cap: of T, or of the cap."""
    weight_SV: Tensor
    cap: float | None
    """The soft cap over T."""

    @classmethod
    def of(
        cls, coefficients_NR: Tensor, head: SketchHead, temperature: float, vocab_size: int, dtype: torch.dtype
    ) -> "SketchedTails":
        """Those of tokens at a temperature; ids from `vocab_size` on are none."""
        ones_N1 = coefficients_NR.new_ones(len(coefficients_NR), 1)
        coefficients_NS = torch.cat([coefficients_NR, ones_N1], 1).to(dtype) / (head.softcap or temperature)
        cap = None if head.softcap is None else head.softcap / temperature
        return cls(coefficients_NS, head.weight_SP.to(dtype)[:, :vocab_size], cap)

    def __getitem__(self, rows: slice) -> "SketchedTails":
        return dataclasses.replace(self, coefficients_NS=self.coefficients_NS[rows])

    def logits(self) -> Tensor:
        """[N, V]."""
        return self.write_(self.coefficients_NS.new_empty(len(self.coefficients_NS), self.weight_SV.shape[1]))

    def write_(self, out_NV: Tensor) -> Tensor:
        """Fills `out_NV` with the logits over T."""
        torch.mm(self.coefficients_NS, self.weight_SV, out=out_NV)
        return out_NV if self.cap is None else out_NV.tanh_().mul_(self.cap)
