"""Damage of every kind is found, dropped, and made again: the cache ends as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS, commit_path, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.repair import repair_cache
from pipeline.cache.verify import verify_cache
from pipeline.corpus import TOKENIZER
from pipeline.errors import CacheIncompleteError
from pipeline.stores.sealed import write_json
from tests.support.helpers import run
from tests.support.small import assert_equal_caches, make_cache, make_corpus, random_sequences


def shard(folder: Path, partition: int) -> Path:
    commit = read_commit(folder, partition)
    return folder / SHARDS / commit.file


def flip(path: Path, position: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[position % len(contents)] ^= 16
    path.write_bytes(contents)


def swap(first: Path, second: Path) -> None:
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)


def other_values(folder: Path) -> None:
    """A shard of another teacher under a record that fits it: only the values tell."""
    document = json.loads(commit_path(folder, 2).read_text())
    del document["checksum"]
    flip(shard(folder, 2), 5_000)
    write_json(commit_path(folder, 2), document)


DAMAGE = {
    "a flipped byte": lambda folder: flip(shard(folder, 1), 4_321),
    "a truncated shard": lambda folder: shard(folder, 0).write_bytes(shard(folder, 0).read_bytes()[:-7]),
    "an empty shard": lambda folder: shard(folder, 3).write_bytes(b""),
    "a lost shard": lambda folder: shard(folder, 2).unlink(),
    "all shards lost": lambda folder: [path.unlink() for path in (folder / SHARDS).iterdir()],
    "a foreign shard": lambda folder: shard(folder, 1).write_bytes(b"PK\x03\x04 something else"),
    "two shards that were swapped": lambda folder: swap(shard(folder, 0), shard(folder, 1)),
    "a flipped byte in a record": lambda folder: flip(commit_path(folder, 1), 33),
    "a truncated record": lambda folder: commit_path(folder, 1).write_bytes(commit_path(folder, 1).read_bytes()[:50]),
    "an empty record": lambda folder: commit_path(folder, 1).write_bytes(b""),
    "a lost record": lambda folder: commit_path(folder, 2).unlink(),
    "a record that was copied": lambda folder: shutil.copy(commit_path(folder, 1), commit_path(folder, 2)),
    "a record that is another document": lambda folder: write_json(commit_path(folder, 2), {"epoch": 3}),
    "records that were swapped": lambda folder: swap(commit_path(folder, 1), commit_path(folder, 3)),
    "a record of other bytes": other_values,
    "a lost tokenizer": lambda folder: shutil.rmtree(folder / TOKENIZER),
    "a changed tokenizer": lambda folder: flip(folder / TOKENIZER / "tokenizer.json", 700),
}


IN_ZARR_TOO = ("a flipped byte", "a truncated shard", "a foreign shard", "a record of other bytes")
CASES = [("arrow", kind) for kind in DAMAGE] + [("zarr", kind) for kind in IN_ZARR_TOO]


@pytest.fixture(scope="module")
def caches(tmp_path_factory, corpus):
    """A whole cache in either container."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: make_cache(folder / name, corpus, container=name) for name in ("arrow", "zarr")}


@pytest.fixture
def whole(caches):
    return caches["arrow"]


@pytest.mark.parametrize(("container", "kind"), CASES)
def test_damage_is_dropped_and_made_again(tmp_path, caches, corpus, container, kind):
    folder, whole = tmp_path / "cache", caches[container]
    shutil.copytree(whole, folder)
    manifest = CacheManifest.read(folder)
    DAMAGE[kind](folder)
    report = verify_cache(folder)
    assert report.problems
    repair_cache(folder, report)
    after = verify_cache(folder)
    assert after.damaged == []
    assert after.missing == sorted(report.damaged + report.missing)
    kept = [shard(folder, part) for part in range(manifest.num_partitions) if part not in after.missing]
    untouched = {path: path.stat().st_mtime_ns for path in kept}
    CacheFolder.begin(folder, manifest, corpus / TOKENIZER)
    make_cache(folder, corpus, container=manifest.container)
    report = verify_cache(folder)
    assert report.problems == []
    repair_cache(folder, report)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert len(list((folder / SHARDS).iterdir())) == manifest.num_partitions
    assert_equal_caches(folder, whole)


def test_sound_cache_is_left_as_it_is_but_for_what_no_record_names(tmp_path, whole):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    name = shard(folder, 1).name
    loser = folder / SHARDS / name.replace(name.split("-")[1], "01234567")
    loser.write_bytes(b"the loser of a race that was killed before it cleaned up")
    repair_cache(folder, verify_cache(folder))
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_shard_of_a_partition_without_a_record_stays_for_its_writer(tmp_path, whole):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    about_to_be_committed = shard(folder, 1)
    commit_path(folder, 1).unlink()
    repair_cache(folder, verify_cache(folder))
    assert about_to_be_committed.exists()


def test_repair_that_was_killed_between_shard_and_record_is_finished_by_the_next(tmp_path, whole, corpus):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    flip(shard(folder, 1), 99)
    shard(folder, 1).unlink()
    report = verify_cache(folder)
    assert report.damaged == [1]
    repair_cache(folder, report)
    make_cache(folder, corpus, container=CacheManifest.read(folder).container)
    assert_equal_caches(folder, whole)


def test_the_command_says_what_to_run_next_and_exits_0(tmp_path, whole):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    flip(shard(folder, 1), 99)
    assert run("verify", folder)[0] == 1
    code, out, _ = run("verify", folder, "--repair")
    assert code == 0
    assert "1 damaged partitions were dropped" in out
    with pytest.raises(CacheIncompleteError):
        open_cache(folder)
    assert sorted(path.name for path in (folder / COMMITS).iterdir())[:2] == ["00000.json", "00002.json"]


@pytest.mark.parametrize("lost", ["manifest.json", "manifest.copy.json"])
@pytest.mark.parametrize("kind", ["flipped", "empty", "gone"])
def test_manifest_and_its_copy_make_each_other_again(tmp_path, whole, lost, kind):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    path = folder / lost
    {"flipped": lambda: flip(path, 90), "empty": lambda: path.write_bytes(b""), "gone": path.unlink}[kind]()
    if not (lost == "manifest.copy.json" and kind == "gone"):
        assert run("verify", folder)[0] != 0
    code, out, _ = run("verify", folder, "--repair")
    assert code == 0, out
    assert (folder / lost).read_bytes() == (whole / lost).read_bytes()
    assert_equal_caches(folder, whole)
    assert verify_cache(folder).problems == []


def test_two_damaged_manifests_are_beyond_repair(tmp_path, whole):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    for name in ("manifest.json", "manifest.copy.json"):
        flip(folder / name, 77)
    code, out, _ = run("verify", folder, "--repair")
    assert code == 1
    assert "put one back from a backup" in out


def test_verify_finds_sequences_that_are_there_twice(tmp_path):
    """A record that was made to fit another partition's shard."""
    sequences = [random_sequences(1, 300, seed=seed)[0] for seed in range(8)]
    folder = make_cache(tmp_path / "cache", make_corpus(tmp_path / "corpus", sequences))
    sizes = [read_commit(folder, partition).num_sequences for partition in range(2)]
    assert sizes == [4, 4]
    document = json.loads(commit_path(folder, 0).read_text()) | {"partition": 1}
    del document["checksum"]
    write_json(commit_path(folder, 1), document)
    report = verify_cache(folder)
    assert len(report.problems) == 1
    assert "is in partition 0 too" in report.problems[0]
    assert report.damaged == [1]
