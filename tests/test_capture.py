"""The worker's loop with an instant engine: nothing lost, nothing twice, every failure reaches the caller."""

import errno
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.partitions import plan_partitions
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.formats.containers import CONTAINERS
from pipeline.processes import owner_name
from stages.cache_logits.capture import capture
from stages.cache_logits.fake_engine import FakeEngine
from stages.cache_logits.scoring import ScoredRow
from stages.cache_logits.settings import CacheConfig
from tests.support.small import fake_manifest, make_cache

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("container", CONTAINERS)
def test_kill_9_at_every_file_operation_loses_and_repeats_nothing(tmp_path, corpus, container):
    whole = open_cache(make_cache(tmp_path / "whole", corpus, container=container))
    command = [sys.executable, "-m", "tests.support.crash", str(corpus), str(tmp_path / "killed"), container]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 20
    assert verify_cache(tmp_path / "killed").problems == []
    killed = open_cache(tmp_path / "killed")
    assert [sequence.key for sequence in killed] == [sequence.key for sequence in whole]
    for ours, theirs in zip(killed, whole):
        np.testing.assert_array_equal(ours.targets.probs(2.0), theirs.targets.probs(2.0))
    CacheFolder(tmp_path / "killed").remove_leftovers()
    assert len(list((tmp_path / "killed" / SHARDS).iterdir())) == killed.manifest.num_partitions


def test_leftovers_of_the_living_and_of_other_hosts_stay(tmp_path, corpus):
    folder = make_cache(tmp_path / "cache", corpus)
    ours, others = (
        folder / SHARDS / f"00000-0123abcd-{name}.arrow.partial" for name in (owner_name(), "elsewhere.1.99999")
    )
    for path in (ours, others):
        path.touch()
    CacheFolder(folder).remove_leftovers()
    assert ours.exists()
    assert others.exists()


def test_two_writers_of_one_cache_commit_each_partition_once(tmp_path, corpus):
    rows = Corpus(corpus)
    manifest = fake_manifest(rows)
    folder = make_cache(tmp_path / "cache", corpus)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / SHARDS).iterdir()}
    capture(FakeEngine(manifest), rows, CacheFolder(folder), range(manifest.num_partitions))
    assert {path.name: path.stat().st_mtime_ns for path in (folder / SHARDS).iterdir()} == before
    assert verify_cache(folder).problems == []


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("settings", [{}, {"max_kl_error": 0.0, "tail_samples": 2}, {"top_k": 0, "tail_samples": 2}])
def test_shards_have_the_same_bytes_however_many_threads_encode(tmp_path, corpus, container, settings):
    found = []
    for threads in (1, 2, 5):
        folder = make_cache(tmp_path / str(threads), corpus, threads, container=container, **settings)
        commits = [asdict(commit) for commit in open_cache(folder).commits]
        for commit in commits:
            del commit["file"], commit["statistics"]["seconds"]
        found.append((commits, [path.read_bytes() for path in sorted((folder / SHARDS).iterdir(), key=shard_number)]))
    assert len(found[0][0]) > 5
    assert found[1] == found[2] == found[0]


