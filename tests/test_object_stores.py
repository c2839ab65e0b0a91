"""What holds for caches in every object store: S3, and Azure's Blob Storage where its emulator is installed."""

import json
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, commit_path, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.repair import repair_cache
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.export import export_cache
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.settings import ConvertConfig, ExportConfig, MergeConfig
from pipeline.stores import object_store as storage
from pipeline.stores.local_copies import COPIES
from pipeline.stores.object_store import ObjectStore
from stages.cache_logits.capture import capture
from stages.cache_logits.fake_engine import FakeEngine
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import CacheConfig
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from tests.support import azurite
from tests.support.object_store import capture_into, put_cache
from tests.support.small import assert_equal_caches, fake_manifest, llama_config, make_cache

needs_azurite = pytest.mark.skipif(azurite.find() is None, reason="Azurite is not installed; `make slow` does it")


@pytest.fixture(scope="module")
def running_azurite():
    with azurite.running() as environment:
        yield environment


@pytest.fixture(params=["s3", pytest.param("az", marks=[pytest.mark.slow, needs_azurite])])
def url(request, tmp_path, monkeypatch):
    """A prefix that no other test uses."""
    if request.param == "s3":
        request.getfixturevalue("server")
    else:
        monkeypatch.setenv(COPIES, str(tmp_path / "copies"))
        for name, value in request.getfixturevalue("running_azurite").items():
            monkeypatch.setenv(name, value)
    return ObjectStore(f"{request.param}://bucket/{tmp_path.name}/cache")


@pytest.fixture(scope="module")
def local(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("local") / "cache", corpus)


def test_cache_is_read_from_the_store_and_then_from_its_copies(url, local):
    put_cache(local, url)
    assert_equal_caches(url, local)
    for name in (url / SHARDS).names():
        (url / SHARDS / name).unlink()
    assert_equal_caches(url, local)


def test_renewing_is_of_the_version_that_it_names(url):
    """What leases are made of: of many that have seen the same version, one changes it."""
    path, wins = url / "lease", []
    seen = path.create(b"0")
    threads = [threading.Thread(target=lambda n=n: wins.append(path.renew(b"%d" % n, seen))) for n in range(1, 9)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    (newest,) = [version for version in wins if version]
    assert path.renew(b"lost", seen) is None
    assert path.renew(b"again", newest)
    assert path.read() == b"again"
    with pytest.raises(TypeError):
        os.fspath(url)


def test_damage_in_the_store_is_found_repaired_and_made_again(url, local, corpus):
    put_cache(local, url)
    commits = [read_commit(local, partition) for partition in range(4)]
    path = url / SHARDS / commits[0].file
    path.write(path.read()[:-5])
    contents = bytearray((url / SHARDS / commits[1].file).read())
    contents[700] ^= 2
    (url / SHARDS / commits[1].file).write(bytes(contents))
    (url / SHARDS / commits[2].file).unlink()
    commit_path(url, 3).write(b"{}")
    (url / "tokenizer" / "tokenizer.json").write(b"{}")
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


def test_two_writers_of_one_cache_commit_each_partition_once(url, corpus, local):
    corpus_rows = Corpus(corpus)
    manifest = fake_manifest(corpus_rows)
    CacheFolder.begin(url, manifest, corpus / "tokenizer")
    failures = []

    def write() -> None:
        try:
            parts = range(manifest.num_partitions)
            capture(FakeEngine(manifest), Corpus(corpus), CacheFolder(url), parts)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=write) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    assert_equal_caches(url, local)
    assert len((url / SHARDS).names()) == manifest.num_partitions


def test_other_settings_and_foreign_folders_are_refused(url, corpus, local):
    put_cache(local, url)
    with pytest.raises(CacheMismatchError, match="top_k is 8, now 4"):
        capture_into(url, corpus, top_k=4)
    (url.parent / "other" / "thesis.tex").write(b"years of work")
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
            TrainConfig(
                student=tmp_path / "student" / "config.json", cache=cache, out=tmp_path / name, max_steps=2, log_steps=1
            )
        )
        losses.append(read_log(tmp_path / name / "log.jsonl"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert (tmp_path / "store" / "tokenizer.json").is_file()


def read_log(path: Path) -> list[float]:
    return [entry["loss"] for entry in map(json.loads, path.read_text().splitlines()) if "loss" in entry]


def test_large_file_goes_in_parts_and_comes_in_ranges(tmp_path, url, monkeypatch):
    monkeypatch.setattr(storage, "RANGE_BYTES", 1_000_000)
    contents = np.random.default_rng(0).bytes(12 << 20)
    (tmp_path / "file").write_bytes(contents)
    (url / "file").publish(tmp_path / "file")
    (url / "file").download(tmp_path / "copy", len(contents))
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


def test_missing_cache_is_the_same_error_as_in_a_folder(url):
    with pytest.raises(CacheIncompleteError, match="no cache there"):
        open_cache(url)
