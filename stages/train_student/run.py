"""The command `pipeline train-student`, from its settings to a finished student."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from pipeline.config import TrainConfig, resolved
from pipeline.errors import CacheMismatchError, ConfigError, PipelineError
from pipeline.files import publish, read_json, sync_folder, write_json
from pipeline.manifest import TOKENIZER, CacheManifest
from pipeline.progress import Reporter
from pipeline.shards.reader import Cache, open_cache
from pipeline.targets import column_of
from pipeline.tokenizer import load_tokenizer
from stages.train_student.checkpoints import MarkWhole, newest_whole_checkpoint, remove_torn_checkpoints
from stages.train_student.dataset import CacheDataset, Collate
from stages.train_student.head import attach_fused_loss
from stages.train_student.student import Student, read_student
from stages.train_student.trainer import DistillationTrainer, ReportProgress

RUN = "run.json"
METRICS = "metrics.json"
CHECKPOINTS = "checkpoints"
FREE_TO_CHANGE = ("out", "log_steps", "save_steps", "keep_checkpoints")
"""Settings that do not change what is trained: a resumed run may have others."""


def train_student(config: TrainConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train the student, write it to `config.out` and return its metrics.

    The folder holds the student as `save_pretrained` writes it, metrics.json, log.jsonl and
    checkpoints. Killed and run again, it continues from the newest whole checkpoint; once finished,
    it returns the metrics without training.
    """
    reporter = reporter or Reporter()
    cache = open_cache(config.cache)
    _require_targets(config, cache.manifest)
    held_out = open_cache(config.eval_cache) if config.eval_cache is not None else None
    if held_out is not None:
        _require_same_targets(config, cache.manifest, held_out.manifest)
    student = read_student(config.student, cache.manifest)
    _open_folder(config, cache.manifest)
    if (config.out / METRICS).is_file():
        reporter.log(f"{config.out}: finished before; nothing to do.")
        return read_json(config.out / METRICS, PipelineError)
    trainer = _trainer(config, student, cache, held_out, reporter)
    checkpoint = newest_whole_checkpoint(config.out / CHECKPOINTS)
    if trainer.is_world_process_zero():
        remove_torn_checkpoints(config.out / CHECKPOINTS)
        reporter.log(_announcement(config, trainer, cache, checkpoint))
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = {"steps": outcome.global_step, "train_seconds": outcome.metrics["train_runtime"]}
    if held_out is not None:
        metrics |= trainer.evaluate()
        metrics["eval_teacher_cross_entropy"] = _teacher_cross_entropy(held_out)
    metrics["tokens_seen"] = int(outcome.global_step * _step_sequences(config, trainer) * _mean_tokens(cache))
    if trainer.is_world_process_zero():
        _write_student(trainer, config.out, config.cache / TOKENIZER)
        write_json(config.out / METRICS, metrics)
    return metrics


def _trainer(
    config: TrainConfig, student: Student, cache: Cache, held_out: Cache | None, reporter: Reporter
) -> DistillationTrainer:
    arguments = _training_arguments(config, evaluates=held_out is not None)
    model = student.load(config.seed)
    attach_fused_loss(model, alpha=config.alpha, vocab_size=cache.manifest.vocab_size)
    captured = cache.manifest.temperatures
    return DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=CacheDataset(cache),
        eval_dataset=CacheDataset(held_out) if held_out is not None else None,
        data_collator=Collate(config.temperature, config.tail),
        eval_temperatures=tuple(sorted({config.temperature, *({1.0} & set(captured))})),
        callbacks=[MarkWhole(), ReportProgress(reporter, config.out)],
    )


def _training_arguments(config: TrainConfig, evaluates: bool) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    in_training = evaluates and config.eval_steps is not None
    return TrainingArguments(
        output_dir=str(config.out / CHECKPOINTS),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        eval_strategy="steps" if in_training else "no",
        eval_steps=config.eval_steps if in_training else None,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        dataloader_num_workers=2 if on_gpu else 0,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
    )


