"""Caches in an object store, against a real S3 server on loopback that fails on demand."""

import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline import copies, open_cache, storage
from pipeline.config import CacheConfig, ConvertConfig, ExportConfig, MergeConfig, TrainConfig
from pipeline.corpus import Corpus
from pipeline.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheMismatchError,
    ConfigError,
    StorageError,
)
from pipeline.files import hash_file, owner_name, read_json, write_json
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.export import export_cache
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.repair import repair_cache
from pipeline.manifest import CacheManifest
from pipeline.runs.commits import COMMITS, SHARDS, commit_path, read_commit, remove_leftovers
from pipeline.runs.folder import open_folder
from pipeline.settings import load_config
from pipeline.shards.verify import verify_cache
from pipeline.storage import ObjectPath
from stages.cache_logits import cache_logits
from stages.cache_logits.capture import capture
from stages.train_student import train_student
from tests.helpers import run
from tests.small import FakeEngine, assert_equal_caches, fake_manifest, llama_config, make_cache


@pytest.fixture(scope="module")
def local(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("local") / "cache", corpus)


def put_cache(folder: Path, url: ObjectPath) -> ObjectPath:
    """A copy of a cache, file by file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (url / str(path.relative_to(folder))).write_bytes(path.read_bytes())
    return url


def test_object_path_is_like_a_path(url):
    assert str(url / "a" / "b.json") == f"{url}/a/b.json"
    assert (url / "b.tar.gz").name == "b.tar.gz"
    assert (url / "b.tar.gz").suffix == ".gz"
    assert (url / "a").parent == url
    assert not url.exists()
    (url / "a" / "one").write_bytes(b"1")
    (url / "two").write_bytes(b"22")
    assert [path.name for path in url.iterdir()] == ["a", "two"]
    assert url.is_dir()
    assert not url.is_file()
    assert (url / "two").stat().st_size == 2
    assert (url / "two").read_bytes() == b"22"
    (url / "two").unlink()
    (url / "two").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (url / "two").read_bytes()
    with pytest.raises(FileNotFoundError):
        (url / "two").stat()
    with pytest.raises(TypeError):
        os.fspath(url)


def test_first_writer_wins(url):
    """If-None-Match: of many at once, one writes."""
    path = url / "a.json"
    wins = []

    def write(number: int) -> None:
        if write_json(path, {"winner": number}, first_wins=True):
            wins.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(wins) == 1
    assert read_json(path, CacheCorruptError) == {"winner": wins[0]}


def test_put_whose_answer_was_lost_has_won(server, url):
    server.fail(("lose", "PUT", "a.json", 1))
    assert write_json(url / "a.json", {"winner": 1}, first_wins=True)
    assert server.met() == [1]
    assert not write_json(url / "a.json", {"winner": 2}, first_wins=True)


def test_cache_is_read_from_the_store_and_then_from_its_copies(server, url, local):
    put_cache(local, url)
    assert_equal_caches(url, local)
    assert open_cache(str(url))[3].key == open_cache(local)[3].key
    assert verify_cache(url).problems == []
    server.fail(("500", "GET", "/shards/", 10_000))
    assert_equal_caches(url, local)
    assert server.met() == [0]


@pytest.mark.parametrize("kind", ["500", "throttle", "drop", "cut"])
def test_passing_faults_of_reads_are_retried(server, url, local, kind):
    put_cache(local, url)
    server.fail((kind, "GET", "/shards/", 3), (kind, "GET", "/commits/", 3), (kind, "GET", "manifest", 1))
    assert_equal_caches(url, local)
    assert server.met() == [3, 3, 1]


def test_lasting_faults_are_one_clear_error(server, url, local, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_S", 0.3)
    put_cache(local, url)
    for kind, message in [("500", "InternalError"), ("throttle", "SlowDown"), ("drop", "error sending request")]:
        server.fail((kind, "GET", "manifest.json", 10_000))
        code, _, err = run("verify", url)
        assert code == 2
        assert err.count("\n") == 1
        assert f"{url}/manifest.json: cannot read it: " in err
        assert message in err
    server.fail(("deny", "GET", "manifest.json", 10_000))
    with pytest.raises(StorageError, match="AccessDenied"):
        open_cache(url)
    assert server.met() == [1]


def test_damage_in_the_store_is_found_repaired_and_made_again(url, local, corpus):
    put_cache(local, url)
    commits = [read_commit(local, partition) for partition in range(4)]
    path = url / SHARDS / commits[0].file
    path.write_bytes(path.read_bytes()[:-5])
    contents = bytearray((url / SHARDS / commits[1].file).read_bytes())
    contents[700] ^= 2
    (url / SHARDS / commits[1].file).write_bytes(bytes(contents))
    (url / SHARDS / commits[2].file).unlink()
    commit_path(url, 3).write_bytes(b"{}")
    (url / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(CacheCorruptError, match="its checksum does not match"):
        open_cache(url)
    report = verify_cache(url)
    assert report.damaged == [0, 1, 2, 3]
    assert report.tokenizer_damaged
    repair_cache(url, report)
    with pytest.raises(CacheIncompleteError, match="4 of 6 partitions"):
        open_cache(url)
    capture_into(url, corpus)
    assert verify_cache(url).problems == []
    assert_equal_caches(url, local)


def capture_into(url: ObjectPath, corpus_folder: Path, **settings: object) -> None:
    """What is missing of a cache by FakeEngine."""
    corpus = Corpus(corpus_folder)
    manifest = fake_manifest(corpus, **settings)
    open_folder(url, manifest, corpus_folder / "tokenizer")
    todo = [part for part in range(manifest.num_partitions) if read_commit(url, part) is None]
    capture(FakeEngine(manifest), corpus, manifest, url, todo)


@pytest.mark.parametrize("kind", ["500", "drop", "lose"])
def test_capture_into_the_store_commits_each_partition_once_whatever_fails(server, url, corpus, local, kind):
    server.fail((kind, "PUT", "/shards/", 2), (kind, "PUT", "/commits/", 2), (kind, "PUT", "manifest.json", 1))
    capture_into(url, corpus)
    assert server.met() == [2, 2, 1]
    assert verify_cache(url).problems == []
    assert_equal_caches(url, local)
    assert len(list((url / SHARDS).iterdir())) == len(list((url / COMMITS).iterdir()))
    assert [path for path in copies.copies_folder().iterdir() if path.name.endswith(".partial")] == []


def test_what_a_killed_writer_left_on_this_machine_goes(url, local):
    put_cache(local, url)
    place = owner_name().rpartition(".")[0]
    dead, alive = (copies.copies_folder() / f"00001-0123abcd-{place}.{pid}.arrow.partial" for pid in (2**22 + 1, 1))
    for path in (dead, alive):
        path.touch()
    assert remove_leftovers(url) == 1
    assert not dead.exists()
    assert alive.exists()


def test_two_writers_of_one_cache_commit_each_partition_once(url, corpus, local):
    corpus_rows = Corpus(corpus)
    manifest = fake_manifest(corpus_rows)
    open_folder(url, manifest, corpus / "tokenizer")
    failures = []

    def write() -> None:
        try:
            parts = range(manifest.num_partitions)
            capture(FakeEngine(manifest), Corpus(corpus), manifest, url, parts)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=write) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    assert_equal_caches(url, local)
    assert len(list((url / SHARDS).iterdir())) == manifest.num_partitions


def test_other_settings_and_foreign_folders_are_refused(url, corpus, local):
    put_cache(local, url)
    with pytest.raises(CacheMismatchError, match="top_k is 8, now 4"):
        capture_into(url, corpus, top_k=4)
    (url.parent / "other" / "thesis.tex").write_bytes(b"years of work")
    with pytest.raises(CacheMismatchError, match=r"holds no cache but thesis\.tex"):
        capture_into(url.parent / "other", corpus)


def test_convert_merge_and_export_read_and_write_the_store(tmp_path, url, local, corpus):
    converted, merged = url.parent / "converted", url.parent / "merged"
    convert_cache(ConvertConfig(cache=local, format="zarr", out=converted, workers=2))
    assert_equal_caches(converted, local)
    merge_caches(MergeConfig(caches=(converted, local), out=merged, workers=1))
    assert_equal_caches(merged, local)
    export_cache(ExportConfig(cache=converted, out=tmp_path / "export", workers=1))
    assert len(list((tmp_path / "export").glob("*.parquet"))) == CacheManifest.read(local).num_partitions


def test_cache_logits_writes_to_the_store_and_reuses_from_it(url, teacher, corpus):
    values = {"teacher": teacher, "corpus": corpus, "top_k": 8, "engine": "transformers", "shard_tokens": 500}
    cache_logits(CacheConfig(**values, out=url))
    cache_logits(CacheConfig(**values, out=url.parent / "again", reuse=(url,)))
    assert_equal_caches(url, url.parent / "again")
    assert verify_cache(url).problems == []


def test_student_trains_from_the_store_as_from_a_folder(tmp_path, url, local):
    put_cache(local, url)
    llama_config(open_cache(local).manifest.vocab_size, num_hidden_layers=1).save_pretrained(tmp_path / "student")
    losses = []
    for name, cache in (("local", local), ("store", url)):
        train_student(
            TrainConfig(student=tmp_path / "student", cache=cache, out=tmp_path / name, max_steps=2, log_steps=1)
        )
        losses.append(read_log(tmp_path / name / "log.jsonl"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert (tmp_path / "store" / "tokenizer.json").is_file()


def read_log(path: Path) -> list[float]:
    return [entry["loss"] for entry in map(json.loads, path.read_text().splitlines()) if "loss" in entry]


def test_copies_keep_to_their_limit_and_the_longest_unused_goes_first(url, local, monkeypatch):
    put_cache(local, url)
    cache = open_cache(url)
    sizes = [commit.bytes for commit in cache.commits]
    monkeypatch.setenv(copies.COPIES_GB, str((sizes[0] + max(sizes) + 100) / 1e9))
    monkeypatch.setattr(copies, "JUST_USED_S", 0.0)
    starts = cache.manifest.partitions
    for partition in range(len(sizes)):
        open_cache(url)[starts[partition]]
        if partition:
            open_cache(url)[starts[0]]
        names = {path.name for path in copies.copies_folder().iterdir()}
        assert cache.commits[0].xxh3_128 in names
        kept = [path for path in copies.copies_folder().iterdir() if not path.name.startswith(".")]
        assert sum(path.stat().st_size for path in kept) <= float(os.environ[copies.COPIES_GB]) * 1e9


def test_damaged_copy_is_fetched_again(url, local):
    put_cache(local, url)
    commit = open_cache(url).commits[0]
    open_cache(url)[0]
    copy = copies.copies_folder() / commit.xxh3_128
    damaged = bytearray(copy.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    copy.write_bytes(damaged)
    assert open_cache(url)[0].key == open_cache(local)[0].key
    assert hash_file(copy) == commit.xxh3_128


def test_large_file_comes_in_ranges(tmp_path, url, monkeypatch):
    monkeypatch.setattr(storage, "RANGE_BYTES", 1000)
    contents = np.random.default_rng(0).bytes(12_345)
    (tmp_path / "file").write_bytes(contents)
    (url / "file").upload(tmp_path / "file")
    (url / "file").download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == contents


@pytest.mark.parametrize("kind", ["500", "throttle", "drop", "lose"])
def test_faults_of_a_part_do_not_harm_a_large_upload(server, tmp_path, url, kind):
    contents = np.random.default_rng(0).bytes(12 << 20)  # three parts
    (tmp_path / "file").write_bytes(contents)
    server.fail((kind, "PUT", "large", 2), (kind, "POST", "large", 1))
    (url / "large").upload(tmp_path / "file")
    assert server.met() == [2, 1]
    server.fail(("cut", "GET", "large", 1))
    (url / "large").download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == contents


def read_first(cache, queue) -> None:
    queue.put(cache[0].key)


def test_forked_worker_can_read(url, local):
    """What a DataLoader does: the parent has opened the cache, whose client's threads a fork does not have."""
    put_cache(local, url)
    cache = open_cache(url)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=read_first, args=(cache, queue))
    worker.start()
    assert queue.get(timeout=120) == open_cache(local)[0].key
    worker.join()


def test_urls_are_settings_only_where_they_can_be(tmp_path):
    config = load_config(TrainConfig, None, {"student": "s", "cache": "s3://bucket/a/b/", "out": "o"})
    assert config.cache == ObjectPath("s3://bucket/a/b")
    with pytest.raises(ConfigError, match=r"out is s3://bucket/o; this must be a path on this machine"):
        load_config(TrainConfig, None, {"student": "s", "cache": "c", "out": "s3://bucket/o"})
    with pytest.raises(ConfigError, match=r"ftp://host/a: not the URL of an object store; expected s3://"):
        load_config(TrainConfig, None, {"student": "s", "cache": "ftp://host/a", "out": "o"})


def test_missing_cache_is_the_same_error_as_in_a_folder(url):
    with pytest.raises(CacheIncompleteError, match="no cache there"):
        open_cache(url)
    shutil.rmtree(copies.copies_folder())
