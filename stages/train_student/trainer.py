"""transformers.Trainer with the fused loss: what it logs, and how it evaluates."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pipeline.progress import Progress, Reporter
from stages.train_student.dataset import CacheDataset, Collate

LOG = "log.jsonl"


class DistillationTrainer(Trainer):
    """A Trainer whose model returns a DistillationOutput; logs the two terms beside the loss."""

    def __init__(self, *, eval_temperatures: tuple[float, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The loss divides by the target tokens of the whole step: the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self._eval_temperatures = eval_temperatures
        self._terms: dict[str, Tensor] = {}
        self._terms_since_step = 0
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the mean over the target tokens of the step, on all ranks."""
        if num_items_in_batch is None:
            raise RuntimeError("the Trainer did not count the step's target tokens; the loss would be off by a factor")
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        if not self._terms:
            self._terms_since_step = self.state.global_step
        for name in ("cross_entropy", "kl"):
            self._terms[name] = self._terms.get(name, 0) + getattr(outputs, name).detach()
        loss = outputs.loss
        loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the two terms over the steps since the last line."""
        if "loss" in logs and self._terms:
            steps = self.state.global_step - self._terms_since_step
            for name, total in self._terms.items():
                logs[name] = self.accelerator.reduce(total, "sum").item() / steps
            self._terms, self._terms_since_step = {}, self.state.global_step
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the target tokens of the held-out cache, nats.

        cross_entropy, and kl_T for every T of `eval_temperatures`: with a ghost tail, whatever the training's,
        so that students can be compared; a lower bound on the full KL where k is below the vocabulary.
        """
        dataset = eval_dataset or self.eval_dataset
        metrics: dict[str, float] = {}
        for temperature in self._eval_temperatures:
            cross_entropy, kl, count = self._evaluation_sums(dataset, temperature)
            metrics[f"{metric_key_prefix}_cross_entropy"] = cross_entropy / count
            metrics[f"{metric_key_prefix}_kl_{temperature:g}"] = kl / count
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_sums(self, dataset: CacheDataset, temperature: float) -> list[float]:
        """Cross-entropy, KL and the number of target tokens, summed over the ranks, each with its own share."""
        share = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        loader = DataLoader(share, batch_size=self.args.per_device_eval_batch_size, collate_fn=Collate(temperature))
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch in loader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                outputs = self.model(**inputs, num_items_in_batch=1)
            count = outputs.kl.new_tensor(len(inputs["shift_labels"]))
            sums += torch.stack([outputs.cross_entropy, outputs.kl, count])
        self.model.train()
        return self.accelerator.reduce(sums, "sum").tolist()


class ReportProgress(TrainerCallback):
    """Shows steps and the latest loss; keeps the log as JSON lines."""

    def __init__(self, reporter: Reporter, folder: Path) -> None:
        self._reporter, self._folder = reporter, folder
        self._progress = Progress()
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the log again from what the checkpoint knows: a killed run may have logged steps that it lost."""
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            (self._folder / LOG).write_text(lines, encoding="utf-8")
            self._progress = self._reporter.progress("train-student", state.max_steps - state.global_step, "steps")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One optimizer step is done."""
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
            file.write(json.dumps(state.log_history[-1]) + "\n")
        shown = {name: logs[name] for name in ("loss", "cross_entropy", "kl", "eval_cross_entropy") if name in logs}
        self._note = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items()) or self._note

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No more steps."""
        self._progress.close()
