"""Targets at temperatures that were not captured, against float64 over the whole vocabulary."""

import dataclasses

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.approximate import approximated
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.sketch import TailSketch
from pipeline.targets import SparseTargets, restricted
from tests.support.oracle import entropy, softmax
from tests.support.sketched import rebuilt
from tests.support.small import true_logits

N, V, R, K = 9, 40, 3, 5
FAR = (0.3, 0.7, 1.5, 3.0, 4.0, 20.0)


def targets_of(logits_NV, coefficients_NR, temperatures, counts_N) -> SparseTargets:
    """What a capture would store of float64 logits, of which each row keeps so many."""
    order = np.argsort(-logits_NV, axis=1)[:, :K]
    kept = np.arange(K) < counts_N[:, None]
    largest = logits_NV.max(1, keepdims=True)
    columns = {name: np.empty((N, len(temperatures)), np.float32) for name in ("logsumexps", "tails", "entropies")}
    for index, temperature in enumerate(temperatures):
        p = softmax(logits_NV, temperature)
        outside = p.copy()
        for row, count in enumerate(counts_N):
            outside[row, order[row, :count]] = 0
        columns["logsumexps"][:, index] = np.log(np.exp((logits_NV - largest) / temperature).sum(1))
        with np.errstate(divide="ignore"):
            columns["tails"][:, index] = np.log(outside.sum(1))
        columns["entropies"][:, index] = entropy(p)
    relative = np.take_along_axis(logits_NV - largest, order, 1)
    return SparseTargets(
        temperatures=temperatures,
        ids=np.where(kept, order, order[:, :1]).astype(np.int32),
        logits=np.where(kept, relative, -np.inf).astype(np.float32),
        logsumexps=columns["logsumexps"],
        tail_logprobs=columns["tails"],
        entropies=columns["entropies"],
        label_logits=(logits_NV - largest)[:, 7].astype(np.float32),
        draws=np.zeros((N, 0), np.int32),
        coefficients=coefficients_NR.astype(np.int16),
        sketch_errors=np.zeros((N, 0), np.float32),
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (2.0, 0.5, 1.0)])
@pytest.mark.parametrize("spread", [1.0, 15.0])
def test_tail_that_follows_its_sketch_is_exact_at_any_temperature(temperatures, softcap, spread):
    """Whatever constant is between the two, with rows of different lengths and masses down to nothing."""
    random = np.random.default_rng(0)
    sketch = TailSketch(*(spread * random.normal(size=s).astype("f4") / 3 for s in (V, (V, R))), softcap)
    coefficients = random.integers(-3, 4, (N, R))
    logits = sketch.logits(coefficients).astype(np.float64) + random.normal(size=(N, 1)) * 10
    logits[:, :3] = logits.max(1, keepdims=True) + 9 * random.random((N, 3))  # what is stored need not follow
    counts = random.integers(3, K + 1, N)
    exact = targets_of(logits, coefficients, temperatures, counts)
    for temperature in FAR:
        found, p = approximated(exact, sketch, temperature), softmax(logits, temperature)
        stored = np.take_along_axis(p, exact.ids.astype(int), 1) * (exact.logits > -np.inf)
        np.testing.assert_allclose(found.probs(temperature), stored, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found.tail_mass(temperature), 1 - stored.sum(1), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found.entropy(temperature), entropy(p), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.exp(found.label_logprobs(temperature)), p[:, 7], rtol=1e-4, atol=1e-7)
        for captured in temperatures:
            np.testing.assert_array_equal(found.probs(captured), exact.probs(captured))
            assert approximated(found, sketch, captured) is found


