"""Training and measuring a cell. The loss is the project's, on batches of the project's cache; the live one is ours.

Every recipe at a seed has the same initial weights, the same sequences in the same order and the same optimizer (AdamW,
cosine, clipped at 1, as train-student has it by default): what differs is what stands for the teacher.

Shapes: M target tokens of a batch, V vocabulary, H hidden size.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.fidelity.cells import HARD, LIVE, RECIPES, Cell, Recipe
from benchmarks.fidelity.measures import direction, finished, measure_rows
from benchmarks.fidelity.study import INPUTS, Study
from benchmarks.fidelity.teacher import ROWS, StoredTeacher, bytes_per_token
from pipeline.cache.reader import Cache
from pipeline.cache.statistics import SKETCH_KL
from stages.train_student.dataset import Collate, stack_rows
from stages.train_student.head import HeadFunction, attach_fused_loss, token_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.sampler import StepShape, StreamSampler
from stages.train_student.sketch import SketchHead
from stages.train_student.student import read_student
from stages.train_student.targets import DistillationTargets

WEIGHT_DECAY, CLIP, WARMUP = 0.1, 1.0, 0.03
INPUT_COLUMNS = ("input_ids", "position_ids", "target_rows")
GRADIENT_TOKENS = (64, 256, 1024)
"""Target tokens of the batches on which gradients are compared."""


def live_loss(
    hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, teacher_logits_MV: Tensor, alpha: float, temperature: float
) -> Tensor:
    """(1 - alpha) CE + alpha T^2 KL(p_T || q_T), a mean over the tokens, of whole rows of logits in float32 or better.

    Hinton et al., arXiv 1503.02531; written from the formula, with nothing of the project's loss in it.
    """
    with torch.autocast(hidden_MH.device.type, enabled=False):
        logits_MV = hidden_MH.to(teacher_logits_MV.dtype) @ weight_VH.to(teacher_logits_MV.dtype).T
        cross_entropy = F.cross_entropy(logits_MV, labels_M)
        log_q_MV = F.log_softmax(logits_MV / temperature, 1)
        log_p_MV = F.log_softmax(teacher_logits_MV / temperature, 1)
        kl = F.kl_div(log_q_MV, log_p_MV, reduction="batchmean", log_target=True)
        return (1 - alpha) * cross_entropy + alpha * temperature**2 * kl


def loss_function(
    recipe: Recipe,
    batch: dict[str, Any],
    settings: LossSettings,
    teacher: StoredTeacher,
    sequences: list[int],
    cache: Cache,
) -> HeadFunction:
    """What makes a loss of hidden states and head under a recipe, of sequences of its cache."""
    sketch = SketchHead.of_cache(cache.sketch) if recipe.rank and cache.sketch is not None else None
    targets = DistillationTargets.of_batch(batch, sketch)
    if recipe.name == LIVE:
        hidden = torch.cat([teacher.hidden_of(sequence) for sequence in sequences])
        return lambda hidden_MH, weight_VH, adapter=None: live_loss(
            hidden_MH, weight_VH, targets.labels_M, teacher.logits(hidden), settings.alpha, settings.temperature
        )
    if recipe.name == HARD:
        targets = DistillationTargets(labels_M=targets.labels_M)
    fused = token_loss(targets, settings, settings.alpha)
    return lambda hidden_MH, weight_VH, adapter=None: fused(hidden_MH, weight_VH, adapter=adapter).loss


def settings_of(cell: Cell, vocab_size: int) -> LossSettings:
    """The loss of a cell; of recipes without a cache, its weights alone count."""
    tail = cell.recipe.name if cell.recipe.is_cached else "ghost"
    return LossSettings(vocab_size=vocab_size, alpha=cell.alpha, temperature=cell.temperature, tail=tail)


def start_model(study: Study, cell: Cell) -> tuple[Any, Cache, LossSettings]:
    """The student of a cell before its first step, the cache that feeds it, and its loss."""
    cache = study.cache_of(cell)
    student = read_student(study.student(cell.student), cache)
    settings = settings_of(cell, student.vocab_size)
    model = student.load(cell.seed)
    attach_fused_loss(model, settings)
    return model, cache, settings


def run_cell(study: Study, cell: Cell) -> dict[str, Any]:
    """Train a cell and measure it on held-out text."""
    model, cache, settings = start_model(study, cell)
    started = time.process_time()  # a machine that is shared says nothing by its wall clock
    losses = _train(study, cell, model, cache, settings)
    trained_s = time.process_time() - started
    measured = evaluate(model, study.held_out)
    return {
        "bytes_per_token": bytes_per_token(cache) if cell.recipe.is_cached else None,
        "sketch": sketch_of(cache) if cell.recipe.rank else None,
        "held_out": measured,
        "last_loss": float(np.mean(losses[-8:])),
        "train_cpu_seconds": round(trained_s, 1),
        "evaluation_cpu_seconds": round(time.process_time() - started - trained_s, 1),
        "corpus": study.fingerprints,
        "tokens": study.token_counts,
    }


def sketch_of(cache: Cache) -> dict[str, Any]:
    """Bytes of a cache's sketch, and its errors: KL(p_T || what is rebuilt) in nats, over all targets."""
    statistics = [commit.statistics[SKETCH_KL] for commit in cache.commits]
    weights = [commit.num_targets for commit in cache.commits]
    contents = cache.sketch_contents() or b""
    return {"bytes": len(contents), "mean_kl": np.average(statistics, axis=0, weights=weights).tolist()}


