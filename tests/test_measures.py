"""Statistics of targets against plain float64 over the whole vocabulary."""

import itertools
import math

import numpy as np
import pytest

from pipeline.cache.measures import (
    MASSES,
    Calibration,
    Coverage,
    Histogram,
    Largest,
    documents_of,
    group_means,
    measured,
    places_of,
)
from pipeline.corpus import TokenSequence
from pipeline.formats.layout import CachedSequence
from pipeline.targets import SparseTargets, unsketched

V, K, TEMPERATURES = 60, 12, (1.0, 2.0)
ULP = 2.0**-23
NONE = np.zeros(0, np.int64)


def teacher(num_positions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """float64 logits [N, V] and labels [N], peaked here and flat there."""
    random = np.random.default_rng(seed)
    sharpness = random.uniform(0.1, 4.0, (num_positions, 1))
    return random.normal(size=(num_positions, V)) * sharpness, random.integers(0, V, num_positions)


def stored(logits: np.ndarray, labels: np.ndarray, top_k: int = K) -> SparseTargets:
    """What an engine would hand over, in float32."""
    below = logits - logits.max(axis=1, keepdims=True)
    ids = np.argsort(-below, axis=1, kind="stable")[:, :top_k]
    probs = [softened(logits, T) for T in TEMPERATURES]
    tails = [np.delete(prob, chosen).sum() for prob_NV in probs for prob, chosen in zip(prob_NV, ids)]
    columns = {
        "logits": np.take_along_axis(below, ids, axis=1),
        "logsumexps": np.stack([np.log(np.exp(below / T).sum(axis=1)) for T in TEMPERATURES], axis=1),
        "tail_logprobs": np.log(np.reshape(tails, (len(TEMPERATURES), -1)).T),
        "entropies": np.stack([-(prob * np.log(prob)).sum(axis=1) for prob in probs], axis=1),
        "label_logits": below[np.arange(len(labels)), labels],
    }
    floats = {name: values.astype(np.float32) for name, values in columns.items()}
    draws = np.zeros((len(labels), 0), np.int32)
    return SparseTargets(
        temperatures=TEMPERATURES, ids=ids.astype(np.int32), draws=draws, **floats, **unsketched(len(ids))
    )


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("top_k", [K, 0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_numbers_of_positions_are_those_of_the_whole_vocabulary(temperature, top_k):
    logits, labels = teacher(500)
    found = measured(stored(logits, labels, top_k), temperature)
    probs = softened(logits, temperature)
    scale = np.abs(logits).max() * 2  # of the float32 numbers whose difference a surprise is
    for row, label in enumerate(labels):
        assert found.surprises[row] == pytest.approx(-math.log(probs[row, label]), abs=2 * ULP * scale)
        assert found.entropies[row] == pytest.approx(-sum(p * math.log(p) for p in probs[row]), rel=ULP)
        tail = sum(sorted(probs[row])[: V - top_k])
        assert found.tail_masses[row] == pytest.approx(tail, rel=ULP * (2 + abs(math.log(tail))))


def test_documents_and_places_are_those_of_a_loop():
    lengths, mask = [3, 1, 5, 2], [1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1]
    rows = TokenSequence(
        token_ids=np.arange(11, dtype=np.int32),
        loss_mask=np.array(mask, bool),
        document_lengths=np.array(lengths, np.int32),
    )
    sequence = CachedSequence(
        key=rows.key,
        token_ids=rows.token_ids,
        loss_mask=rows.loss_mask,
        document_lengths=rows.document_lengths,
        target_positions=rows.target_positions,
        targets=stored(*teacher(len(rows.target_positions))),
    )
    where = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    expected = [where[token] for token in range(1, 11) if mask[token]]
    assert list(zip(documents_of(sequence).tolist(), places_of(sequence).tolist())) == expected


def test_means_of_groups_are_exact_sums_in_float64():
    random = np.random.default_rng(1)
    values = random.random(10_000).astype(np.float32) + np.float32(1e6)
    groups = random.integers(0, 7, 10_000)
    groups[groups == 3] = 4
    counts, means = group_means(values, groups, 9)
    for group in range(9):
        members = [float(value) for value, which in zip(values, groups) if which == group]
        assert counts[group] == len(members)
        if members:
            assert means[group] == pytest.approx(math.fsum(members) / len(members), rel=1e-13)
        else:
            assert math.isnan(means[group])


def test_histogram_counts_every_value_once_also_outside_its_edges():
    values = np.array([-1.0, 0.0, 0.25, 0.5, 0.5, 0.99, 1.0, 7.0], np.float32)
    histogram = Histogram(np.linspace(0, 1, 5))
    histogram.add(values[:3])
    histogram.add(values[3:])
    assert histogram.counts.tolist() == [2, 1, 2, 3]
    assert histogram.mean == pytest.approx(values.mean(dtype=np.float64))
    assert math.isnan(Histogram(np.linspace(0, 1, 5)).mean)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_coverage_is_that_of_sorted_probabilities(temperature):
    logits, labels = teacher(400)
    targets, coverage = stored(logits, labels), Coverage(K)
    for start in range(0, 400, 130):
        coverage.add(targets[start : start + 130].probs(temperature))
    held = np.cumsum(-np.sort(-softened(logits, temperature), axis=1)[:, :K], axis=1)
    np.testing.assert_allclose(coverage.curve, held.mean(axis=0), rtol=ULP * np.abs(logits).max() * 2)
    rows = [list(itertools.accumulate(map(float, row))) for row in targets.probs(temperature)]
    for mass, counts in zip(MASSES, coverage.needed.tolist()):
        needs = sorted(sum(value < mass for value in row) + 1 for row in rows)
        assert counts == [needs.count(entries) for entries in range(1, K + 2)]
        for share in (0.5, 0.95):
            wanted = needs[math.ceil(share * 400) - 1]
            assert coverage.quantile(mass, share) == (wanted if wanted <= K else None)


def test_calibration_is_that_of_a_loop():
    logits, labels = teacher(3000)
    probs = softened(logits, 1.0)
    first = probs.argmax(axis=1)
    calibration = Calibration(10)
    targets = stored(logits, labels)
    for start in range(0, 3000, 700):
        part = targets[start : start + 700]
        calibration.add(part.probs(1.0)[:, 0], part.ids[:, 0] == labels[start : start + 700])
    error = 0.0
    for number in range(10):
        inside = [row for row in range(3000) if int(probs[row, first[row]] * 10) == number]
        assert calibration.counts[number] == len(inside)
        if inside:
            confidence = sum(probs[row, first[row]] for row in inside) / len(inside)
            accuracy = sum(first[row] == labels[row] for row in inside) / len(inside)
            assert calibration.confidence[number] == pytest.approx(confidence, rel=1e-5)
            assert calibration.accuracy[number] == pytest.approx(accuracy, rel=1e-12)
            error += abs(confidence - accuracy) * len(inside) / 3000
    assert calibration.error == pytest.approx(error, abs=1e-5)


def test_certain_teacher_is_in_the_last_bin():
    calibration = Calibration(10)
    calibration.add(np.array([1.0], np.float32), np.array([True]))
    assert calibration.counts.tolist() == [0] * 9 + [1]
    assert calibration.error == 0


def test_largest_are_those_of_a_stable_sort_of_everything():
    random = np.random.default_rng(2)
    largest, everything = Largest(25), []
    for sequence in range(40):
        values = random.integers(0, 60, random.integers(0, 50)).astype(np.float32)  # with many equal ones
        largest.add(values, sequence, np.arange(len(values)))
        everything += [(float(value), sequence, place) for place, value in enumerate(values)]
    expected = sorted(everything, key=lambda item: -item[0])[:25]
    found = [(value, *place) for value, place in zip(largest.values.tolist(), largest.places.tolist())]
    assert found == [(value, sequence, place) for value, sequence, place in expected]
    nothing = Largest(3)
    nothing.add(NONE.astype(np.float32), 0, NONE)
    assert len(nothing.values) == 0
