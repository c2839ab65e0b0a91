"""How alpha and the learning rate go over the steps of a run, by the names that settings take. Loads no torch."""

from dataclasses import dataclass
from typing import Any

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "wsd": "warmup_stable_decay",
    "constant": "constant",
    "constant_with_warmup": "constant_with_warmup",
}
"""Shapes of the learning rate, and what the Trainer calls them."""


def learning_rate_schedule(shape: str, decay_ratio: float, num_steps: int) -> dict[str, Any]:
    """The Trainer's arguments for the learning rate."""
    arguments: dict[str, Any] = {"lr_scheduler_type": SCHEDULES[shape]}
    if shape == "wsd":
        decay = {"num_decay_steps": round(decay_ratio * num_steps), "decay_type": "linear"}
        arguments["lr_scheduler_kwargs"] = decay
    return arguments


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule:
    """alpha at every optimizer step."""

    shape: str
    """A name of ALPHA_SCHEDULES."""
    peak: float
    end: float
    warmup_ratio: float
    decay_ratio: float

    def at(self, step: int, num_steps: int) -> float:
        """alpha of the step that follows `step` finished ones."""
        return ALPHA_SCHEDULES[self.shape](self, step / max(1, num_steps - 1))


def _constant(schedule: AlphaSchedule, progress: float) -> float:
    """Always `peak`."""
    return schedule.peak


def _linear(schedule: AlphaSchedule, progress: float) -> float:
    """From `peak` at the first step to `end` at the last."""
    return schedule.peak + (schedule.end - schedule.peak) * progress


def _warmup_stable_decay(schedule: AlphaSchedule, progress: float) -> float:
    """From 0 to `peak` in the first `warmup_ratio` of the steps, then `peak`, then to `end` in the last `decay_ratio`
    (arXiv 2410.16215)."""
    if progress < schedule.warmup_ratio:
        return schedule.peak * progress / schedule.warmup_ratio
    decayed = max(0.0, progress - (1 - schedule.decay_ratio)) / max(schedule.decay_ratio, 1e-12)
    return schedule.peak + (schedule.end - schedule.peak) * min(1.0, decayed)


ALPHA_SCHEDULES = {"constant": _constant, "linear": _linear, "wsd": _warmup_stable_decay}
