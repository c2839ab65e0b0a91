"""The command `pipeline train-student`, from its settings to a finished student."""

import functools
import pickle
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainingArguments, set_seed

from pipeline.cache.manifest import TOKENIZER
from pipeline.cpu import slow_products
from pipeline.documents import document_of
from pipeline.drain import Drain
from pipeline.errors import Drained, PipelineError
from pipeline.hidden import first_forward
from pipeline.hub import located
from pipeline.progress import Reporter
from pipeline.stores.sealed import read_json, write_json
from pipeline.tokenizer import load_tokenizer
from pipeline.watchdog import Watchdog
from stages.train_student.agreement import Computation, LossCheck, first_rows
from stages.train_student.arguments import CHECKPOINTS, computation, num_steps, training_arguments
from stages.train_student.checkpoints import (
    MarkWhole,
    newest_whole_checkpoint,
    read_mark,
    remove_torn_checkpoints,
    unpickling_problem,
)
from stages.train_student.checks import alone_in, approximation_note, open_folder, sketch_of
from stages.train_student.compat import accelerate_hooks, transformers_hooks
from stages.train_student.compat.torch_hooks import weights_only
from stages.train_student.coverage import coverage_notes
from stages.train_student.dataset import CacheDataset, Collate
from stages.train_student.evaluation import Evaluation
from stages.train_student.export import write_student
from stages.train_student.gradients import reaches_all
from stages.train_student.guards import BAD_LOSS_ACTIONS, TrainingStoppedError, record_bad_step
from stages.train_student.head import attach_fused_loss
from stages.train_student.isolation import Documents, isolate_documents, probe
from stages.train_student.loader import BatchLoader, watch_reading
from stages.train_student.lora import add_adapters
from stages.train_student.loss_settings import LossSettings
from stages.train_student.opened import Sources
from stages.train_student.positions import PositionRule
from stages.train_student.progress import ReportProgress, tensorboard_callbacks
from stages.train_student.ranks import on_any_rank, own_process_group, rank, world_size
from stages.train_student.report import write_report
from stages.train_student.routers import router_loss
from stages.train_student.sampler import StepShape
from stages.train_student.schedules import AlphaSchedule
from stages.train_student.settings import TrainConfig
from stages.train_student.step_positions import StepPositions
from stages.train_student.student import Student, special_token_notes
from stages.train_student.trainer import DistillationTrainer

METRICS = "metrics.json"


