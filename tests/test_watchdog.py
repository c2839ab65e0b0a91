"""An engine that hangs ends its process, which is said; what only waits for others does not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import open_cache
from pipeline.cache.commits import list_commits
from pipeline.cache.manifest import CacheManifest
from pipeline.corpus import Corpus
from pipeline.errors import EngineError
from pipeline.exit_codes import STALLED
from pipeline.progress import KeptLines
from pipeline.runs.status import StatusReader
from pipeline.watchdog import Watchdog
from stages.cache_logits.fake_engine import FakeEngine
from stages.cache_logits.scoring import ScoredRow, score_rows
from stages.cache_logits.watched_engine import WatchedEngine
from stages.train_student.dataset import CacheDataset
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from tests.support.small import llama_config, make_cache, make_corpus, random_sequences
from tests.support.workers import end_of, new_cache, run_worker, tiny_corpus
from tests.test_cache_logits import run_command, settings, wait_for_commits

STALL_S = 0.4


class HangingEngine(FakeEngine):
    """Answers three requests, starts a process and then hangs with others in hand, where no exception reaches it."""

    def __init__(self, manifest: CacheManifest, note: Path) -> None:
        super().__init__(manifest)
        self._note = note

    def score(self, requests):
        answers = super().score(requests)
        for _ in range(3):
            yield next(answers)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self._note.write_text(str(child.pid))
        next(answers)
        while True:
            time.sleep(600)


def in_process(run) -> tuple[int, str]:
    """Exit code and last line of a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        reporter = KeptLines()
        reporter.write = lambda line, level: os.write(writer, f"{line}\n".encode())
        run(reporter)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        said = lines.read()
    return end_of(pid), said.strip().splitlines()[-1] if said.strip() else ""


def test_engine_that_hangs_ends_its_process_and_blames_no_partition(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 12)
    folder = new_cache(tmp_path / "cache", corpus)
    note = tmp_path / "child"

    def run(reporter):
        run_worker(folder, corpus, make_engine=lambda m: HangingEngine(m, note), reporter=reporter, stall_s=STALL_S)

    code, line = in_process(run)
    assert code == STALLED
    assert "the engine has requests and finishes none: no progress for" in line
    assert "--stall-seconds" in line
    child = int(note.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert not list((folder / "failures").glob("*"))
    assert not list((folder / "leases").glob("*"))
    (worker,) = StatusReader(folder).read().workers
    assert worker.state == "failed"
    assert 0 < len(list_commits(folder)) < 12
    run_worker(folder, corpus)
    assert len(list_commits(folder)) == 12


def test_engine_that_does_not_get_loaded_ends_its_process(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 3)
    folder = new_cache(tmp_path / "cache", corpus)

    def run(reporter):
        run_worker(folder, corpus, make_engine=lambda m: time.sleep(600), reporter=reporter, stall_s=STALL_S / 4)

    code, line = in_process(run)
    assert (code, "loading the teacher: no progress" in line) == (STALLED, True)


def test_time_in_which_the_engine_has_nothing_to_do_does_not_count(tmp_path):
    """Slow requests, and whoever takes what it gives, may take any time."""
    corpus = Corpus(tiny_corpus(tmp_path / "corpus", 6))
    manifest = CacheManifest.read(new_cache(tmp_path / "cache", corpus.folder))
    lines: list[str] = []
    watchdog = Watchdog(STALL_S, lines.append)
    engine = WatchedEngine(lambda: FakeEngine(manifest), watchdog)
    whole: list[ScoredRow] = []

    def slow(sequences):
        for index, sequence in enumerate(sequences):
            time.sleep(2 * STALL_S if index == 1 else 0)
            yield ScoredRow(sequence)

    def take(row):
        whole.append(row)
        time.sleep(2 * STALL_S if len(whole) == 4 else 0)

    score_rows(engine, slow(corpus.rows()), take)
    time.sleep(2 * STALL_S)
    watchdog.close()
    assert lines == []


def test_training_whose_cache_cannot_be_read_ends(tmp_path, corpus):
    """As on a file system whose server is gone: a read never returns."""
    cache = make_cache(tmp_path / "cache", corpus)
    student = tmp_path / "student" / "config.json"
    llama_config(open_cache(cache).manifest.vocab_size, num_hidden_layers=1).save_pretrained(student.parent)
    values = {"max_steps": 50, "batch_size": 2, "stall_s": STALL_S}
    config = TrainConfig(student=student, cache=cache, out=tmp_path / "run", **values)

    def run(reporter):
        os.environ["LOGIT_CACHE_PATIENCE_S"] = "0"
        read = CacheDataset.__getitem__
        CacheDataset.__getitem__ = lambda self, index: time.sleep(600) if index == 5 else read(self, index)
        train_student(config, reporter)

    code, line = in_process(run)
    assert code == STALLED, line
    assert f"{cache}: reading a batch of the cache: no progress for" in line


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_that_stands_still_is_given_up(tmp_path, teacher):
    """Its processes are stopped as a dead-lock would stop them; none of them is left."""
    corpus = make_corpus(tmp_path / "corpus", random_sequences(600, vocab_size=300))
    config = settings(teacher, corpus, tmp_path / "cache", engine="vllm", stall_s=20.0)
    process = run_command(config)
    wait_for_commits(config.out, 1)
    engines = psutil.Process(process.pid).children(recursive=True)
    for engine in engines:
        engine.suspend()
    _, said = process.communicate(timeout=120)
    assert process.returncode == STALLED, said
    assert "finishes none: no progress for 20s" in said
    assert psutil.wait_procs(engines, timeout=20)[1] == []
    assert not list((config.out / "failures").glob("*"))


def test_faulty_engine_is_no_hanging_one(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 3)
    folder = new_cache(tmp_path / "cache", corpus)

    def refuse(manifest):
        raise EngineError("no such kernel")

    with pytest.raises(EngineError, match="no such kernel"):
        run_worker(folder, corpus, make_engine=refuse, stall_s=STALL_S)
