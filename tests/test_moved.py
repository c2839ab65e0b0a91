"""Caches that are copied, moved, cut short or worked on by two at once, while something else goes on."""

import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS, list_commits
from pipeline.cache.folder import CacheFolder
from pipeline.cache.index import INDEX
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheCorruptError, CorpusError, EngineError, PartitionsFailedError
from pipeline.files import PARTIAL
from pipeline.processes import owner_name
from pipeline.targets import SparseTargets
from stages.cache_logits.engine import Request
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.helpers import run
from tests.support.object_store import put_cache
from tests.support.small import assert_equal_caches, make_cache
from tests.support.workers import new_cache, run_worker, tiny_corpus

ROOT = Path(__file__).parent.parent
DEAD = f"{owner_name().rpartition('.')[0]}.{2**22 + 1}"
"""A process of this host that no longer runs."""


def by_cp(cache: Path, copy: Path) -> None:
    subprocess.run(["cp", "-r", str(cache), str(copy)], check=True)  # every file gets a new time


def by_rsync(cache: Path, copy: Path) -> None:
    if not shutil.which("rsync"):
        pytest.skip("rsync is not installed")
    subprocess.run(["rsync", "--archive", f"{cache}/", str(copy)], check=True)


def by_rename(cache: Path, copy: Path) -> None:
    shutil.copytree(cache, cache.with_name("kept"), symlinks=True)
    cache.rename(copy)
    cache.with_name("kept").rename(cache)


def by_link(cache: Path, copy: Path) -> None:
    copy.symlink_to(cache)


@pytest.mark.parametrize("copied", [by_cp, by_rsync, by_rename, by_link], ids=lambda copied: copied.__name__)
def test_copy_of_a_cache_is_the_cache(tmp_path, corpus, copied):
    cache = make_cache(tmp_path / "cache", corpus)
    open_cache(cache)[0]  # leaves an index, which is of no use to a copy with other times
    copied(cache, tmp_path / "copy")
    assert run("verify", tmp_path / "copy")[0] == 0
    assert_equal_caches(cache, tmp_path / "copy")
    code, _, err = run("convert", tmp_path / "copy", "--format", "zarr", "--out", tmp_path / "out", "--workers", 1)
    assert code == 0, err


def test_copy_of_an_unfinished_cache_goes_on_in_its_new_place(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 12)
    cache = new_cache(tmp_path / "cache", corpus)
    with pytest.raises(EngineError, match="ended"):
        run_worker(cache, corpus, make_engine=DyingEngine)
    done = list_commits(cache)
    assert 0 < len(done) < 12
    by_cp(cache, tmp_path / "copy")
    shutil.rmtree(cache)
    corpus = corpus.rename(tmp_path / "elsewhere")
    run_worker(tmp_path / "copy", corpus)
    assert verify_cache(tmp_path / "copy").problems == []


class DyingEngine(FakeEngine):
    """Answers six requests."""

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        for count, answer in enumerate(super().score(requests)):
            if count == 6:
                raise EngineError("the engine has ended")
            yield answer


def test_cache_that_went_through_an_object_store_and_back(tmp_path, url, corpus):
    """By a client that knows files alone: empty folders are lost, and every file has a new time."""
    cache = make_cache(tmp_path / "cache", corpus)
    open_cache(cache)[0]
    put_cache(cache, url)
    assert run("verify", url)[0] == 0
    back = tmp_path / "back"
    names = [path.relative_to(cache) for path in cache.rglob("*") if path.is_file()]
    for name in names:
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        (back / name).write_bytes((url / str(name)).read())
    assert run("verify", back)[0] == 0
    assert_equal_caches(cache, back)


def test_unfinished_cache_without_its_empty_folders_goes_on(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 3)
    cache = new_cache(tmp_path / "cache", corpus)
    for path in sorted(cache.iterdir()):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    assert not (cache / SHARDS).exists()
    assert run("status", cache)[0] == 3
    CacheFolder.begin(cache, CacheManifest.read(cache), corpus / "tokenizer")
    run_worker(cache, corpus)
    assert verify_cache(cache).problems == []


@pytest.mark.parametrize("lost", ["manifest.json", f"{COMMITS}/00002.json", SHARDS, COMMITS, "tokenizer"])
def test_half_a_copy_is_told_from_a_cache(tmp_path, corpus, lost):
    cache = make_cache(tmp_path / "cache", corpus)
    shutil.rmtree(cache / lost) if (cache / lost).is_dir() else (cache / lost).unlink()
    code, out, err = run("verify", cache)
    assert code == (2 if lost == "manifest.json" else 1), (out, err)
    assert "Traceback" not in out + err
    export = ["export", cache, "--to", "parquet", "--temperature", 1, "--out", tmp_path / "out", "--workers", 1]
    code, out, err = run(*export)
    if lost != "tokenizer":  # which an export does not need
        assert (code, err.count("error: ")) == (2, 1), (out, err)


@pytest.mark.parametrize("command", ["export", "convert"])
def test_shard_that_is_deleted_meanwhile_is_named(tmp_path, corpus, command, monkeypatch):
    cache = make_cache(tmp_path / "cache", corpus)
    victim = sorted((cache / SHARDS).iterdir())[-1]
    module = importlib.import_module(f"pipeline.lifecycle.{command}")
    name = {"export": "_write_file", "convert": "_convert"}[command]
    work = getattr(module, name)

    def after_deletion(*arguments: object) -> object:
        victim.unlink(missing_ok=True)
        return work(*arguments)

    monkeypatch.setattr(module, name, after_deletion)
    options = {"export": ["--to", "parquet", "--temperature", 1], "convert": ["--format", "zarr"]}[command]
    code, out, err = run(command, cache, *options, "--out", tmp_path / "out", "--workers", 1)
    assert code == 2, (out, err)
    assert victim.name in err
    assert [path for path in (tmp_path / "out").rglob("*") if PARTIAL in path.name] == []


