"""The demo: every command of the pipeline on one machine, then a report of what came out.

Runs the commands as a user would, in processes of their own, and prints each. Finished steps are
reused; their times are those of the run that did the work.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from pipeline.documents import Finite
from pipeline.errors import PipelineError
from pipeline.files import canonical_json
from pipeline.launch.job import PIPELINE
from pipeline.processes import following
from pipeline.progress import Reporter, duration
from pipeline.stores.sealed import read_document, read_json, write_json
from stages.demo.recipe import DemoRecipe, student_config
from stages.demo.report import write_report
from stages.demo.results import STUDENTS, read_results
from stages.demo.settings import DemoConfig
from stages.demo.teacher import ensure_teacher
from stages.demo.text import HELD_OUT, TRAIN, sample_documents

TOP_K = 64
EVALUATIONS = 4
"""Evaluations on held-out text while a student trains."""
LOG_LINES = 40
"""Points of a student's training curve."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step."""

    seconds: Finite
    arguments: list[str]


@dataclass
class Steps:
    """Runs steps and remembers how long each took when it did its work."""

    folder: Path
    reporter: Reporter
    seconds: dict[str, float] = field(default_factory=dict)

    def command(self, name: str, *arguments: object) -> None:
        """Run `pipeline ARGUMENTS` unless it was finished before; raises PipelineError if it fails."""
        record = self.folder / "steps" / f"{name}.json"
        words = [str(argument) for argument in arguments]
        if record.is_file():
            self.seconds[name] = read_document(record, StepRecord, PipelineError).seconds
            self.reporter.log(f"{name}: finished before in {duration(self.seconds[name])}; reused")
            return
        self.reporter.log(f"\n$ pipeline {' '.join(words)}")
        started = time.monotonic()
        environment = {**os.environ, **following(signal.SIGTERM)}
        with subprocess.Popen([sys.executable, *PIPELINE, *words], env=environment) as process:
            try:
                code = process.wait()
            except BaseException:  # a signal: the step saves what it can, and is waited for
                process.terminate()
                raise
        if code != 0:
            raise PipelineError(f"step {name!r} ended with exit code {code}; see above.")
        self.seconds[name] = time.monotonic() - started
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"seconds": self.seconds[name], "arguments": words})


def demo(config: DemoConfig, reporter: Reporter | None = None, recipe: DemoRecipe | None = None) -> list[str]:
    """Run everything in `config.work` and return the lines of the report; report.html is written beside."""
    reporter, recipe = reporter or Reporter(), recipe or DemoRecipe()
    started = time.monotonic()
    teacher = ensure_teacher(config.work, recipe, reporter)
    folder = config.work / _run_name(config, recipe, teacher.folder)
    steps = Steps(folder, reporter, {"teacher": teacher.seconds})
    _sample_text(config.work / "text", folder, recipe)
    for split in ("train", "heldout"):
        _capture(steps, config, recipe, teacher.folder, split)
    for name, alpha in STUDENTS.items():
        _train(steps, recipe, name, alpha)
    results = read_results(folder, teacher.folder, recipe, steps.seconds)
    lines = write_report(results, folder / "report.html")
    return [*lines, f"Report: {folder / 'report.html'}. This run took {duration(time.monotonic() - started)}."]


def _sample_text(text: Path, folder: Path, recipe: DemoRecipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, num_bytes in ((TRAIN, recipe.student_text_bytes), (HELD_OUT, recipe.held_out_text_bytes)):
        if not (folder / name).is_file():
            sample_documents(text / name, folder / name, num_bytes)
    config = folder / "student-config" / "config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(json.dumps(student_config(recipe), indent=1), encoding="utf-8")


def _capture(steps: Steps, config: DemoConfig, recipe: DemoRecipe, teacher: Path, split: str) -> None:
    folder = steps.folder
    corpus, cache = folder / f"{split}-corpus", folder / f"{split}-cache"
    text = folder / {"train": TRAIN, "heldout": HELD_OUT}[split]
    length = ("--sequence-length", recipe.sequence_length)
    steps.command(f"prepare-{split}", "prepare", text, "--tokenizer", teacher, "--out", corpus, *length)
    places = ("--teacher", teacher, "--corpus", corpus, "--out", cache)
    targets = ("--top-k", TOP_K, "--temperature", 1.0, "--temperature", recipe.temperature)
    how = ("--engine", config.engine, "--format", config.format, "--shard-tokens", 32_768)
    steps.command(f"cache-logits-{split}", "cache-logits", *places, *targets, *how)
    steps.command(f"verify-{split}", "verify", cache)


def _train(steps: Steps, recipe: DemoRecipe, name: str, alpha: float | None) -> None:
    folder = steps.folder
    student = folder / "student-config" / "config.json"
    places = ("--student", student, "--cache", folder / "train-cache", "--eval-cache", folder / "heldout-cache")
    loss = ("--alpha", recipe.alpha if alpha is None else alpha, "--temperature", recipe.temperature, "--tail", "ghost")
    length: dict[str, Any] = {
        "--max-steps": recipe.student_steps,
        "--batch-size": recipe.student_batch_size,
        "--learning-rate": recipe.student_learning_rate,
        "--eval-steps": max(1, recipe.student_steps // EVALUATIONS),
        "--log-steps": max(1, recipe.student_steps // LOG_LINES),
        "--save-steps": recipe.student_steps,
        "--seed": recipe.seed,
    }
    flags = [word for pair in length.items() for word in pair]
    steps.command(f"train-{name}", "train-student", *places, "--out", folder / f"student-{name}", *loss, *flags)


def _run_name(config: DemoConfig, recipe: DemoRecipe, teacher: Path) -> str:
    """A folder of its own for every teacher, recipe, engine and container: nothing stale is ever mixed in."""
    made_of = read_json(teacher / "recipe.json", PipelineError)
    contents = canonical_json([made_of, recipe.to_dict(), config.engine, config.format])
    return f"run-{config.engine}-{config.format}-{xxhash.xxh3_64_hexdigest(contents)[:8]}"
