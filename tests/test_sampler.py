"""The order of the data: a bijection, the same for every way to share it out, and O(1) to resume."""

import itertools
import threading

import numpy as np
import pytest

from pipeline import open_cache
from stages.train_student.dataset import CacheDataset, Collate
from stages.train_student.loader import BatchLoader
from stages.train_student.loss_settings import LossSettings
from stages.train_student.sampler import Permutation, StepShape, StreamSampler
from tests.support.small import make_cache


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 255, 256, 257, 4097])
def test_permutation_is_a_bijection(size):
    for key in ((0, 0), (0, 1), (7, 0)):
        permutation = Permutation(size, key)
        assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_permutation_looks_random():
    """All orders of 4 about equally often; neighbours of a large one far apart and without a trend."""
    orders = [tuple(Permutation(4, (seed, epoch))[i] for i in range(4)) for seed in range(60) for epoch in range(40)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts > 60) & (counts < 140)).all()  # 100 expected, sigma 10
    size = 10**6
    values = np.array([Permutation(size, (1, 2))[i] for i in range(0, size, 100)])
    assert abs(np.corrcoef(np.arange(len(values)), values)[0, 1]) < 0.05
    assert np.abs(np.diff(values)).mean() / size == pytest.approx(1 / 3, abs=0.02)


def test_permutation_of_30_million_is_as_cheap_at_the_end():
    permutation = Permutation(30_000_000, (0, 0))
    assert len({permutation[i] for i in range(29_999_000, 30_000_000)}) == 1000
    with pytest.raises(IndexError):
        permutation[30_000_000]


def steps_of(num_sequences, batch_size, accumulation, world_size, num_steps, first_step=0):
    """The set of sequences of every step, whatever rank and micro-batch they are in."""
    steps = [[] for _ in range(num_steps - first_step)]
    for rank in range(world_size):
        shape = StepShape(batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size)
        sampler = StreamSampler(num_sequences, 5, shape, num_steps)
        sampler.first_step = first_step
        for number, micro_batch in enumerate(sampler):
            assert len(micro_batch) == batch_size
            steps[number // accumulation] += micro_batch
    return [sorted(step) for step in steps]


def test_steps_do_not_depend_on_ranks_or_micro_batches():
    expected = steps_of(50, 12, 1, 1, 9)
    for batch_size, accumulation, world_size in ((6, 2, 1), (4, 1, 3), (2, 3, 2), (1, 4, 3)):
        assert steps_of(50, batch_size, accumulation, world_size, 9) == expected
        assert steps_of(50, batch_size, accumulation, world_size, 9, first_step=4) == expected[4:]
    seen = list(itertools.chain.from_iterable(steps_of(50, 5, 1, 2, 10)))
    assert sorted(seen) == sorted(2 * list(range(50)))  # two epochs, each sequence once in each
    first, second = (
        [
            StreamSampler(50, 5, StepShape(batch_size=1, accumulation=1), 1).sequence_at(p)
            for p in range(start, start + 50)
        ]
        for start in (0, 50)
    )
    assert first != second


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    return open_cache(make_cache(tmp_path_factory.mktemp("cache"), corpus))


def batch_loader(cache, num_workers, first_step=0):
    sampler = StreamSampler(len(cache), 3, StepShape(batch_size=3, accumulation=2), 6)
    sampler.first_step = first_step
    vocab_size = cache.manifest.vocab_size
    collate = Collate(LossSettings(vocab_size=vocab_size))
    return BatchLoader(CacheDataset(cache, vocab_size), collate, sampler, num_workers=num_workers, pin=False)


def test_workers_change_nothing_about_the_order(cache):
    keys = [[batch["keys"] for batch in batch_loader(cache, num_workers)] for num_workers in (0, 2)]
    assert keys[0] == keys[1]
    assert len(keys[0]) == len(batch_loader(cache, 0)) == 12
    assert [batch["keys"] for batch in batch_loader(cache, 0, first_step=4)] == keys[0][8:]


def test_targets_outside_the_vocabulary_are_an_error_of_the_loader(cache):
    """The loss, which would have to wait for its device, does not look."""
    with pytest.raises(
        ValueError, match=r"labels_N: holds ids from \d+ to \d+, expected 0 to 2; the targets are of another"
    ):
        Collate(LossSettings(vocab_size=3))([cache[0]])


def test_loader_s_thread_ends_with_its_iterator_and_hands_on_errors(cache, monkeypatch):
    batches = iter(batch_loader(cache, 0))
    next(batches)
    assert any(thread.name == "batches" for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name == "batches" for thread in threading.enumerate())

    def broken(self, index):
        raise OSError("the disk is gone")

    monkeypatch.setattr(CacheDataset, "__getitem__", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(batch_loader(cache, 0)))