def test_row_without_a_tail_has_none_at_any_temperature():
    random = np.random.default_rng(0)
    sketch = TailSketch(*(random.normal(size=size).astype("f4") for size in (K, (K, R))))
    coefficients = random.integers(-3, 4, (N, R))
    logits = 3 * random.normal(size=(N, K + 3))[:, :K]
    with np.errstate(divide="ignore"):
        whole = dataclasses.replace(
            targets_of(np.pad(logits, ((0, 0), (0, 3)), constant_values=-1e9), coefficients, (1.0,), np.full(N, K)),
            tail_logprobs=np.full((N, 1), -np.inf, np.float32),
        )
    for temperature in FAR:
        found, p = approximated(whole, sketch, temperature), softmax(logits, temperature)
        assert not found.tail_mass(temperature).any()
        np.testing.assert_allclose(found.probs(temperature), np.take_along_axis(p, whole.ids.astype(int), 1), rtol=1e-5)
        np.testing.assert_allclose(found.entropy(temperature), entropy(p), rtol=1e-4)


def test_chunks_of_rows_are_those_of_the_whole(monkeypatch, sketched):
    cache = open_cache(sketched["arrow"].out)
    targets = next(iter(cache)).targets
    whole = approximated(targets, cache.sketch, 1.5)
    monkeypatch.setattr("pipeline.approximate.CHUNK_BYTES", 3 * 4 * cache.manifest.vocab_size)
    np.testing.assert_allclose(approximated(targets, cache.sketch, 1.5).logsumexps, whole.logsumexps, rtol=1e-6)


def errors(sketched, teacher, corpus, temperature):
    """Means over a real cache: KL(p_T || p-hat_T), and how far the tail's mass and the entropy are off."""
    cache, found = open_cache(sketched["arrow"].out), []
    for row, sequence in zip(Corpus(corpus).rows(), cache):
        p = softmax(true_logits(teacher, row, cache.manifest.vocab_size), temperature)
        targets = approximated(sequence.targets, cache.sketch, temperature)
        q = rebuilt(cache.sketch, dataclasses.replace(sequence, targets=targets), temperature)
        assert np.abs(q.sum(1) - 1).max() < 1e-5
        mass = 1 - np.take_along_axis(p, targets.ids.astype(int), 1).sum(1)
        off = np.abs(targets.tail_mass(temperature) - mass), np.abs(targets.entropy(temperature) - entropy(p))
        found.append(np.stack([(p * np.log(p / q)).sum(1), *off]))
    return np.hstack(found).mean(1)


@pytest.mark.parametrize(("temperature", "factor"), [(0.7, 1.5), (1.5, 1.1), (3.0, 1.5), (4.0, 1.5)])
def test_real_teacher_is_about_as_near_as_at_captured_temperatures(sketched, teacher, corpus, temperature, factor):
    captured = max(errors(sketched, teacher, corpus, known)[0] for known in (1.0, 2.0))
    kl, mass, nats = errors(sketched, teacher, corpus, temperature)
    assert kl < factor * captured
    assert mass < (0.1 if temperature < 1 else 0.02)
    assert nats < 0.15


def test_smaller_vocabulary_is_cut_from_the_approximation(sketched):
    cache = open_cache(sketched["arrow"].out)
    targets = approximated(next(iter(cache)).targets, cache.sketch, 1.5)
    fewer = restricted(targets, 200)
    inside = (targets.ids < 200) & (targets.logits > -np.inf)
    left = np.where(inside, targets.probs(1.5), 0).sum(1)
    np.testing.assert_allclose(fewer.tail_mass(1.5), 1 - left, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_what_is_no_temperature_is_refused(sketched, temperature):
    cache = open_cache(sketched["arrow"].out)
    with pytest.raises(ConfigError, match="positive number"):
        approximated(next(iter(cache)).targets, cache.sketch, temperature)


def test_targets_of_another_sketch_are_refused(sketched):
    cache = open_cache(sketched["arrow"].out)
    targets = next(iter(cache)).targets
    with pytest.raises(ConfigError, match=r"4 coefficients cannot be approximated by no sketch"):
        approximated(targets, None, 1.5)
    other = TailSketch(cache.sketch.offset, cache.sketch.basis[:, :2])
    with pytest.raises(ConfigError, match=r"4 coefficients cannot be approximated by a sketch of 2"):
        approximated(targets, other, 1.5)
