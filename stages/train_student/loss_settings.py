"""What the loss of a run is, beside its batches. Loads no torch."""

import math
from dataclasses import dataclass

from stages.train_student.divergences import DIVERGENCES
from stages.train_student.tails import DIVERGING_TAILS, TAILS


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss (1 - alpha) CE + alpha T^2 D of a student; raises ValueError for what cannot be."""

    vocab_size: int
    """Rows of the head from here on are padding."""
    alpha: float = 0.5
    """Where a call does not say."""
    temperature: float = 2.0
    tail: str = "ghost"
    divergence: str = "forward"
    logit_scale: float = 1.0
    """Multiplies the logits (Cohere, Granite)."""
    logit_softcap: float | None = None
    """c then makes them c tanh(logits / c) (Gemma 2)."""

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise ValueError(f"tail: {self.tail!r}, choose one of: {', '.join(TAILS)}.")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: {self.divergence!r}, choose one of: {', '.join(DIVERGENCES)}.")
        if self.divergence != "forward" and self.tail not in DIVERGING_TAILS:
            raise ValueError(
                f"divergence: {self.divergence!r} with tail {self.tail!r}, expected tail "
                f"{' or '.join(map(repr, DIVERGING_TAILS))}: it needs a whole p_T."
            )
        require_alpha(self.alpha)
        for name in ("temperature", "logit_scale", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: {value}, expected a positive number.")


def require_alpha(alpha: float) -> None:
    """Raises ValueError for what is no weight."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha}, expected a weight of the KL from 0 to 1.")
