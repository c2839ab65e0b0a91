"""Rounding to a bound on the KL error, and coding ids against context: what they promise, on hard rows."""

import dataclasses
import itertools

import numpy as np
import pytest

from pipeline.cache.commits import read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.corpus import TOKENIZER, Corpus, TokenSequence
from pipeline.formats.codec import _finer as made_finer
from pipeline.formats.codec import rising_in_runs, round_targets
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.grid import FINEST_LEVEL, Grid, grid_of, tail_places, tail_values
from pipeline.formats.layout import ShardCounts, ShardLayout, decode, encode
from pipeline.formats.packing import _model_arrays as model_arrays
from pipeline.formats.packing import model_of
from pipeline.formats.topics import FIRST_STRATUM, TABLE_SIZE, code_differences, learn, sum_differences
from pipeline.parallel import Threads
from pipeline.targets import COLUMNS, SparseTargets, TargetSpec, logsumexps_of, reconstruction_errors, unsketched
from stages.cache_logits.capture import capture
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.oracle import assert_within
from tests.support.rounding import total_errors
from tests.support.small import fake_manifest, make_cache

VOCAB_SIZE, TOP_K = 2000, 32


def random_targets(temperatures, num_rows=300, seed=0):
    """Float64-exact targets of flat, peaked and two-headed rows, and a label for each; ids at random."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, VOCAB_SIZE)) * random.uniform(0.2, 8, (num_rows, 1))
    logits[::3, 0] += random.uniform(0, 40, len(logits[::3]))
    logits[::5, 1] = logits[::5].max(axis=1) + random.uniform(0, 0.01, len(logits[::5]))
    ids = np.argsort(-logits, axis=1, kind="stable")
    logits = np.take_along_axis(logits, ids, axis=1)
    logits -= logits[:, :1]
    weights = [np.exp(logits / temperature) for temperature in temperatures]
    probs = [weight / weight.sum(axis=1, keepdims=True) for weight in weights]
    labels = random.integers(0, VOCAB_SIZE, num_rows)
    label_logits = logits[np.arange(num_rows), np.argsort(ids, axis=1)[np.arange(num_rows), labels]]
    columns = {
        "logits": logits[:, :TOP_K],
        "logsumexps": np.stack([np.log(weight.sum(axis=1)) for weight in weights], axis=1),
        "tail_logprobs": np.stack([np.log(prob[:, TOP_K:].sum(axis=1)) for prob in probs], axis=1),
        "entropies": np.stack([-(prob * np.log(prob + 1e-300)).sum(axis=1) for prob in probs], axis=1),
        "label_logits": label_logits,
    }
    floats = {name: values.astype(np.float32) for name, values in columns.items()}
    draws = np.zeros((num_rows, 0), np.int32)
    targets = SparseTargets(
        temperatures=temperatures, ids=ids[:, :TOP_K].astype(np.int32), draws=draws, **floats, **unsketched(len(ids))
    )
    return targets, labels.astype(np.int32), [prob[:, :TOP_K] for prob in probs]


@pytest.mark.parametrize("max_kl_error", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (2.0, 0.5, 1.0), (4.0,)])
def test_rounding_keeps_the_bound_against_float64(temperatures, max_kl_error):
    exact, labels, probs = random_targets(temperatures)
    stored, levels = round_targets(exact, labels, max_kl_error)
    assert (np.sort(stored.ids) == np.sort(exact.ids)).all()
    assert (stored.logits[:, 0] == 0).all()
    assert (np.diff(stored.logits) <= 0).all()
    order = np.argsort(stored.ids, axis=1)[np.arange(len(exact))[:, None], np.argsort(np.argsort(exact.ids, 1), 1)]
    for temperature, p in zip(temperatures, probs):
        q = np.take_along_axis(stored.probs(temperature).astype(np.float64), order, axis=1)
        tails = 1 - p.sum(axis=1), stored.tail_mass(temperature).astype(np.float64)
        assert np.abs(p - q).max() <= 1e-3
        assert np.abs(tails[0] - tails[1]).max() <= 1e-3
        both = [np.maximum(np.column_stack(pair), 1e-30) for pair in ((p, tails[0]), (q, tails[1]))]
        kl = (both[0] * np.log(both[0] / both[1])).sum(axis=1)
        off = total_errors(q, tails[1])
        assert kl.mean() <= max_kl_error * 1.01 + off.mean()
        assert_within(q.sum(axis=1) + tails[1], 1, off)
    assert levels.max() <= FINEST_LEVEL


def test_a_looser_bound_has_fewer_different_logits():
    exact, labels, _ = random_targets((1.0, 2.0))
    counts = [len(np.unique(round_targets(exact, labels, bound)[0].logits)) for bound in (1e-3, 1e-5, 1e-6)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("max_kl_error", [1e-4, 1e-5])
def test_sequences_that_are_rounded_together_come_out_as_alone(max_kl_error, monkeypatch):
    """Also those that the estimate of the levels leaves above the bound, and those beside them."""
    exact, labels, _ = random_targets((1.0, 2.0))
    finer = []
    monkeypatch.setattr("pipeline.formats.codec._finer", lambda *given: finer.append(given) or made_finer(*given))
    estimate = Grid.estimated_levels
    monkeypatch.setattr(Grid, "estimated_levels", lambda *given: np.maximum(estimate(*given) - 4, 0))  # too coarse
    rows = [slice(0, 1), slice(1, 40), slice(40, 41), slice(41, len(exact))]
    together, levels = round_targets(exact, labels, max_kl_error, rows)
    assert 0 < len(finer) <= len(rows)
    for own in rows:
        alone, own_levels = round_targets(exact[own], labels[own], max_kl_error)
        np.testing.assert_array_equal(levels[own], own_levels)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(together[own], name), getattr(alone, name))


def test_lossless_changes_nothing():
    exact, labels, _ = random_targets((1.0, 2.0))
    stored, _ = round_targets(exact, labels, 0.0)
    assert stored is exact


def test_measured_error_is_that_of_float64():
    exact, labels, probs = random_targets((1.0,))
    stored, _ = round_targets(exact, labels, 1e-4)
    aligned = dataclasses.replace(stored, ids=exact.ids)  # by rank: inside a run of equals any order is right
    kl, largest = reconstruction_errors(exact, aligned)
    p, q = probs[0], aligned.probs(1.0).astype(np.float64)
    tails = 1 - p.sum(axis=1), aligned.tail_mass(1.0).astype(np.float64)
    true = (p * np.log(np.maximum(p, 1e-300) / q)).sum(axis=1) + tails[0] * np.log(
        np.maximum(tails[0], 1e-300) / tails[1]
    )
    assert kl.mean() == pytest.approx(true.mean(), rel=0.02)
    assert largest.max() == pytest.approx(max(np.abs(p - q).max(), np.abs(tails[0] - tails[1]).max()), rel=0.02)


def test_every_level_of_the_grid_gives_its_places_back():
    for temperatures in ((1.0, 2.0), (0.5,), (4.0,)):
        grid = grid_of(temperatures)
        for level, (start, size) in enumerate(zip(grid.starts, grid.sizes)):
            values = grid.values[start : start + size]
            assert (np.diff(values) < 0).all()
            places = grid.exact_places(values[None], np.array([level]))
            np.testing.assert_array_equal(places[0], np.arange(size))


def test_tails_are_rounded_but_never_away():
    places = np.arange(len(tail_values()))
    np.testing.assert_array_equal(tail_places(tail_values()), places)
    assert tail_places(np.array([-np.inf, -80.0, -1e-6, 0.0], np.float32)).tolist() == [0, 1, 2047, 2047]


def ids_of_topics(num_rows: int, num_topics: int = 12, top_k: int = 20, seed: int = 0) -> np.ndarray:
    """int32 [N, K]: distinct ids of rows that have them, but for a few, from 100 of their topic's."""
    random = np.random.default_rng(seed)
    likely = np.argsort(random.random((num_topics, 5000)), axis=1)[:, :100]
    topics = random.integers(0, num_topics, num_rows)
    scores = random.random((num_rows, 5000))
    np.put_along_axis(scores, likely[topics], np.take_along_axis(scores, likely[topics], axis=1) - 0.99, axis=1)
    return np.argsort(scores, axis=1)[:, :top_k].astype(np.int32) * 7


