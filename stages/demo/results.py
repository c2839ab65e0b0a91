"""What a finished demo measured, read from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from pipeline.cache.reader import Cache, open_cache
from pipeline.errors import PipelineError
from pipeline.formats.layout import CachedSequence
from pipeline.stores.sealed import read_json
from stages.demo.recipe import DemoRecipe

STUDENTS: dict[str, float | None] = {"distilled": None, "hard-labels": 0.0}
"""The two students by name, and the alpha that is not the recipe's."""
AUDITED_SEQUENCES = 8
"""Held-out sequences whose targets are compared with a float64 forward of the teacher."""


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """One student: final metrics, and (step, value) curves by name."""

    metrics: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]

    @property
    def cross_entropy(self) -> float:
        """On held-out text, nats a token."""
        return self.metrics["eval_cross_entropy"]


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything that the report shows."""

    temperature: float
    students: dict[str, StudentResult]
    teacher_cross_entropy: float
    entropies: dict[float, np.ndarray]
    """float32 [held-out targets] by temperature, nats."""
    tail_masses: dict[float, np.ndarray]
    """float32 [held-out targets] by temperature."""
    largest_error: dict[float, float]
    """Largest |p_T cached - p_T float64| over the audited targets, by temperature."""
    num_audited: int
    num_tokens: int
    """Tokens of the train and held-out caches together; the next two are of both too."""
    num_targets: int
    cache_bytes: int
    top_k: int
    max_kl_error: float
    """Bound on the rounding's mean KL error, nats; 0 is lossless."""
    container: str
    seconds: dict[str, float]
    """Wall time of every command, start-up included."""
    rates: dict[str, float]
    """Tokens a second while a command was at work, start-up left out."""

    @property
    def distilled_is_better(self) -> bool:
        """On held-out cross-entropy."""
        return self.students["distilled"].cross_entropy < self.students["hard-labels"].cross_entropy


def read_results(folder: Path, teacher: Path, recipe: DemoRecipe, seconds: dict[str, float]) -> DemoResults:
    """The results of the finished run in `folder`."""
    students = {name: _student(folder / f"student-{name}") for name in STUDENTS}
    train, held_out = open_cache(folder / "train-cache"), open_cache(folder / "heldout-cache")
    temperatures = held_out.manifest.temperatures
    sequences = list(held_out)
    audited = sequences[:AUDITED_SEQUENCES]
    caches = (train, held_out)
    return DemoResults(
        temperature=recipe.temperature,
        students=students,
        teacher_cross_entropy=students["distilled"].metrics["eval_teacher_cross_entropy"],
        entropies={T: np.concatenate([s.targets.entropy(T) for s in sequences]) for T in temperatures},
        tail_masses={T: np.concatenate([s.targets.tail_mass(T) for s in sequences]) for T in temperatures},
        largest_error=_largest_error(teacher, held_out, audited),
        num_audited=sum(len(sequence.targets) for sequence in audited),
        num_tokens=sum(cache.manifest.num_tokens for cache in caches),
        num_targets=sum(cache.manifest.num_targets for cache in caches),
        cache_bytes=sum(commit.bytes for cache in caches for commit in cache.commits),
        top_k=held_out.manifest.top_k,
        max_kl_error=held_out.manifest.max_kl_error,
        container=held_out.manifest.container,
        seconds=seconds,
        rates=_rates(caches, students, recipe, seconds),
    )


def _rates(
    caches: tuple[Cache, ...], students: dict[str, StudentResult], recipe: DemoRecipe, seconds: dict[str, float]
) -> dict[str, float]:
    commits = [commit for cache in caches for commit in cache.commits]
    capturing = sum(cast(float, commit.statistics["seconds"]) for commit in commits)
    rates = {
        "teacher": recipe.teacher_tokens / seconds["teacher"],
        "cache-logits": sum(commit.num_tokens for commit in commits) / capturing,
    }
    for name, student in students.items():
        rates[f"train-{name}"] = student.metrics["tokens_seen"] / student.metrics["train_seconds"]
    return rates


def _student(folder: Path) -> StudentResult:
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        for name, value in entry.items():
            if name not in ("step", "epoch"):
                curves.setdefault(name, []).append((entry["step"], value))
    return StudentResult(metrics=read_json(folder / "metrics.json", PipelineError), curves=curves)


def _largest_error(teacher: Path, cache: Cache, sequences: list[CachedSequence]) -> dict[float, float]:
    """Against a plain float64 forward of the same weights, document by document, full softmax."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(teacher), dtype="float64", local_files_only=True)
    largest = dict.fromkeys(cache.manifest.temperatures, 0.0)
    for sequence in sequences:
        documents = torch.tensor(sequence.token_ids.astype(np.int64)).split(sequence.document_lengths.tolist())
        with torch.no_grad():
            logits = torch.cat([model(document[None]).logits[0] for document in documents])
        logits = logits[torch.tensor(sequence.target_positions.astype(np.int64)), : cache.manifest.vocab_size]
        ids = torch.tensor(sequence.targets.ids.astype(np.int64))
        for temperature in largest:
            exact = torch.softmax(logits / temperature, 1).gather(1, ids).numpy()
            error = np.abs(exact - sequence.targets.probs(temperature)).max()
            largest[temperature] = max(largest[temperature], float(error))
    return largest
