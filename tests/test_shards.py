"""One contract for every container and bound on the KL error, and for a cache made of them."""

import dataclasses
import pickle
import warnings

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import CacheCorruptError, CacheError, CacheIncompleteError, ConfigError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import checksum_of
from stages.cache_logits.fake_engine import fake_targets
from tests.support.small import make_cache
from tests.test_format import read_by_the_book


@pytest.fixture(params=CONTAINERS)
def container(request):
    return request.param


@pytest.fixture
def cache_folder(tmp_path, corpus, container):
    return make_cache(tmp_path / "cache", corpus, container=container)


@pytest.mark.parametrize(("max_kl_error", "tolerance"), [(0.0, 1e-7), (1e-4, 1e-3)])
@pytest.mark.parametrize(("top_k", "draws"), [(8, 0), (8, 5), (0, 6), (1, 0)])
def test_cache_returns_what_was_captured(tmp_path, corpus, container, max_kl_error, tolerance, top_k, draws):
    settings = {"container": container, "max_kl_error": max_kl_error, "top_k": top_k, "tail_samples": draws}
    cache = open_cache(make_cache(tmp_path / "cache", corpus, **settings))
    assert verify_cache(tmp_path / "cache").problems == []
    sequences = list(Corpus(corpus).rows())
    assert len(cache) == len(sequences)
    for index in np.random.default_rng(0).permutation(len(cache)):
        found, sequence = cache[index], sequences[index]
        assert found.key == sequence.key
        np.testing.assert_array_equal(found.token_ids, sequence.token_ids)
        np.testing.assert_array_equal(found.loss_mask, sequence.loss_mask)
        np.testing.assert_array_equal(found.document_lengths, sequence.document_lengths)
        np.testing.assert_array_equal(found.loss_mask[found.target_positions + 1], True)
        tokens, labels = (sequence.token_ids[sequence.target_positions + step] for step in (0, 1))
        expected = fake_targets(tokens, labels, top_k, (1.0, 2.0), cache.manifest.vocab_size, draws)
        np.testing.assert_array_equal(np.sort(found.targets.ids), np.sort(expected.ids))
        np.testing.assert_array_equal(found.targets.draws, expected.draws)
        aligned = in_order_of(expected.ids, found.targets)
        for temperature in (1.0, 2.0):
            for name in ("probs", "tail_mass", "label_logprobs"):
                wanted, got = (getattr(targets, name)(temperature) for targets in (expected, aligned))
                assert got.dtype == np.float32
                if name == "label_logprobs":
                    wanted, got = np.exp(wanted), np.exp(got)
                assert np.abs(got - wanted).max(initial=0) <= tolerance
            entropies = found.targets.entropy(temperature), expected.entropy(temperature)
            np.testing.assert_allclose(*entropies, atol=1 / 128 if max_kl_error else 1e-7)


def in_order_of(ids, targets):
    """The targets with the ids in the given order: rounding may make equals of what was not, and reorder them."""
    places = np.argsort(targets.ids, axis=1)[np.arange(len(ids))[:, None], np.argsort(np.argsort(ids, axis=1), axis=1)]
    entries = {name: np.take_along_axis(getattr(targets, name), places, axis=1) for name in ("ids", "logits")}
    assert (entries["ids"] == ids).all()
    return dataclasses.replace(targets, **entries)


def test_containers_hold_the_same_columns_bit_for_bit(tmp_path, corpus):
    folders = [make_cache(tmp_path / name, corpus, container=name, tail_samples=3) for name in CONTAINERS]
    caches = [open_cache(folder) for folder in folders]
    assert len({len(cache.commits) for cache in caches}) == 1
    for partition, commit in enumerate(caches[0].commits):
        first, *others = (cache.shard(partition).open().columns(0, commit.num_sequences) for cache in caches)
        for other in others:
            assert list(first) == list(other)
            for name in first:
                assert first[name].dtype == other[name].dtype
                np.testing.assert_array_equal(first[name], other[name])


