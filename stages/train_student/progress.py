"""What a run says while it trains: a bar or lines, and log.jsonl."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import ConfigError
from pipeline.progress import Progress, Reporter
from stages.train_student.ranks import rank
from stages.train_student.settings import TrainConfig

LOG = "log.jsonl"
STARVED = 0.05
"""Share of the time spent waiting for data from which on the loader, not the model, is called the limit."""


class ReportProgress(TrainerCallback):
    """Shows steps and the latest loss; keeps the log as JSON lines."""

    def __init__(self, reporter: Reporter, folder: Path) -> None:
        self._reporter, self._folder = reporter, folder
        self._progress = Progress()
        self._start = contextlib.ExitStack()
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the log again from what the checkpoint knows: a killed run may have logged steps that it lost."""
        if state.is_world_process_zero:
            lines = "".join(json_line(entry) for entry in state.log_history)
            (self._folder / LOG).write_text(lines, encoding="utf-8")
            self._progress = self._reporter.progress("train-student", state.max_steps, "steps")
            self._progress.recall(state.global_step)
            self._start.enter_context(self._reporter.waiting("train-student: the first step"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One optimizer step is done."""
        self._start.close()
        self._progress.advance(1, self._note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line of JSON."""
        if not state.is_world_process_zero or not logs:
            return
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json_line(state.log_history[-1]))
        shown = {name: logs[name] for name in ("loss", "cross_entropy", "kl", "eval_cross_entropy") if name in logs}
        note = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items())
        self._note = note + throughput(logs) or self._note

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No more steps."""
        self._start.close()
        self._progress.close()


def throughput(logs: dict[str, float]) -> str:
    """Tokens a second, and whether the data loader is the limit."""
    if "tokens_per_second" not in logs:
        return ""
    waiting = logs["data_wait_share"]
    verdict = f"; the data loader is the limit: {waiting:.0%} of the time, see --loader-workers"
    return f", {logs['tokens_per_second']:,.0f} tokens/s{verdict if waiting >= STARVED else ''}"


def json_line(entry: dict[str, Any]) -> str:
    """One line; a number that is not finite, which JSON does not know, is null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
    return json.dumps(plain) + "\n"


def tensorboard_callbacks(config: TrainConfig) -> list[TrainerCallback]:
    """A writer to OUT/tensorboard if the settings ask for one; raises ConfigError if nothing can write it."""
    if not config.tensorboard:
        return []
    from transformers.integrations import TensorBoardCallback

    try:
        from tensorboardX import SummaryWriter
    except ImportError as exc:
        raise ConfigError("tensorboard is set, but tensorboardX is not installed; `pip install tensorboardX`.") from exc
    return [TensorBoardCallback(SummaryWriter(str(config.out / "tensorboard")))] if rank() == 0 else []