@pytest.mark.parametrize(("num_rows", "top_k"), [(0, 4), (1, 20), (5, 1), (500, 1), (2500, 20)])
def test_topics_give_ids_back(num_rows, top_k):
    ids = ids_of_topics(num_rows, top_k=top_k)
    model, topics = learn(ids)
    stored = model_of(model_arrays(model))
    for name in ("vocabulary", "sizes", "entries"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(model, name))
    np.testing.assert_array_equal(stored.decode(model.encode(ids, topics), topics), ids)


def test_rows_of_different_lengths_learn_from_their_entries_alone():
    ids, random = ids_of_topics(2500), np.random.default_rng(1)
    counts = random.integers(1, 21, len(ids))
    is_entry = np.arange(20) < counts[:, None]
    model, topics = learn(np.where(is_entry, ids, ids[:, :1]), is_entry_NK=is_entry)
    np.testing.assert_array_equal(np.sort(model.vocabulary), np.unique(ids[is_entry]))
    codes = model.encode(np.where(is_entry, ids, ids[:, :1]), topics)[is_entry]
    np.testing.assert_array_equal(model.decode_ragged(codes, counts, topics), ids[is_entry])
    whole, whole_topics = learn(ids, is_entry_NK=np.ones(ids.shape, bool))
    alike, alike_topics = learn(ids)
    np.testing.assert_array_equal(whole.entries, alike.entries)
    np.testing.assert_array_equal(whole_topics, alike_topics)


