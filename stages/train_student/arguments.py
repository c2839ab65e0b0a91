"""What the settings of a run mean to transformers.Trainer."""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import TrainingArguments

from pipeline.errors import ConfigError
from stages.train_student.compat import transformers_hooks
from stages.train_student.sampler import StepShape
from stages.train_student.schedules import learning_rate_schedule
from stages.train_student.settings import TrainConfig
from stages.train_student.shardings import SHARDINGS

CHECKPOINTS = "checkpoints"


def num_steps(config: TrainConfig, num_sequences: int, shape: StepShape) -> int:
    """Optimizer steps of the run; the last one may go a little past the epochs that were asked for."""
    return config.max_steps or math.ceil(config.epochs * num_sequences / shape.global_batch)


def training_arguments(config: TrainConfig, steps: int, *, evaluates: bool) -> TrainingArguments:
    """The Trainer's arguments; nothing of the data, which has a loader of its own."""
    on_gpu = torch.cuda.is_available()
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    in_training = evaluates and config.eval_steps is not None
    arguments = TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        ignore_data_skip=True,  # the sampler starts at the step itself
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # it would put the mean of earlier losses in the place of a nan
        save_steps=config.save_steps,
        eval_strategy="steps" if in_training else "no",
        eval_steps=config.eval_steps if in_training else None,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
        **learning_rate_schedule(config.schedule, config.decay_ratio, steps),
        **_sharding(config),
    )
    transformers_hooks.one_gpu_a_process(arguments)
    transformers_hooks.require_sharding(arguments, config.sharding)
    return arguments


def computation(arguments: TrainingArguments) -> AbstractContextManager[None]:
    """The types that a training computes in."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return nullcontext() if dtype is None else torch.autocast(arguments.device.type, dtype)


def _sharding(config: TrainConfig) -> dict[str, Any]:
    if not SHARDINGS[config.sharding]:
        return {}
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(f"sharding is {config.sharding!r} without ranks; start the command under torchrun.")
    return {"fsdp": True, "fsdp_config": dict(SHARDINGS[config.sharding])}