def test_shard_that_is_deleted_while_it_is_read_harms_nobody_and_the_next_reader_is_told(tmp_path, corpus):
    cache = make_cache(tmp_path / "cache", corpus)
    reader = open_cache(cache)
    first = reader[0].token_ids.copy()
    for shard in (cache / SHARDS).iterdir():
        shard.unlink()
    assert (reader[0].token_ids == first).all()  # the file lives as long as it is open
    with pytest.raises(CacheCorruptError, match="missing, although it was committed"):
        reader[len(reader) - 1]


class AtHalf(FakeEngine):
    """Calls something in the middle of a capture."""

    def __init__(self, manifest: CacheManifest, act: Callable[[], object]) -> None:
        super().__init__(manifest)
        self._act = act

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        for count, answer in enumerate(super().score(requests)):
            if count == 6:
                self._act()
            yield answer


def test_repair_while_a_worker_writes_takes_nothing_from_it(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 30)
    cache = new_cache(tmp_path / "cache", corpus)
    codes = []
    run_worker(
        cache,
        corpus,
        make_engine=lambda manifest: AtHalf(manifest, lambda: codes.append(run("verify", cache, "--repair"))),
    )
    assert [code for code, _, _ in codes] == [0]
    assert verify_cache(cache).problems == []


def test_corpus_that_is_deleted_during_a_capture_is_named(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 30)
    cache = new_cache(tmp_path / "cache", corpus)
    act = lambda: shutil.rmtree(corpus / "partitions", ignore_errors=True)  # noqa: E731
    with pytest.raises((CorpusError, PartitionsFailedError, FileNotFoundError)) as caught:
        run_worker(cache, corpus, make_engine=lambda manifest: AtHalf(manifest, act))
    assert str(corpus) in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_what_killed_processes_were_writing_goes_with_the_next_run(tmp_path, corpus):
    cache = make_cache(tmp_path / "cache", corpus)
    export = ["export", cache, "--to", "parquet", "--temperature", 1.0, "--out", tmp_path / "e", "--workers", 1]
    convert = ["convert", cache, "--format", "zarr", "--out", tmp_path / "z", "--workers", 1]
    for command in (export, convert):
        assert run(*command)[0] == 0
    alive = owner_name()
    stale = [
        tmp_path / "e" / f"part-00003.parquet.{DEAD}{PARTIAL}",
        tmp_path / "z" / COMMITS / f"00001.json.{DEAD}{PARTIAL}",
        tmp_path / "z" / SHARDS / f"00001-0a0b0c0d-{DEAD}.zarr.zip{PARTIAL}",
        tmp_path / "z" / f"manifest.json.{DEAD}{PARTIAL}",
    ]
    others = [tmp_path / "e" / f"part-00003.parquet.{alive}{PARTIAL}", tmp_path / "e" / "mine.partial"]
    for path in (*stale, *others):
        path.write_text("half")
    for command in (export, convert):
        assert run(*command)[0] == 0
    assert [path for path in stale if path.exists()] == []
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("command", ["export", "convert"])
def test_two_at_once_into_one_folder_make_one_result(tmp_path, corpus, command):
    cache = make_cache(tmp_path / "cache", corpus)
    options = {"export": ["--to", "parquet", "--temperature", "1"], "convert": ["--format", "zarr"]}[command]
    words = [sys.executable, "-m", "pipeline.cli", command, str(cache), *options, "--workers", "1"]
    both = [
        subprocess.Popen([*words, "--out", str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert [path for path in (tmp_path / "out").rglob("*") if PARTIAL in path.name] == []
    if command == "convert":
        assert_equal_caches(cache, tmp_path / "out")
    else:
        alone = run(command, cache, *options, "--workers", 1, "--out", tmp_path / "alone")
        assert alone[0] == 0
        for path in (tmp_path / "alone").iterdir():
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_clock_that_jumps_during_a_capture(tmp_path, monkeypatch):
    corpus = tiny_corpus(tmp_path / "corpus", 30)
    cache = new_cache(tmp_path / "cache", corpus)
    true_time = time.time
    jumps = iter([86_400.0, -10 * 86_400.0])

    def jump() -> None:
        by = next(jumps, 0.0)
        monkeypatch.setattr(time, "time", lambda: true_time() + by)

    run_worker(cache, corpus, make_engine=lambda manifest: AtHalf(manifest, jump))
    for path in cache.rglob("*"):
        os.utime(path, (0, 0))  # as if the machine had lost its date
    assert run("verify", cache)[0] == 0
    assert open_cache(cache)[0].key == open_cache(cache)[0].key
    (cache / INDEX).unlink()
    assert len(open_cache(cache)) == 30


def test_folder_in_which_a_process_just_begins_or_died_beginning_is_free(tmp_path, corpus):
    cache = make_cache(tmp_path / "cache", corpus)
    out = tmp_path / "out"
    out.mkdir()
    words = ["export", cache, "--to", "parquet", "--temperature", 1, "--out", out, "--workers", 1]
    (out / "letter.txt").write_text("mine")
    code, _, err = run(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert (out / "letter.txt").read_text() == "mine"
    (out / "letter.txt").rename(out / f".export.json.{DEAD}{PARTIAL}")
    code, _, err = run(*words)
    assert code == 0, err
    assert [path for path in out.rglob("*") if PARTIAL in path.name] == []