def _train(study: Study, cell: Cell, model: Any, cache: Cache, settings: LossSettings) -> list[float]:
    scale, collate = study.scale, Collate(settings)
    shape = StepShape(batch_size=scale.batch_size, accumulation=1)
    optimizer = _optimizer(model, study.learning_rate(cell))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(scale.steps))
    model.train()
    losses = []
    with study.reporter.progress(cell.name, scale.steps, "steps") as progress:
        for sequences in StreamSampler(len(cache), cell.seed, shape, scale.steps):
            batch = collate(cache.batch(sequences))
            function = loss_function(cell.recipe, batch, settings, study.train, sequences, cache)
            with _products(scale.dtype):
                loss = model(**{name: batch[name] for name in INPUT_COLUMNS}, measure=function)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.advance(1, f"loss {losses[-1]:.3f}")
    return losses


def _optimizer(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up over the first 3% of the steps, then half a cosine down to 0."""
    rise = max(1, math.ceil(WARMUP * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


def _products(dtype: str) -> contextlib.AbstractContextManager[Any]:
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, dtype))


@torch.inference_mode()
def evaluate(model: Any, held_out: StoredTeacher) -> dict[str, float]:
    """Means over the held-out targets, in float32, against the teacher's whole distribution."""
    model.eval()
    totals: dict[str, Tensor] = {}
    for hidden_MH, weight_VH, labels_M, teacher_MH in _held_out_rows(model, held_out):
        for rows in torch.arange(len(labels_M)).split(ROWS):
            logits = (held_out.logits(teacher_MH[rows]), hidden_MH[rows] @ weight_VH.T)
            for name, value in measure_rows(*logits, labels_M[rows]).items():
                totals[name] = totals.get(name, 0) + value
    return finished(totals)


def _held_out_rows(model: Any, teacher: StoredTeacher) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Student's hidden states, its head, labels and the teacher's hidden states, some sequences at a time."""
    sequences = list(teacher.corpus.rows())
    for start in range(0, len(sequences), 8):
        part = sequences[start : start + 8]
        input_ids, position_ids = stack_rows([(row.token_ids, row.document_lengths) for row in part])
        width = input_ids.shape[1]
        rows = np.concatenate([index * width + row.target_positions for index, row in enumerate(part)])
        labels = np.concatenate([row.token_ids[row.target_positions + 1] for row in part])
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "target_rows": _int64(rows)}
        hidden_MH, weight_VH = model(**inputs, measure=_states)
        teacher_MH = torch.cat([teacher.hidden_of(start + index) for index in range(len(part))])
        yield hidden_MH, weight_VH, _int64(labels), teacher_MH


@torch.inference_mode()
def states_of(model: Any, held_out: StoredTeacher) -> tuple[Tensor, Tensor]:
    """float32 [N, H] of a student at all held-out targets, in order, and its head [V, H]."""
    parts = list(_held_out_rows(model.eval(), held_out))
    return torch.cat([hidden_MH for hidden_MH, *_ in parts]), parts[0][1]


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def compare_gradients(study: Study, student: str, seed: int = 0, only: Sequence[str] = ()) -> dict[str, Any]:
    """Directions of the head's gradient at the start, alpha 1, to that of live KD on the same tokens.

    By temperature, recipe and target tokens of the batch; the hidden states are the student's own, in float32. `only`
    are labels of recipes; none takes all.
    """
    model, cache, settings = start_model(
        study, Cell(student=student, recipe=INPUTS, temperature=1.0, alpha=1.0, seed=seed)
    )
    batches = {size: _first_sequences(study, len(cache), seed, size) for size in GRADIENT_TOKENS}
    hiddens, weight_VH = {}, model.get_output_embeddings().weight.detach().requires_grad_(True)
    for size, sequences in batches.items():
        batch = Collate(settings)(cache.batch(sequences))
        with torch.no_grad():
            hiddens[size], _ = model(**{name: batch[name] for name in INPUT_COLUMNS}, measure=_states)
    found: dict[str, Any] = {}
    for temperature in (1.0, 2.0):
        references: dict[int, Tensor] = {}
        for recipe in RECIPES:
            if recipe.name == HARD or (only and recipe.label not in (LIVE, *only)):
                continue
            cell = Cell(student=student, recipe=recipe, temperature=temperature, alpha=1.0, seed=seed)
            cache = study.cache_of(cell)
            settings = settings_of(cell, cache.manifest.vocab_size)
            for size, sequences in batches.items():
                batch = Collate(settings)(cache.batch(sequences))
                loss_function(recipe, batch, settings, study.train, sequences, cache)(
                    hiddens[size], weight_VH
                ).backward()
                gradient, weight_VH.grad = weight_VH.grad, None
                if recipe.name == LIVE:
                    references[size] = gradient
                    continue
                by_recipe = found.setdefault(f"T{temperature:g}", {}).setdefault(recipe.label, {})
                by_recipe[str(size)] = direction(gradient, references[size])._asdict()
            study.reporter.log(f"gradients: {cell.name}")
    return found


def measure_ends(study: Study, student: str) -> dict[str, Any]:
    """Held-out figures of the student before its first step, and of the teacher itself."""
    cell = Cell(student=student, recipe=INPUTS, temperature=1.0, alpha=1.0, seed=0)
    start = evaluate(start_model(study, cell)[0], study.held_out)
    teacher = AutoModelForCausalLM.from_pretrained(study.teacher_folder, dtype=torch.float32)
    attach_fused_loss(teacher, settings_of(cell, teacher.config.vocab_size))
    return {"before training": start, "teacher": evaluate(teacher, study.held_out)}


def _first_sequences(study: Study, num_sequences: int, seed: int, num_tokens: int) -> list[int]:
    """The sequences that a training would begin with, until they have so many targets."""
    chosen, count = [], 0
    order = StreamSampler(num_sequences, seed, StepShape(batch_size=1, accumulation=1), num_sequences)
    for (sequence,) in order:
        chosen.append(sequence)
        count += len(study.train.hidden_of(sequence))
        if count >= num_tokens:
            break
    return chosen


def _states(hidden_MH: Tensor, weight_VH: Tensor, adapter: Any = None) -> tuple[Tensor, Tensor]:
    """What a head is given, as a HeadFunction."""
    return hidden_MH, weight_VH
