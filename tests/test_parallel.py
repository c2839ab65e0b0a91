"""Work that threads share, and whose results are wanted in order."""

import itertools
import threading

import pytest

from pipeline.parallel import Threads


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers):
    """The first of every few items takes longest."""
    gates = [threading.Event() for _ in range(40)]

    def work(number):
        if workers > 1 and number % workers != workers - 1:
            assert gates[number + 1].wait(60)  # its neighbour goes first
        gates[number].set()
        return number * number

    before = threading.active_count()
    with Threads(workers) as threads:
        assert list(threads.map(work, range(40))) == [number * number for number in range(40)]
        assert list(threads.map(str, "abc")) == ["a", "b", "c"]  # as often as one asks
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_items_are_drawn_as_results_are_taken(workers):
    drawn = []

    def items():
        for number in itertools.count():
            drawn.append(number)
            yield number

    with Threads(workers) as threads:
        results = threads.map(str, items())
        for taken in range(50):
            assert next(results) == str(taken)
            assert len(drawn) - taken <= 2 * workers


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_failure_is_raised_in_its_place_and_ends_the_rest(workers):
    done = []

    def work(number):
        if number == 7:
            raise ValueError("seven")
        done.append(number)
        return number

    with Threads(workers) as threads:
        results = threads.map(work, itertools.count())
        assert list(itertools.islice(results, 7)) == list(range(7))
        with pytest.raises(ValueError, match="seven"):
            next(results)
    assert max(done) <= 7 + 2 * workers


@pytest.mark.parametrize("workers", [1, 3])
def test_failure_of_the_items_themselves_reaches_the_caller(workers):
    def items():
        yield 1
        raise OSError("the disk is gone")

    with Threads(workers) as threads, pytest.raises(OSError, match="the disk is gone"):
        list(threads.map(str, items()))