def shard_number(path):
    return int(path.name.partition("-")[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_failure_of_an_encoding_thread_reaches_the_caller_and_leaves_nothing(tmp_path, corpus, monkeypatch, threads):
    rows, manifest, folder = prepared(tmp_path, corpus)
    before = threading.active_count()
    bad = list(rows.rows())[25].key

    def stored(row):
        if row.sequence.key == bad:
            raise ValueError("no room for this one")

    monkeypatch.setattr(ScoredRow, "stored", stored)
    with pytest.raises(ValueError, match="no room for this one"):
        capture(
            FakeEngine(manifest), rows, CacheFolder(folder), range(manifest.num_partitions), encoding_threads=threads
        )
    assert threading.active_count() == before
    assert not list(folder.rglob("*.partial"))
    place = int(np.searchsorted(manifest.partitions, 25, side="right")) - 1
    assert CacheFolder(folder).todo() == list(range(place, manifest.num_partitions))
    monkeypatch.undo()
    make_cache(folder, corpus, threads)
    assert verify_cache(folder).problems == []


class BrokenEngine(FakeEngine):
    """Fails after a while, when the writer has committed something."""

    def __init__(self, manifest, commits):
        super().__init__(manifest)
        self._commits = commits

    def score(self, requests):
        for count, answer in enumerate(super().score(requests)):
            if count == 30:
                deadline = time.monotonic() + 60
                while not list(self._commits.glob("*.json")) and time.monotonic() < deadline:
                    time.sleep(0.01)
                raise ValueError("the engine broke")
            yield answer


def prepared(tmp_path, corpus, **settings):
    """An empty cache folder and what capture needs to fill it."""
    rows = Corpus(corpus)
    for name in ("shards", "commits"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    manifest = fake_manifest(rows, **settings)
    manifest.write(tmp_path / "cache")
    return rows, manifest, tmp_path / "cache"


def test_failing_engine_stops_the_writer_and_keeps_what_was_committed(tmp_path, corpus):
    rows, manifest, folder = prepared(tmp_path, corpus)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="the engine broke"):
        capture(BrokenEngine(manifest, folder / COMMITS), rows, CacheFolder(folder), range(manifest.num_partitions))
    assert threading.active_count() == threads
    assert not list(folder.rglob("*.partial"))
    assert 0 < len(list((folder / "commits").iterdir())) < manifest.num_partitions
    make_cache(folder, corpus)
    assert verify_cache(folder).problems == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_full_disk_is_an_error_not_a_hang(tmp_path, corpus, container, monkeypatch):
    rows, manifest, folder = prepared(tmp_path, corpus, container=container)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr("pipeline.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        capture(FakeEngine(manifest), rows, CacheFolder(folder), range(manifest.num_partitions))
    monkeypatch.undo()
    assert list((folder / "commits").iterdir()) == []
    make_cache(folder, corpus, container=container)
    assert verify_cache(folder).problems == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("container", CONTAINERS)
def test_really_full_disk_is_an_error_too(small_disk, corpus, container):
    with pytest.raises(OSError, match=r"No space left|Errno 28") as error:
        make_cache(small_disk / "cache", corpus, container=container)
    assert error.value.errno == errno.ENOSPC


def test_other_settings_are_refused_with_the_difference_named(tmp_path, corpus):
    folder = make_cache(tmp_path / "cache", corpus)
    other = fake_manifest(Corpus(corpus), top_k=4, max_kl_error=0.0)
    with pytest.raises(CacheMismatchError, match=r"top_k is 8, now 4; max_kl_error is 0\.0001, now 0\.0"):
        CacheManifest.read(folder).require_equal(other, folder)


def test_partitions_cover_every_row_once():
    tokens = np.random.default_rng(0).integers(1, 50, 1000)
    for size in (1, 60, 10_000, 10**9):
        cuts = np.array(plan_partitions(tokens, size))
        assert cuts[0] == 0
        assert cuts[-1] == 1000
        assert (np.diff(cuts) > 0).all()
        sums = np.add.reduceat(tokens, cuts[:-1])
        assert ((sums <= size) | (np.diff(cuts) == 1)).all()


class ForgetfulEngine(FakeEngine):
    """Loses a request."""

    def score(self, requests):
        for count, answer in enumerate(super().score(requests)):
            if count != 50:
                yield answer


def test_unanswered_request_is_an_error(tmp_path, corpus):
    rows, manifest, folder = prepared(tmp_path, corpus)
    with pytest.raises(RuntimeError, match="unanswered"):
        capture(ForgetfulEngine(manifest), rows, CacheFolder(folder), range(manifest.num_partitions))
    make_cache(folder, corpus)
    assert verify_cache(folder).problems == []


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 2), (16, 4), (128, 4)])
def test_few_threads_encode_beside_an_engine_unless_more_are_asked_for(monkeypatch, cores, threads):
    monkeypatch.setattr("stages.cache_logits.settings.available_cores", lambda: cores)
    places = {"teacher": Path("teacher"), "corpus": Path("corpus"), "out": Path("cache")}
    assert CacheConfig(**places).num_encoding_threads == threads
    assert CacheConfig(**places, encoding_threads=7).num_encoding_threads == 7
    with pytest.raises(ConfigError, match="encoding_threads is 0; it must be at least 1"):
        CacheConfig(**places, encoding_threads=0)