def _require_targets(config: TrainConfig, manifest: CacheManifest) -> None:
    """Refuse a temperature or a tail that the cache does not hold."""
    column_of(manifest.temperatures, config.temperature)
    if config.tail == "hybrid" and config.temperature != manifest.draw_temperature:
        drawn = "no draws" if manifest.draw_temperature is None else f"draws at T={manifest.draw_temperature:g} alone"
        raise ConfigError(
            f"{config.cache}: tail 'hybrid' at T={config.temperature:g} needs draws from the teacher's tail; it has "
            f"{drawn}; cache again with --tail-samples and --draw-temperature {config.temperature:g}."
        )
    if config.tail != "hybrid" and manifest.top_k == 0:
        raise ConfigError(f"{config.cache}: holds draws alone (top_k is 0); take --tail hybrid, not {config.tail!r}.")


def _require_same_targets(config: TrainConfig, train: CacheManifest, held_out: CacheManifest) -> None:
    difference = held_out.tokenizer.difference(train.tokenizer)
    if difference:
        raise CacheMismatchError(f"{config.eval_cache}: its tokenizer is not that of {config.cache}: {difference}.")
    column_of(held_out.temperatures, config.temperature)
    if held_out.top_k == 0:
        raise ConfigError(f"{config.eval_cache}: holds draws alone (top_k is 0); an evaluation needs a top k.")


def _open_folder(config: TrainConfig, manifest: CacheManifest) -> None:
    """Record what is trained in the output folder, or check that it is the run that is there."""
    run = {key: value for key, value in resolved(config).items() if key not in FREE_TO_CHANGE}
    run |= {"world_size": int(os.environ.get("WORLD_SIZE", "1")), "cache_corpus": manifest.corpus}
    if os.environ.get("RANK", "0") != "0":
        return  # rank 0 looks for all
    path = config.out / RUN
    if not path.is_file():
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise ConfigError(f"{config.out}: exists and holds no training run; choose another --out or empty it.")
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
    known = read_json(path, PipelineError)
    different = [key for key in run if run[key] != known.get(key)]
    if different:
        found = "; ".join(f"{key} was {known.get(key)!r}, now {run[key]!r}" for key in different)
        raise ConfigError(f"{config.out}: holds a run with other settings: {found}; choose another --out.")


def _announcement(config: TrainConfig, trainer: DistillationTrainer, cache: Cache, checkpoint: Path | None) -> str:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    start = f"from {checkpoint.name}" if checkpoint else "from the start"
    return (
        f"{config.out}: training {parameters / 1e6:,.1f}M parameters on {len(cache):,} sequences "
        f"({cache.manifest.num_targets:,} targets), alpha {config.alpha:g}, T {config.temperature:g}, "
        f"{config.tail} tail, {start}"
    )


def _write_student(trainer: DistillationTrainer, folder: Path, tokenizer: Path) -> None:
    """The student and its tokenizer, whole: the config, without which nothing loads it, comes last."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".student-") as scratch:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(scratch)
        load_tokenizer(tokenizer).save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "config.json"):
            publish(path, folder / path.name)
    sync_folder(folder)


def _teacher_cross_entropy(cache: Cache) -> float | None:
    """Mean negative log-probability that the teacher gives to the labels; None if T = 1 was not captured."""
    if 1.0 not in cache.manifest.temperatures:
        return None
    total = sum(float(-sequence.targets.label_logprobs(1.0).sum(dtype=np.float64)) for sequence in cache)
    return total / cache.manifest.num_targets


def _step_sequences(config: TrainConfig, trainer: DistillationTrainer) -> int:
    return config.batch_size * config.gradient_accumulation * trainer.args.world_size


def _mean_tokens(cache: Cache) -> float:
    return cache.manifest.num_tokens / len(cache)
