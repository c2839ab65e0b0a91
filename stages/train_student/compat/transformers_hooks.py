"""What DistillationTrainer relies on inside transformers, and what would go wrong in silence without it.

| hook                               | without it                                                              |
|------------------------------------|-------------------------------------------------------------------------|
| Trainer._get_grad_norm             | no norm reaches the guard: a gradient that is not finite moves weights  |
| Trainer._save_checkpoint           | a full disk leaves a torn checkpoint, and says something else           |
| Trainer._prepare_inputs            | held-out batches stay on the CPU                                        |
| Trainer.create_accelerator_and_postprocess | FSDP2 on a CPU is DDP; mixed precision rounds the batch         |
| Trainer.model_accepts_loss_kwargs  | the loss is divided by the micro-batches once more                      |
| Trainer.get_batch_samples          | nothing counts the target tokens of a step                              |
| TrainerCallback.on_pre_optimizer_step | no step is judged                                                    |
| TrainingArguments._n_gpu           | several GPUs of one process become DataParallel                         |
| TrainingArguments.fsdp_plugin_args | what is asked of FSDP2 is not what is done                              |

`require` looks for them at the start. That the Trainer still calls them shows in every step: trainer.py notes each
call, and `not_called` is the error where one is missing.
"""

import functools
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from pipeline.errors import PipelineError
from stages.train_student.compat.changed import changed
from stages.train_student.shardings import SHARDINGS

_changed = functools.partial(changed, "transformers", "5.19")
_TRAINER = (
    *("_get_grad_norm", "_save_checkpoint", "_prepare_inputs", "create_accelerator_and_postprocess"),
    *("get_batch_samples", "compute_loss", "get_train_dataloader"),
)
_CALLBACK = ("on_train_begin", "on_pre_optimizer_step", "on_step_end", "on_save")


def require() -> None:
    """Raises PipelineError where a method that stage two overrides is gone."""
    for owner, names in ((Trainer, _TRAINER), (TrainerCallback, _CALLBACK)):
        for name in names:
            if not hasattr(owner, name):
                raise _changed(f"{owner.__name__}.{name}", "is gone")


def not_called(hook: str, consequence: str) -> PipelineError:
    """The error of a hook that is there and was not called."""
    return _changed(hook, f"was not called: {consequence}")


def count_tokens_once(trainer: Trainer) -> None:
    """The loss divides by the target tokens of the whole step: the Trainer must not divide again."""
    if not hasattr(trainer, "model_accepts_loss_kwargs"):
        raise _changed("Trainer.model_accepts_loss_kwargs", "is gone; the loss would be divided twice")
    trainer.model_accepts_loss_kwargs = True


def one_gpu_a_process(arguments: TrainingArguments) -> None:
    """More GPUs are torchrun's: the Trainer would take DataParallel."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    if arguments.n_gpu > 1:
        raise _changed("TrainingArguments._n_gpu", "has no effect; DataParallel would be taken")


def require_sharding(arguments: TrainingArguments, sharding: str) -> None:
    """Raises PipelineError unless transformers hands on what a sharding asks for: it ignores what it does not know."""
    asked = SHARDINGS[sharding]
    handed_on = getattr(arguments, "fsdp_plugin_args", None)
    if not asked and handed_on is None:
        return
    found: dict[str, Any] = handed_on or {}
    names = {"version": "fsdp_version"}
    lost = [key for key, value in asked.items() if _plain(found.get(names.get(key, key))) != _plain(value)]
    if lost or not asked:
        raise _changed("TrainingArguments.fsdp_plugin_args", f"is {found}, asked was {asked}: {lost} differ")


def _plain(value: Any) -> str:
    """Of what is handed on as a flag or as a word."""
    return str(value).lower()
