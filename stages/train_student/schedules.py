"""How alpha and the learning rate go over the steps of a run."""

from dataclasses import dataclass
from typing import Any

from stages.train_student.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule:
    """alpha at every optimizer step.

    constant: always `peak`. linear: from `peak` at the first step to `end` at the last. wsd (warm-up, stable, decay;
    arXiv 2410.16215): linearly from 0 to `peak` in the first `warmup_ratio` of the steps, then `peak`, then linearly to
    `end` in the last `decay_ratio`.
    """

    shape: str
    peak: float
    end: float
    warmup_ratio: float
    decay_ratio: float

    @classmethod
    def of(cls, config: TrainConfig) -> "AlphaSchedule":
        """The schedule that the settings ask for."""
        return cls(
            shape=config.alpha_schedule,
            peak=config.alpha,
            end=config.alpha_end,
            warmup_ratio=config.warmup_ratio,
            decay_ratio=config.decay_ratio,
        )

    def at(self, step: int, num_steps: int) -> float:
        """alpha of the step that follows `step` finished ones."""
        if self.shape == "constant":
            return self.peak
        progress = step / max(1, num_steps - 1)
        if self.shape == "linear":
            return self.peak + (self.end - self.peak) * progress
        if progress < self.warmup_ratio:
            return self.peak * progress / self.warmup_ratio
        decayed = max(0.0, progress - (1 - self.decay_ratio)) / max(self.decay_ratio, 1e-12)
        return self.peak + (self.end - self.peak) * min(1.0, decayed)


def learning_rate_schedule(config: TrainConfig, num_steps: int) -> dict[str, Any]:
    """The Trainer's arguments for the learning rate."""
    if config.schedule != "wsd":
        return {"lr_scheduler_type": config.schedule}
    decay = {"num_decay_steps": round(config.decay_ratio * num_steps), "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