def test_shard_of_many_bundles_and_chunks_is_what_zarr_reads(tmp_path, corpus, monkeypatch):
    for name, value in {"CHUNK_VALUES": 128, "MAX_CHUNK_ROWS": 20, "STEP_COLUMNS": 3, "CHUNKS_IN_BUNDLE": 2}.items():
        monkeypatch.setattr(f"pipeline.formats.zarr.{name}", value)
    arrow, archive = (open_cache(make_cache(tmp_path / name, corpus, container=name)) for name in ("arrow", "zarr"))
    assert max(commit.num_targets for commit in archive.commits) > 3 * 20 * 2  # several bundles of every array
    for index in np.random.default_rng(0).permutation(len(arrow)):
        assert checksum_of(vars(archive[index].targets)) == checksum_of(vars(arrow[index].targets))
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's, on numcodecs' codecs
        rows = list(read_by_the_book(archive.folder))
    for row, sequence in zip(rows, arrow, strict=True):
        np.testing.assert_array_equal(row["ids"], sequence.targets.ids)
        np.testing.assert_array_equal(row["logits"], sequence.targets.logits)


def test_batch_gives_the_sequences_in_the_order_asked_for(cache_folder):
    cache = open_cache(cache_folder)
    indexes = [3, len(cache) - 1, 0, 3, -2, 17]
    assert [sequence.key for sequence in cache.batch(indexes)] == [cache[index].key for index in indexes]
    assert cache.batch([]) == []
    with pytest.raises(IndexError):
        cache.batch([0, len(cache)])


def test_uncaptured_temperature_lists_the_captured_ones(cache_folder):
    targets = open_cache(cache_folder)[0].targets
    with pytest.raises(ConfigError, match=r"3 was not captured.*1, 2"):
        targets.probs(temperature=3.0)


def test_cache_is_a_sequence_and_can_be_pickled(cache_folder):
    cache = open_cache(cache_folder)
    assert cache[-1].key == cache[len(cache) - 1].key == pickle.loads(pickle.dumps(cache))[-1].key
    with pytest.raises(IndexError):
        cache[len(cache)]
    assert len({sequence.key for sequence in cache}) == len(cache)


def test_sound_cache_verifies(cache_folder):
    report = verify_cache(cache_folder)
    assert report.problems == []
    assert report.num_sequences == len(open_cache(cache_folder))


def read_everything(folder):
    for _ in open_cache(folder):
        pass


def assert_refused(folder, name):
    """`verify` names the file, and reading raises."""
    report = verify_cache(folder)
    assert any(name in problem for problem in report.problems), report.problems
    with pytest.raises(CacheError, match=name):
        read_everything(folder)


def test_flipped_byte_anywhere_in_a_shard_is_found(cache_folder):
    path = sorted((cache_folder / SHARDS).iterdir())[1]
    contents = path.read_bytes()
    positions = np.random.default_rng().integers(0, len(contents), 12)
    for position in [0, len(contents) - 1, *positions]:
        damaged = bytearray(contents)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        assert_refused(cache_folder, path.name)
    path.write_bytes(contents)
    assert verify_cache(cache_folder).problems == []


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_truncated_shard_is_found(cache_folder, kept):
    path = sorted((cache_folder / SHARDS).iterdir())[0]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert_refused(cache_folder, path.name)


def test_missing_shard_is_found(cache_folder):
    path = sorted((cache_folder / SHARDS).iterdir())[-1]
    path.unlink()
    assert_refused(cache_folder, path.name)


def test_shards_of_two_partitions_that_were_swapped_are_found(cache_folder):
    first, second = sorted((cache_folder / SHARDS).iterdir())[:2]
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)
    assert_refused(cache_folder, first.name)


def test_damaged_commit_record_is_found(cache_folder):
    path = sorted((cache_folder / COMMITS).iterdir())[0]
    contents = path.read_bytes()
    for position in np.random.default_rng().integers(0, len(contents) - 1, 12):
        damaged = bytearray(contents)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert_refused(cache_folder, path.name)


def test_damaged_manifest_is_refused(cache_folder):
    path = cache_folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"top_k": 8', b'"top_k": 9'))
    with pytest.raises(CacheCorruptError, match=r"manifest\.json"):
        open_cache(cache_folder)


def test_uncommitted_partition_makes_the_cache_incomplete(cache_folder):
    (cache_folder / COMMITS / "00001.json").unlink()
    with pytest.raises(CacheIncompleteError, match=r"1 of \d+ partitions"):
        open_cache(cache_folder)
    assert any("00001.json" in problem for problem in verify_cache(cache_folder).problems)