def test_topics_are_found_where_there_are_some():
    """Of ids by topic nearly all have small codes; without topics the best is their place among all."""
    ids = ids_of_topics(2500)
    model, topics = learn(ids)
    codes = model.encode(ids, topics)
    assert len(model.sizes) > 8
    assert np.median(codes) < 60
    assert np.median(np.argsort(model.vocabulary)[np.searchsorted(np.sort(model.vocabulary), ids)]) > 400
    assert (np.bincount(topics)[:-1] >= np.bincount(topics)[1:]).all()


def test_tables_list_what_a_topic_has_more_than_once_most_frequent_first():
    ids = ids_of_topics(2500)
    model, topics = learn(ids)
    ends = np.cumsum(model.sizes)
    for topic in range(len(model.sizes)):
        counts = np.bincount(ids[topics == topic].ravel(), minlength=ids.max() + 1)
        table = model.vocabulary[model.entries[ends[topic] - model.sizes[topic] : ends[topic]]]
        assert sorted(table) == np.flatnonzero(counts > 1).tolist()
        assert len(table) <= TABLE_SIZE
        strata = np.split(table, FIRST_STRATUM * 2 ** np.arange(8))
        for one, other in itertools.pairwise(strata):
            assert len(other) == 0 or counts[one].min() >= counts[other].max()


def test_several_threads_learn_the_same_topics():
    ids = ids_of_topics(9000)
    alone, alone_topics = learn(ids)
    with Threads(3) as threads:
        together, topics = learn(ids, threads)
    np.testing.assert_array_equal(topics, alone_topics)
    np.testing.assert_array_equal(together.entries, alone.entries)


@pytest.mark.parametrize(
    "changes",
    [
        {"table_sizes": [3]},
        {"table_sizes": [2**31, 4]},
        {"table_entries": [0, 5, 0, 0]},
        {"table_entries": [2**32 - 1, 1, 0, 0]},
        {"vocabulary": [5, 2**24, 1]},
        {"vocabulary": [2**32 - 1] * 3},
    ],
)
def test_tables_that_contradict_each_other_are_refused(changes):
    sound = {"vocabulary": [5, 2, 1], "table_sizes": [4], "table_entries": [0, 1, 0, 1]}
    assert model_of({name: np.array(values, np.uint32) for name, values in sound.items()}).entries.tolist() == [
        0,
        1,
        1,
        2,
    ]
    with pytest.raises((ValueError, IndexError)):
        model_of({name: np.array(values, np.uint32) for name, values in (sound | changes).items()})


@pytest.mark.parametrize("highest", [50, 120_000, 2**31 - 1])
def test_differences_inside_runs_give_codes_back(highest):
    """Also where their sum over all rows does not fit 32 bits."""
    random = np.random.default_rng(0)
    codes = random.integers(0, highest, (300, 40), endpoint=True).astype(np.int32)
    inside = random.random(codes.shape) < random.random((300, 1))
    inside[:, 0], inside[0], inside[1, 1:] = False, False, True
    codes = np.where(inside, np.maximum.accumulate(codes, axis=1), codes)
    differences = code_differences(codes, inside)
    assert (differences[:, 1:][~inside[:, 1:]] == codes[:, 1:][~inside[:, 1:]]).all()
    np.testing.assert_array_equal(sum_differences(differences.view(np.uint32), inside), codes)
    assert sum_differences(differences[:0], inside[:0]).shape == (0, 40)