def train_student(config: TrainConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train the student, write it to `config.out` and return its metrics.

    The folder holds the student as `save_pretrained` writes it, metrics.json, log.jsonl, report.html and checkpoints.
    Killed and run again, it continues from the newest whole checkpoint; once finished, it returns the metrics without
    training. SIGTERM, SIGUSR1 or SIGINT to any rank: all of them save a checkpoint after the current step and raise
    Drained.
    """
    transformers_hooks.require()
    accelerate_hooks.require()
    with own_process_group(), ExitStack() as until_the_end:
        return _train_student(config, reporter or Reporter(), until_the_end)


def _train_student(config: TrainConfig, reporter: Reporter, until_the_end: ExitStack) -> dict[str, Any]:
    config = located(config, "student", reporter)
    sources = Sources.open(config)
    cache = sources.caches[0]
    student = sources.read_student(config)
    tokenizer = load_tokenizer(cache.folder / TOKENIZER, trust_remote_code=config.trust_remote_code)
    shape = StepShape(
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation,
        rank=rank(),
        world_size=world_size(),
    )
    manifests = [[cache.manifest for cache in caches] for caches in (sources.caches, sources.held_out.values())]
    open_folder(config, manifests[0], manifests[1], shape)
    if (config.out / METRICS).is_file():
        reporter.log(f"{config.out}: finished before; nothing to do.")
        return read_metrics(config.out)
    until_the_end.enter_context(alone_in(config.out))
    places = ", ".join(str(cache.place) for cache in sources.caches)
    watchdog = until_the_end.enter_context(closing(watch_reading(places, config.stall_s, reporter)))
    with Drain() as drain:
        with reporter.waiting("loading the student") if rank() == 0 else nullcontext():
            trainer = _trainer(config, student, sources, shape, drain, watchdog, reporter)
        train_seconds = _train(trainer, config, sources, student, tokenizer, reporter)
    caches = [*sources.caches, *sources.held_out.values()]
    metrics: dict[str, float | None] = {
        "train_seconds": train_seconds,
        "steps": trainer.state.global_step,
        **sources.taken(trainer.state.global_step * shape.global_batch),
    }
    if any(config.temperature not in known.manifest.temperatures for known in caches):
        metrics["approximate_temperature"] = config.temperature
    if sources.held_out:
        metrics |= trainer.evaluate()
        metrics |= sources.teacher_cross_entropy()
    ends = tuple(sorted({token for cache in sources.caches for token in cache.manifest.end_token_ids}))
    write_student(trainer, config, tokenizer, ends, lambda: _load(config, student), reporter)
    if trainer.is_world_process_zero():
        write_report(config, trainer.state.log_history, metrics, reporter)
        write_json(config.out / METRICS, metrics)
    return metrics


def read_metrics(out: Path) -> dict[str, Any]:
    """The metrics of a finished training."""
    document = read_json(out / METRICS, PipelineError)
    return document_of(dict[str, int | float | None], document, out / METRICS, PipelineError)


def _train(
    trainer: DistillationTrainer,
    config: TrainConfig,
    sources: Sources,
    student: Student,
    tokenizer: Any,
    reporter: Reporter,
) -> float:
    """Take every step that is left, and return the seconds they took; raises Drained if a signal came."""
    checkpoint = newest_whole_checkpoint(config.out / CHECKPOINTS)
    if checkpoint is not None:
        trainer.restore(read_mark(checkpoint))
    if trainer.is_world_process_zero():
        remove_torn_checkpoints(config.out / CHECKPOINTS)
        reporter.log(_announcement(config, trainer, sources, checkpoint))
        slow = [] if torch.cuda.is_available() else slow_products(config.dtype, "--dtype float32 is faster")
        for note in (*student.notes, *special_token_notes(student, tokenizer), *slow):
            reporter.note(note)
    try:
        with weights_only():
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (pickle.UnpicklingError, CheckpointException) as exc:
        if (reason := unpickling_problem(exc)) is None:
            raise
        raise PipelineError(
            f"{checkpoint}: a file of it is damaged, or wants code to be run ({reason}); delete the checkpoint to "
            "continue from the one before."
        ) from exc
    if trainer.drained and trainer.state.global_step < trainer.state.max_steps:
        raise Drained(
            f"{config.out}: a signal asked to stop; step {trainer.state.global_step} of {trainer.state.max_steps} is "
            "saved; run the same command again to continue."
        )
    return outcome.metrics["train_runtime"]


def _load(config: TrainConfig, student: Student) -> Any:
    model = student.load(config.seed)
    if config.lora_rank is None:
        return model
    set_seed(config.seed)
    return add_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha, on_head=config.lora_head)


def _trainer(
    config: TrainConfig,
    student: Student,
    sources: Sources,
    shape: StepShape,
    drain: Drain,
    watchdog: Watchdog,
    reporter: Reporter,
) -> DistillationTrainer:
    steps = num_steps(config, len(sources), shape)
    arguments = training_arguments(config, steps, evaluates=bool(sources.held_out))
    settings = LossSettings(
        vocab_size=student.vocab_size,
        alpha=config.alpha,
        temperature=config.temperature,
        tail=config.tail,
        divergence=config.divergence,
        logit_scale=student.model.logit_scale,
        logit_softcap=student.model.logit_softcap,
    )
    rule = None if config.positions is None else PositionRule.parse(config.positions)
    collate = Collate(settings, with_entropies=rule is not None and rule.by == "entropy")
    approximate = config.temperature if config.approximate_temperature else None
    dataset = sources.dataset(student.vocab_size, approximate)
    batch = collate([next(sequence for sequence in dataset if len(sequence.targets))])
    model, check = _ready_student(config, student, sources, batch, settings, arguments, reporter)
    held_out = {name: CacheDataset(cache, student.vocab_size, approximate) for name, cache in sources.held_out.items()}
    evaluations = {}
    for name, data in held_out.items():
        temperatures = tuple(sorted({config.temperature, *({1.0} & set(data.cache.manifest.temperatures))}))
        sketch = None if sources.sketch is None else sketch_of(data.cache)
        evaluations[name] = Evaluation(data, settings, temperatures, config.batch_size, sketch)
    on_gpu = torch.cuda.is_available()
    workers = config.loader_workers if config.loader_workers is not None else 2 if on_gpu else 0
    sampler = sources.sampler(config.seed, shape, steps)
    trainer = DistillationTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=next(iter(held_out.values()), None),
        batches=BatchLoader(dataset, collate, sampler, num_workers=workers, pin=on_gpu, watchdog=watchdog),
        alpha=AlphaSchedule(
            shape=config.alpha_schedule,
            peak=config.alpha,
            end=config.alpha_end,
            warmup_ratio=config.warmup_ratio,
            decay_ratio=config.decay_ratio,
        ),
        evaluations=evaluations,
        drain=drain,
        on_bad_step=_on_bad_step(config, reporter),
        epochs_per_step=shape.global_batch / len(sources),
        log_note=reporter.note,
        has_router_loss=check.router is not None,
        positions=None if rule is None else StepPositions(rule, config.seed),
        sources=sources.names if len(sources.names) > 1 else (),
        before_training=check.where_it_is_sharded,
    )
    trainer.add_callback(MarkWhole(config.keep_checkpoints, trainer.progress))
    trainer.add_callback(ReportProgress(reporter, config.out))
    for callback in tensorboard_callbacks(config):
        trainer.add_callback(callback)
    return trainer


def _ready_student(
    config: TrainConfig,
    student: Student,
    sources: Sources,
    batch: dict[str, Any],
    settings: LossSettings,
    arguments: TrainingArguments,
    reporter: Reporter,
) -> tuple[Any, LossCheck]:
    """The model with its loss, tried on the training's device; says what it needs and what of it is not trained."""
    model = _load(config, student)
    base = model.get_base_model() if config.lora_rank else model
    router, router_note = router_loss(base, config.router_aux_loss)
    attach_fused_loss(base, settings, router, sources.sketch, len(sources.caches))
    if config.sharding == "none":
        model.to(arguments.device)
    caches = [*sources.caches, *sources.held_out.values()]
    probes = [probe(known, known.manifest.packing, few_tokens=config.sharding != "none") for known in caches]
    check = LossCheck(base, batch, settings, router, sources.sketch)
    notes = _try_out(model, check, functools.partial(computation, arguments), probes)
    if world_size() > 1 and config.sharding == "none":
        arguments.ddp_find_unused_parameters = on_any_rank(not _reaches_all(model, batch))
    approximate_note = approximation_note(config, caches) if rank() == 0 else None
    for note in [*coverage_notes(model), *notes, router_note, approximate_note]:
        if note is not None and rank() == 0:
            reporter.note(note)
    return model, check


def _try_out(model: Any, check: LossCheck, gradients_in: Computation, probes: list[Documents]) -> list[str]:
    """Notes on what a student needs to be trained rightly; refuses one that cannot be.

    On the device of the training; a model that is to be sharded is still on the CPU.
    """
    base = check.base
    with first_forward(type(base).__name__):
        check.at_once(model, gradients_in)
        notes = [isolate_documents(model, base, documents) for documents in probes]
    base.one_by_one = on_any_rank(base.one_by_one)
    return list(dict.fromkeys(note for note in notes if note is not None))


def _reaches_all(model: Any, batch: dict[str, Any]) -> bool:
    return reaches_all(model, model(**first_rows(batch, next(model.parameters()).device)).loss)


def _on_bad_step(config: TrainConfig, reporter: Reporter) -> Any:
    """What is done about a bad step: written down by the first rank, and the end of the run unless it is skipped."""

    def act(step: int, problem: str, keys: list[str]) -> None:
        action = BAD_LOSS_ACTIONS[config.on_bad_loss]
        line = f"step {step}: {problem}"
        if rank() == 0:
            line = record_bad_step(config.out, step, problem, action, keys)
        if config.on_bad_loss == "stop":
            raise TrainingStoppedError(
                f"{line}. Look at the sequences, or run again with a lower --learning-rate in another --out, or with "
                "--on-bad-loss skip in this one."
            )
        reporter.note(line)

    return act


def _announcement(config: TrainConfig, trainer: DistillationTrainer, sources: Sources, checkpoint: Path | None) -> str:
    trained = [parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad]
    start = f"from {checkpoint.name}" if checkpoint else "from the start"
    targets = sum(cache.manifest.num_targets for cache in sources.caches)
    positions = "" if config.positions is None else f"positions {config.positions}, "
    return (
        f"{config.out}: training {sum(trained) / 1e6:,.1f}M parameters on {len(sources):,} sequences "
        f"({targets:,} targets{sources.described()}), alpha {config.alpha:g}, T {config.temperature:g}, "
        f"{config.tail} tail, {positions}{start}"
    )
