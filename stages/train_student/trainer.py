"""transformers.Trainer with the fused loss: its data, what it judges of every step, and what it logs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl

from pipeline.drain import Drain
from pipeline.errors import PipelineError
from stages.train_student.checkpoints import Mark, whole_or_gone
from stages.train_student.compat import accelerate_hooks, transformers_hooks
from stages.train_student.compat.transformers_hooks import not_called
from stages.train_student.evaluation import Evaluation, measured
from stages.train_student.gradients import GradientWatch
from stages.train_student.guards import StepGuard
from stages.train_student.loader import BatchLoader
from stages.train_student.ranks import from_all_ranks
from stages.train_student.schedules import AlphaSchedule
from stages.train_student.sources import SUMMED
from stages.train_student.step_positions import StepPositions

TERMS = ("loss", "cross_entropy", "kl")


class DistillationTrainer(Trainer):
    """A Trainer whose model returns a DistillationOutput and whose batches come from a BatchLoader.

    Before every optimizer step the ranks add up their losses, and whether a signal asked one of them to stop, in one
    collective: they judge the step, and leave, together. `on_bad_step(step, problem, keys)` is told of a bad step on
    every rank with the keys of all; unless it raises, the step is skipped: no weight, no moment moves.
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        batches: BatchLoader,
        alpha: AlphaSchedule,
        evaluations: dict[str, Evaluation],
        drain: Drain,
        on_bad_step: Any,
        epochs_per_step: float,
        log_note: Callable[[str], None],
        has_router_loss: bool = False,
        positions: StepPositions | None = None,
        sources: Sequence[str] = (),
        before_training: Callable[["DistillationTrainer"], None] = lambda trainer: None,
        **kwargs: Any,
    ) -> None:
        self._has_accelerator = False
        super().__init__(**kwargs)
        if not self._has_accelerator:
            raise not_called("Trainer.create_accelerator_and_postprocess", "a model may not be sharded as asked")
        transformers_hooks.count_tokens_once(self)
        self._before_training = before_training
        self.drained = False
        self.guard = StepGuard()
        self._batches, self._alpha, self._evaluations = batches, alpha, evaluations
        self._drain, self._on_bad_step, self._positions = drain, on_bad_step, positions
        self.epochs_per_step = epochs_per_step
        self._tokens = 0
        self._grad_norm: float | None = None
        """Of the step that is under way; None until it is known."""
        self._saved_step = 0
        self._step_terms: Tensor | None = None
        self._step_keys: list[str] = []
        self.terms = TERMS + (("router_loss",) if has_router_loss else ())
        self._sources = sources
        self.sums, self.good_steps = self._no_sums(), 0
        self._gradients, self._log_note = GradientWatch(), log_note
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepHooks(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Have a model sharded wherever that was asked for."""
        super().create_accelerator_and_postprocess()
        self._has_accelerator = True
        if self.args.fsdp_plugin_args is not None:
            accelerate_hooks.insist_on_fsdp(self.accelerator.state, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> Any:
        """The run's own loader: it knows ranks, and where a resumed run begins."""
        return self._batches

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step and the number of their targets on all ranks, which no loss then waits for.

        Of targets that `positions` does not keep there is neither loss nor count.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens += sum(batch["input_ids"].numel() for batch in batches)
        if self._positions is not None:
            num_items = self._positions.keep(batches, self.state.global_step)
        return batches, None if num_items is None else int(num_items)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the mean over the target tokens of the step, on all ranks."""
        if not isinstance(num_items_in_batch, int):
            raise not_called("Trainer.get_batch_samples", "nothing counted the step's target tokens")
        self._step_keys += inputs.pop("keys")
        with self.accelerator.autocast():  # of sharded models accelerate does not see to it
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch, alpha=self.alpha)
        terms = torch.stack([getattr(outputs, name).detach() for name in self.terms])
        if outputs.by_source is not None:
            terms = torch.cat([terms, outputs.by_source.flatten().to(terms.dtype)])
        self._step_terms = terms if self._step_terms is None else self._step_terms + terms
        loss = outputs.loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, outputs) if return_outputs else loss

    @property
    def alpha(self) -> float:
        """Weight of the distillation term in the step that is under way."""
        return self._alpha.at(self.state.global_step, self.state.max_steps)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        self._grad_norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        return self._grad_norm

    def judge_step(self) -> None:
        """Let the step happen, or drop its gradients."""
        assert self._step_terms is not None
        if self._grad_norm is None:
            raise not_called("Trainer._get_grad_norm", "a gradient that is not finite would move the weights")
        asked_to_stop = self._step_terms.new_tensor([float(self._drain.requested)])
        total = self.accelerator.reduce(torch.cat([self._step_terms, asked_to_stop]), "sum").tolist()
        *terms, num_asked = total
        self.drained = num_asked > 0
        norm = 0.0 if self.args.fp16 else self._grad_norm  # the loss scaler of float16 overflows by design
        problem = self.guard.judge(terms[0], norm)
        if problem is None:
            self.sums = [known + term for known, term in zip(self.sums, terms)]
            self.good_steps += 1
            note = self._gradients.look(self.model, self.state.max_steps, lambda t: self.accelerator.reduce(t, "sum"))
            if note is not None and self.is_world_process_zero():
                self._log_note(note)
        else:
            self._on_bad_step(self.state.global_step + 1, problem, self._all_keys())
            self.optimizer.zero_grad()  # AdamW leaves a parameter without a gradient as it is
        self._step_terms, self._step_keys, self._grad_norm = None, [], None

    def _all_keys(self) -> list[str]:
        return [key for keys in from_all_ranks(self._step_keys) for key in keys]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the good steps since the last line, in the place of the Trainer's own loss; and the speed."""
        if "loss" in logs:
            steps = max(self.good_steps, 1) if self.good_steps else float("nan")
            logs |= {name: total / steps for name, total in zip(self.terms, self.sums)}
            seconds, waiting = self._batches.waiting.read()
            logs["alpha"] = self._alpha.at(max(self.state.global_step - 1, 0), self.state.max_steps)
            logs["tokens_per_second"] = round(self._tokens * self.args.world_size / seconds, 1)
            logs["data_wait_share"] = round(waiting, 5)
            logs |= self._means_by_source()
            self._tokens = 0
            self.sums, self.good_steps = self._no_sums(), 0
        super().log(logs, start_time)

    def _no_sums(self) -> list[float]:
        """Of the terms, and behind them of what is summed by source."""
        return [0.0] * (len(self.terms) + len(SUMMED) * len(self._sources))

    def _means_by_source(self) -> dict[str, float]:
        """Over the targets of each source that had any since the last line; and how many it had."""
        found = {}
        for number, source in enumerate(self._sources):
            start = len(self.terms) + number * len(SUMMED)
            values = dict(zip(SUMMED, self.sums[start : start + len(SUMMED)]))
            found[f"{SUMMED[0]}/{source}"] = values[SUMMED[0]]
            if values[SUMMED[0]]:
                found |= {f"{name}/{source}": values[name] / values[SUMMED[0]] for name in SUMMED[1:]}
        return found

    def progress(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside the Trainer's own state, for a log that continues to the bit."""
        return {"sums": self.sums, "good_steps": self.good_steps, "history": list(self.guard.history)}

    def restore(self, mark: Mark) -> None:
        """Continue from the `progress()` in the mark of a checkpoint."""
        if len(mark.sums) != len(self.sums):
            raise PipelineError(f"the mark of step {mark.step} has {len(mark.sums)} sums; expected {len(self.sums)}.")
        self.sums, self.good_steps = mark.sums, mark.good_steps
        self.guard.history.extend(mark.history)
        self._batches.batch_sampler.first_step = mark.step

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of `evaluation.Evaluation` on the held-out caches: over all of them, and of several each alone."""
        found = measured({name: evaluation.sums(self) for name, evaluation in self._evaluations.items()})
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.start_clock()
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with whole_or_gone(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)
            self._saved_step = self.state.global_step

    def begin(self) -> None:
        """Training begins: the model lies where it is trained."""
        if self.is_fsdp_enabled:
            accelerate_hooks.require_sharded(self.model)
        self._before_training(self)
        self.start_clock()

    def require_judged(self) -> None:
        """Raises PipelineError if the step that has ended was not judged."""
        if self._step_terms is not None:
            raise not_called("TrainerCallback.on_pre_optimizer_step", "a bad step would not be noticed")

    def require_saved(self) -> None:
        """Raises PipelineError if a checkpoint was not written by `_save_checkpoint`."""
        if self._saved_step != self.state.global_step:
            raise not_called("Trainer._save_checkpoint", "a full disk would leave a torn checkpoint")

    def start_clock(self) -> None:
        """Training time begins now: neither start-up nor an evaluation is any."""
        self._batches.waiting.read()
        self._tokens = 0


class _StepHooks(TrainerCallback):
    """Calls the trainer where its own loop has no method to override."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.judge_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._trainer.require_judged()
        state.epoch = state.global_step * self._trainer.epochs_per_step
        if self._trainer.drained:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.require_saved()
