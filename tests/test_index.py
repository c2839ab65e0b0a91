"""The index of a complete cache: never more than a copy of the commit records."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, commit_path, read_commit
from pipeline.cache.index import INDEX, open_index
from pipeline.cache.manifest import CacheManifest
from pipeline.errors import CacheCorruptError, CacheError, CacheIncompleteError
from pipeline.files import PARTIAL
from pipeline.processes import owner_name
from pipeline.stores.sealed import read_json, write_json
from tests.support.small import make_cache


@pytest.fixture
def cache_folder(tmp_path, corpus):
    return make_cache(tmp_path / "cache", corpus)


def forbid_reading_records(monkeypatch):
    def refuse(*_):
        raise AssertionError("a commit record was read")

    monkeypatch.setattr("pipeline.cache.index.read_commit", refuse)


def test_index_holds_every_record_and_is_read_instead_of_them(cache_folder, monkeypatch):
    expected = [read_commit(cache_folder, part) for part in range(len(list((cache_folder / COMMITS).iterdir())))]
    assert list(open_cache(cache_folder).commits) == expected
    forbid_reading_records(monkeypatch)
    cache = open_cache(cache_folder)
    assert list(cache.commits) == expected
    assert cache.commits[-1] == expected[-1]
    assert cache.commits[1:3] == expected[1:3]
    with pytest.raises(IndexError):
        cache.commits[len(expected)]
    np.testing.assert_array_equal(cache.commits.column("num_tokens"), [commit.num_tokens for commit in expected])


def test_incomplete_cache_gets_no_index(cache_folder):
    commit_path(cache_folder, 1).unlink()
    with pytest.raises(CacheIncompleteError, match=r"1 of \d+ partitions"):
        open_cache(cache_folder)
    assert not (cache_folder / INDEX).exists()


def test_index_of_records_that_have_gone_or_changed_is_stale(cache_folder):
    open_cache(cache_folder)
    path = commit_path(cache_folder, 1)
    document = read_json(path, CacheError)
    path.unlink()
    with pytest.raises(CacheIncompleteError):
        open_cache(cache_folder)
    write_json(path, document | {"statistics": {"seconds": 7.0}})
    assert open_cache(cache_folder).commits[1].statistics == {"seconds": 7.0}


def test_damaged_record_behind_an_index_is_named(cache_folder):
    open_cache(cache_folder)
    path = commit_path(cache_folder, 1)
    path.write_bytes(path.read_bytes().replace(b'"partition": 1', b'"partition": 7'))
    with pytest.raises(CacheCorruptError, match=path.name):
        open_cache(cache_folder)


def test_index_with_any_byte_flipped_or_cut_off_is_made_again(cache_folder):
    expected = list(open_cache(cache_folder).commits)
    path = cache_folder / INDEX
    contents = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [contents[:length] for length in (0, 1, 15, 16, 17, len(contents) - 1)]
    for position in random.integers(0, len(contents), 30):
        flipped = bytearray(contents)
        flipped[position] ^= 1 << int(random.integers(8))
        damaged.append(bytes(flipped))
    for case in damaged:
        path.write_bytes(case)
        assert list(open_cache(cache_folder).commits) == expected
        assert path.read_bytes() == contents


def test_racing_builders_leave_one_whole_index(cache_folder):
    manifest = CacheManifest.read(cache_folder)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: list(open_index(cache_folder, manifest)), range(16)))
    assert all(commits == found[0] for commits in found)
    assert not list(cache_folder.glob(f"*{PARTIAL}"))
    assert list(open_cache(cache_folder).commits) == found[0]


def test_leftover_of_a_killed_builder_goes(cache_folder):
    place = owner_name().rpartition(".")[0]
    dead = cache_folder / f"{INDEX}-00000000-{place}.999999999{PARTIAL}"
    alive = cache_folder / f"{INDEX}-00000000-{owner_name()}{PARTIAL}"
    for path in (dead, alive):
        path.write_bytes(b"half")
    open_cache(cache_folder)
    assert not dead.exists()
    assert alive.exists()


def test_folder_that_cannot_be_written_is_read_from_its_records(cache_folder, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.stores.local_store.publish", full_disk)
    assert len(open_cache(cache_folder).commits) == len(list((cache_folder / COMMITS).iterdir()))
    assert not (cache_folder / INDEX).exists()
    assert not list(cache_folder.glob(f"*{PARTIAL}"))


def test_statistics_survive(cache_folder):
    (commit, *_) = open_cache(cache_folder).commits
    assert json.loads(json.dumps(commit.statistics)) == read_commit(cache_folder, 0).statistics
