"""Caches in an object store, against a real S3 server on loopback that fails on demand."""

import os

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS
from pipeline.cache.folder import CacheFolder
from pipeline.cache.verify import verify_cache
from pipeline.errors import (
    ConfigError,
    StorageError,
)
from pipeline.files import hash_file
from pipeline.processes import owner_name
from pipeline.settings import load_config
from pipeline.stores import local_copies
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.patience import PATIENCE
from pipeline.stores.sealed import write_json
from stages.train_student.settings import TrainConfig
from tests.support.helpers import run
from tests.support.object_store import capture_into, put_cache
from tests.support.small import assert_equal_caches, make_cache


@pytest.fixture(scope="module")
def local(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("local") / "cache", corpus)


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
    monkeypatch.setenv(PATIENCE, "0.3")
    put_cache(local, url)
    for kind, message in [("500", "InternalError"), ("throttle", "SlowDown"), ("drop", "error sending request")]:
        server.fail((kind, "GET", "manifest.json", 10_000))
        code, _, err = run("verify", url)
        assert code == 75
        assert err.count("\n") == 1
        assert f"{url}/manifest.json: cannot read it: " in err
        assert message in err
    server.fail(("deny", "GET", "manifest.json", 10_000))
    with pytest.raises(StorageError, match="AccessDenied"):
        open_cache(url)
    assert server.met() == [1]


@pytest.mark.parametrize("kind", ["500", "drop", "lose"])
def test_capture_into_the_store_commits_each_partition_once_whatever_fails(server, url, corpus, local, kind):
    server.fail((kind, "PUT", "/shards/", 2), (kind, "PUT", "/commits/", 2), (kind, "PUT", "manifest.json", 1))
    capture_into(url, corpus)
    assert server.met() == [2, 2, 1]
    assert verify_cache(url).problems == []
    assert_equal_caches(url, local)
    assert len((url / SHARDS).names()) == len((url / COMMITS).names())
    assert [path for path in local_copies.copies_folder().iterdir() if path.name.endswith(".partial")] == []


def test_what_a_killed_writer_left_on_this_machine_goes(url, local):
    put_cache(local, url)
    place = owner_name().rpartition(".")[0]
    dead, alive = (
        local_copies.copies_folder() / f"00001-0123abcd-{place}.{pid}.arrow.partial" for pid in (2**22 + 1, 1)
    )
    for path in (dead, alive):
        path.touch()
    assert CacheFolder(url).remove_leftovers() == 1
    assert not dead.exists()
    assert alive.exists()


def test_copies_keep_to_their_limit_and_the_longest_unused_goes_first(url, local, monkeypatch):
    put_cache(local, url)
    cache = open_cache(url)
    sizes = [commit.bytes for commit in cache.commits]
    monkeypatch.setenv(local_copies.COPIES_GB, str((sizes[0] + max(sizes) + 100) / 1e9))
    monkeypatch.setattr(local_copies, "JUST_USED_S", 0.0)
    starts = cache.manifest.partitions
    for partition in range(len(sizes)):
        open_cache(url)[starts[partition]]
        if partition:
            open_cache(url)[starts[0]]
        names = {path.name for path in local_copies.copies_folder().iterdir()}
        assert local_copies.copy_name(str(url / SHARDS / cache.commits[0].file), cache.commits[0].xxh3_128) in names
        kept = [path for path in local_copies.copies_folder().iterdir() if not path.name.startswith(".")]
        assert sum(path.stat().st_size for path in kept) <= float(os.environ[local_copies.COPIES_GB]) * 1e9


def test_damaged_copy_is_fetched_again(url, local):
    put_cache(local, url)
    commit = open_cache(url).commits[0]
    open_cache(url)[0]
    copy = local_copies.copies_folder() / local_copies.copy_name(str(url / SHARDS / commit.file), commit.xxh3_128)
    damaged = bytearray(copy.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    copy.write_bytes(damaged)
    assert open_cache(url)[0].key == open_cache(local)[0].key
    assert hash_file(copy) == commit.xxh3_128


@pytest.mark.parametrize("kind", ["500", "throttle", "drop", "lose"])
def test_faults_of_a_part_do_not_harm_a_large_upload(server, tmp_path, url, kind):
    contents = np.random.default_rng(0).bytes(12 << 20)  # three parts
    (tmp_path / "file").write_bytes(contents)
    server.fail((kind, "PUT", "large", 2), (kind, "POST", "large", 1))
    (url / "large").publish(tmp_path / "file")
    assert server.met() == [2, 1]
    server.fail(("cut", "GET", "large", 1))
    (url / "large").download(tmp_path / "copy", len(contents))
    assert (tmp_path / "copy").read_bytes() == contents


def test_urls_are_settings_only_where_they_can_be(tmp_path):
    config = load_config(TrainConfig, None, {"student": "s", "cache": "s3://bucket/a/b/", "out": "o"})
    assert config.cache == (ObjectStore("s3://bucket/a/b"),)
    with pytest.raises(ConfigError, match=r"out is s3://bucket/o; this must be a path on this machine"):
        load_config(TrainConfig, None, {"student": "s", "cache": "c", "out": "s3://bucket/o"})
    with pytest.raises(ConfigError, match=r"ftp://host/a: not the URL of an object store; expected s3://"):
        load_config(TrainConfig, None, {"student": "s", "cache": "ftp://host/a", "out": "o"})