def test_ids_are_sorted_inside_runs_alone():
    random = np.random.default_rng(0)
    for highest_id, highest_place in ((2**17, 2000), (2**17, 2**17), (2**31 - 1, 3)):
        ids = random.integers(0, highest_id, (200, 30), endpoint=True).astype(np.int32)
        places = np.cumsum(random.integers(0, 2, ids.shape) * random.integers(1, highest_place // 20 + 2), axis=1)
        expected = np.take_along_axis(ids, np.lexsort((ids, places)), axis=1)
        np.testing.assert_array_equal(rising_in_runs(ids, places.astype(np.int32)), expected)


def test_records_state_the_measured_error(tmp_path, corpus):
    folder = make_cache(tmp_path / "cache", corpus, max_kl_error=1e-4)
    statistics = read_commit(folder, 0).statistics
    assert 0 < max(statistics["mean_kl_error"]) <= 1e-4
    assert 0 < max(statistics["max_probability_error"]) <= 1e-3


def test_shard_that_breaks_its_bound_is_never_committed(tmp_path, corpus, monkeypatch):
    """The writer measures what it has stored; a codec that fails its promise stops the capture."""
    rows = Corpus(corpus)
    manifest = fake_manifest(rows, max_kl_error=1e-4)
    cache = CacheFolder.begin(tmp_path / "cache", manifest, corpus / TOKENIZER)
    monkeypatch.setattr(
        "pipeline.formats.layout.round_targets",
        lambda targets, labels, bound, rows: round_targets(targets, labels, 1e-1),
    )
    monkeypatch.setattr("pipeline.formats.codec.MAX_PROBABILITY_ERROR", 1.0)
    monkeypatch.setattr("pipeline.formats.grid.MAX_PROBABILITY_ERROR", 1.0)
    with pytest.raises(RuntimeError, match="rounding cost"):
        capture(FakeEngine(manifest), rows, cache, range(manifest.num_partitions))
    assert cache.done() == set()


def stored_and_read(path, container, targets, labels, max_kl_error):
    """The targets of one sequence as a shard gives them back."""
    count = len(targets)
    token_ids = np.concatenate([[0], labels]).astype(np.int32)
    lengths = np.array([count + 1], np.int32)
    sequence = TokenSequence(token_ids=token_ids, loss_mask=np.arange(count + 1) > 0, document_lengths=lengths)
    spec = TargetSpec(top_k=targets.top_k, temperatures=targets.temperatures, max_kl_error=max_kl_error)
    layout = ShardLayout(counts=ShardCounts.of([sequence]), spec=spec)
    writer = CONTAINERS[container].create(path, layout)
    writer.append(encode(layout, sequence, targets))
    writer.close()
    shard = CONTAINERS[container].open(path, layout)
    try:
        return decode(shard.columns(0, 1), layout, "shard").targets
    finally:
        shard.close()


@pytest.mark.parametrize("container", CONTAINERS)
def test_zeros_of_either_sign_come_back_as_they_are_stored(tmp_path, container):
    """Of entropies, and of labels that tie with the largest logit outside the ids."""
    targets, _, _ = random_targets((1.0, 2.0), num_rows=60)
    label_logits = np.array([0.0, -0.0, -1e-6, -0.4, -1e4, -np.inf], np.float32)
    entropies = np.array([0.0, -0.0, 1e-9, -1e-9, 0.5, 11.5], np.float32)
    targets = dataclasses.replace(
        targets, label_logits=np.tile(label_logits, 10), entropies=np.tile(entropies[:, None], (10, 2))
    )
    stored = stored_and_read(tmp_path / "shard", container, targets, np.full(60, VOCAB_SIZE), 1e-4)
    np.testing.assert_allclose(stored.label_logits, np.maximum(targets.label_logits, -64), atol=1e-3)
    np.testing.assert_allclose(stored.entropies, targets.entropies, atol=1 / 128)


@pytest.mark.parametrize("max_kl_error", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("top_k", [1, 2, 8, TOP_K])
def test_tied_logits_come_back(tmp_path, top_k, max_kl_error):
    """Coarse logits, as of a head in a narrow type: ties at the top, in the tail, across the last stored entry."""
    exact, _, _ = random_targets((1.0, 2.0), num_rows=80)
    logits = np.round(exact.logits * 2) / 2
    logits[::7] = 0  # more ids tie for the first place than are stored
    labels, tails = exact.ids[:, 10], np.full((80, 2), -1.0, np.float32)
    targets = dataclasses.replace(
        exact,
        ids=exact.ids[:, :top_k],
        logits=logits[:, :top_k],
        logsumexps=logsumexps_of(logits[:, :top_k], tails, exact.temperatures),
        tail_logprobs=tails,
        label_logits=logits[:, 10],
    )
    stored = stored_and_read(tmp_path / "shard", "zarr", targets, labels, max_kl_error)
    np.testing.assert_array_equal(np.sort(stored.ids), np.sort(targets.ids))
    for temperature in (1.0, 2.0):
        probs = (np.exp(each.label_logprobs(temperature)) for each in (stored, targets))
        np.testing.assert_allclose(*probs, rtol=1e-6, atol=1e-3 if max_kl_error else 0)
