"""What the tests of every launcher share: a small real job, and what must hold when it is done."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.commits import SHARDS, list_commits
from pipeline.cache.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.runs.ephemeral import EphemeralFiles
from pipeline.runs.heartbeat import WORKERS
from pipeline.stores.store import Store
from tests.support.small import make_corpus, make_teacher, random_sequences

ROOT = Path(__file__).parent.parent.parent


@dataclass
class SmallJob:
    """Settings files of both stages, and their folders."""

    folder: Path
    corpus: Path
    partitions: int
    cache: Store

    @property
    def student(self) -> Path:
        return self.folder / "student"

    def command(self, launcher: str, *options: object, student: bool = False) -> list[str]:
        """`pipeline submit` of the job on a CPU."""
        files = ["--cache-logits", self.folder / "cache-logits.yaml"]
        files += ["--train-student", self.folder / "train-student.yaml"] if student else []
        fixed = [sys.executable, "-m", "pipeline.cli", "submit", "--on", launcher, "--gpus-per-worker", "0"]
        return [*fixed, *map(str, (*files, *options))]

    def num_done(self) -> int:
        """Partitions that are committed."""
        return len(list_commits(self.cache))

    def worker_pids(self) -> list[int]:
        """Pids that workers have recorded, whether they live or not."""
        notes = EphemeralFiles(self.cache / WORKERS)
        return [json.loads(note.text)["pid"] for note in map(notes.read, notes.names()) if note is not None]

    def assert_whole(self) -> None:
        """Every sequence once and in order, every byte as it was written."""
        assert verify_cache(self.cache).problems == []
        keys = [sequence.key for sequence in open_cache(self.cache)]
        assert keys == [sequence.key for sequence in Corpus(self.corpus).rows()]
        assert len(list_commits(self.cache)) == self.partitions
        assert len((self.cache / SHARDS).names()) >= self.partitions


def small_job(
    folder: Path,
    sequences: int = 120,
    layers: int = 2,
    max_steps: int = 2,
    cache: Store | None = None,
    **changes: object,
) -> SmallJob:
    """A job of one sequence a partition; `layers` sets how long each takes, `changes` are of the capture."""
    cache = cache or folder / "cache"
    teacher = make_teacher(folder / "teacher", num_hidden_layers=layers)
    corpus = make_corpus(folder / "corpus", random_sequences(sequences, 300))
    capture = {
        "teacher": str(teacher),
        "corpus": str(corpus),
        "out": str(cache),
        "engine": "transformers",
        "top_k": 8,
        "shard_tokens": 1,
        "lease_s": 10.0,
        "batch_tokens": 96,
    }
    train = {
        "student": str(teacher),
        "cache": str(cache),
        "out": str(folder / "student"),
        "max_steps": max_steps,
    }
    (folder / "cache-logits.yaml").write_text(json.dumps(capture | changes))
    (folder / "train-student.yaml").write_text(json.dumps(train | {"batch_size": 2, "save_steps": 2}))
    return SmallJob(folder, corpus, sequences, cache)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    """Run a command from the repository's folder; its output is in the assertion if it fails."""
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, **options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished
