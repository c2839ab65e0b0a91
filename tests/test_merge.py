"""Several caches as one: every sequence once, equal to the bit."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheCorruptError, CacheMismatchError, ConfigError
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.settings import MergeConfig
from pipeline.targets import reconstruction_errors
from stages.cache_logits.fake_engine import fake_targets
from tests.support.helpers import run
from tests.support.small import contents_of, make_cache, make_corpus, random_sequences

ROOT = Path(__file__).parent.parent
SEQUENCES = random_sequences(40, 300, seed=5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two caches that share ten sequences, in either container, and one of all."""
    folder = tmp_path_factory.mktemp("merge")
    ranges = {"first": SEQUENCES[:25], "second": [*SEQUENCES[36:], *SEQUENCES[15:36]], "all": SEQUENCES}
    for name, sequences in ranges.items():
        corpus = make_corpus(folder / f"corpus-{name}", sequences)
        for container in ("arrow", "zarr") if name != "all" else ("arrow",):
            make_cache(folder / f"{name}-{container}", corpus, container=container, tail_samples=2)
    return folder


def assert_has_all(folder: Path, parts: Path) -> None:
    """Every sequence once, with every bit; first the first cache's, in order."""
    assert verify_cache(folder).problems == []
    found, wanted = contents_of(folder), contents_of(parts / "all-arrow")
    assert len(open_cache(folder)) == len(found) == len(SEQUENCES)
    assert list(found)[:25] == [sequence.key for sequence in SEQUENCES[:25]]
    assert set(found) == set(wanted)
    for key, arrays in wanted.items():
        for one, other in zip(arrays, found[key], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("first", "second", "out"),
    [("arrow", "arrow", None), ("arrow", "zarr", None), ("zarr", "arrow", "zarr"), ("zarr", "zarr", "arrow")],
)
def test_merged_cache_has_every_sequence_once(tmp_path, parts, first, second, out):
    caches = (parts / f"first-{first}", parts / f"second-{second}")
    merge_caches(MergeConfig(caches=caches, out=tmp_path / "merged", format=out, workers=1))
    assert_has_all(tmp_path / "merged", parts)
    assert open_cache(tmp_path / "merged").manifest.container == (out or first)


def test_statistics_of_a_filtered_shard_are_its_own(tmp_path, parts):
    merge_caches(MergeConfig(caches=(parts / "first-arrow", parts / "second-arrow"), out=tmp_path / "merged"))
    cache = open_cache(tmp_path / "merged")
    for commit in cache.commits:
        start, stop = cache.manifest.partitions[commit.partition : commit.partition + 2]
        entropy = sum(float(cache[index].targets.entropy(2.0).sum(dtype=np.float64)) for index in range(start, stop))
        np.testing.assert_allclose(commit.statistics["sum_entropy"][1], entropy, rtol=2e-3)
        assert commit.num_tokens == sum(len(cache[index].token_ids) for index in range(start, stop))


def test_errors_of_a_filtered_shard_are_not_understated(tmp_path, parts):
    """A bound on what the sequences that stay have lost, measured against what FakeEngine says."""
    merge_caches(MergeConfig(caches=(parts / "first-arrow", parts / "second-arrow"), out=tmp_path / "merged"))
    cache = open_cache(tmp_path / "merged")
    for commit in cache.commits:
        lost = []
        for index in range(*cache.manifest.partitions[commit.partition : commit.partition + 2]):
            sequence = cache[index]
            tokens, labels = (sequence.token_ids[sequence.target_positions + step] for step in (0, 1))
            exact = fake_targets(tokens, labels, 8, (1.0, 2.0), cache.manifest.vocab_size, 2)
            lost.append(reconstruction_errors(*in_id_order(exact, sequence.targets)))
        kl, largest = (np.concatenate(parts) for parts in zip(*lost, strict=True))
        stated = np.array(commit.statistics["mean_kl_error"])
        assert (stated >= kl.mean(0, dtype=np.float64) * (1 - 1e-5)).all()
        assert (stated <= 1e-4 * 1.001).all()
        assert (np.array(commit.statistics["max_probability_error"]) >= largest.max(0) * (1 - 1e-6)).all()


def in_id_order(*targets):
    """The targets with the entries of every row by rising id."""
    for part in targets:
        order = np.argsort(part.ids, axis=1)
        entries = {name: np.take_along_axis(getattr(part, name), order, axis=1) for name in ("ids", "logits")}
        yield dataclasses.replace(part, **entries)


def test_cache_merged_with_itself_is_itself(tmp_path, parts):
    caches = (parts / "first-arrow", parts / "first-arrow")
    merge_caches(MergeConfig(caches=caches, out=tmp_path / "merged", workers=1))
    assert list(contents_of(tmp_path / "merged")) == list(contents_of(parts / "first-arrow"))


def test_three_caches_by_the_command_in_several_processes(tmp_path, parts):
    caches = [parts / "first-arrow", parts / "second-zarr", parts / "all-arrow"]
    command = ["merge", *caches, "--out", tmp_path / "merged", "--workers", 2]
    code, _, err = run(*command)
    assert code == 0, err
    assert "40 sequences; 50 are in more than one cache and stored once" in err
    assert_has_all(tmp_path / "merged", parts)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged" / SHARDS).iterdir()}
    assert run(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


KILLED = """
from pathlib import Path
from sys import argv
from pipeline.lifecycle.settings import MergeConfig
from pipeline.lifecycle.merge import merge_caches
from tests.support.crash import kill_everywhere
config = MergeConfig(caches=(Path(argv[1]), Path(argv[2])), out=Path(argv[3]), workers=1)
kill_everywhere(lambda: merge_caches(config))
"""


@pytest.mark.slow
def test_kill_9_at_every_file_operation_loses_and_repeats_nothing(tmp_path, parts):
    folders = [str(parts / "first-arrow"), str(parts / "second-arrow"), str(tmp_path / "merged")]
    finished = subprocess.run([sys.executable, "-c", KILLED, *folders], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 10
    assert_has_all(tmp_path / "merged", parts)


def test_other_targets_are_refused_with_the_difference_named(tmp_path, parts):
    corpus = parts / "corpus-second"
    for settings, message in [
        ({"top_k": 4, "tail_samples": 2}, "top_k is 4, there 8"),
        ({"max_kl_error": 0.0, "tail_samples": 2}, r"max_kl_error is 0\.0, there 0\.0001"),
        ({}, r"tail_samples is 0, there 2; draw_temperature is None, there 2\.0"),
    ]:
        other = make_cache(tmp_path / message[:8], corpus, **settings)
        with pytest.raises(CacheMismatchError, match=f"cannot be merged with .*: {message}"):
            merge_caches(MergeConfig(caches=(parts / "first-arrow", other), out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ConfigError, match="caches names 1 folder; a merge needs two or more"):
        MergeConfig(caches=(corpus,), out=tmp_path / "merged")


def test_damaged_shard_is_refused(tmp_path, parts):
    damaged = shutil.copytree(parts / "second-arrow", tmp_path / "damaged")
    path = sorted((damaged / SHARDS).iterdir())[-1]
    contents = bytearray(path.read_bytes())
    contents[2000] ^= 4
    path.write_bytes(contents)
    with pytest.raises(CacheCorruptError, match=path.name):
        merge_caches(MergeConfig(caches=(parts / "first-arrow", damaged), out=tmp_path / "merged", workers=1))
