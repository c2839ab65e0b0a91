"""Steps that must not pass in silence: the rule, and what is written down.

A step is bad if its loss or its gradient's norm is not finite, or if its loss is a spike: more than SPIKE_DEVIATIONS
deviations above the median of the last HISTORY good steps, once there are MIN_HISTORY of them. A deviation is 1.4826
times the median distance from the median (a normal distribution's sigma), counted as at least 5% of the median, so
that a spike is at least twice the median. Bad steps never enter the history.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path

from pipeline.errors import PipelineError

HISTORY, MIN_HISTORY = 100, 20
SPIKE_DEVIATIONS = 20.0
BAD_STEPS = "bad_steps.jsonl"
BAD_LOSS_ACTIONS = {"stop": "stopped", "skip": "skipped"}
"""What a run may do at a bad step, and how that is written down."""


class TrainingStoppedError(PipelineError):
    """A bad step, and the settings say to stop at one."""


class StepGuard:
    """Judges the loss of every optimizer step."""

    def __init__(self) -> None:
        self.history: deque[float] = deque(maxlen=HISTORY)

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, in words; None if nothing is."""
        if not math.isfinite(loss):
            return f"a loss of {loss}"
        if not math.isfinite(grad_norm):
            return f"a gradient of norm {grad_norm} at a loss of {loss:.6g}"
        if len(self.history) >= MIN_HISTORY:
            median = statistics.median(self.history)
            spread = 1.4826 * statistics.median(abs(known - median) for known in self.history)
            limit = median + SPIKE_DEVIATIONS * max(spread, 0.05 * abs(median))
            if loss > limit:
                return (
                    f"a loss of {loss:.6g}, above {limit:.6g}; the median of {len(self.history)} steps is {median:.6g}"
                )
        self.history.append(loss)
        return None


def record_bad_step(folder: Path, step: int, problem: str, action: str, keys: list[str]) -> str:
    """Append the step and its sequences to bad_steps.jsonl; returns the line for a person."""
    path = folder / BAD_STEPS
    entry = {"step": step, "problem": problem, "action": action, "keys": keys}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{path}: step {step}: {problem}; {action}; its {len(keys)} sequences: {shown}"
