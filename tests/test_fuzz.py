"""Damage of every kind to every file of a cache: read correctly, or refused with an error that names the file."""

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS
from pipeline.cache.index import INDEX
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import checksum_of
from tests.support.small import make_cache, make_corpus, random_sequences


def flip_bits(contents, random):
    for position in random.integers(0, len(contents), random.integers(1, 4)):
        contents[position] ^= 1 << int(random.integers(8))


def set_bytes(contents, random):
    """A stretch of zeros, of ones or of noise."""
    start = int(random.integers(len(contents)))
    stop = min(len(contents), start + int(2 ** random.uniform(0, 10)))
    noise = random.integers(0, 256, stop - start).astype(np.uint8).tobytes()
    contents[start:stop] = [bytes(stop - start), b"\xff" * (stop - start), noise][random.integers(3)]


def truncate(contents, random):
    del contents[int(random.integers(len(contents))) :]


def cut_out(contents, random):
    """Bytes are missing inside: everything behind them moves."""
    start = int(random.integers(len(contents)))
    del contents[start : start + int(random.integers(1, 64))]


def insert(contents, random):
    start = int(random.integers(len(contents)))
    contents[start:start] = random.integers(0, 256, random.integers(1, 64)).astype(np.uint8).tobytes()


def swap_stretches(contents, random):
    """Two equally long stretches change places: the size stays, and so does a sum of all bytes."""
    length = int(random.integers(1, 1 + len(contents) // 4))
    first, second = sorted(random.integers(0, len(contents) - length + 1, 2).tolist())
    if second - first >= length:
        one, other = contents[first : first + length], contents[second : second + length]
        contents[first : first + length], contents[second : second + length] = other, one


DAMAGES = (flip_bits, flip_bits, set_bytes, truncate, cut_out, insert, swap_stretches)


@pytest.fixture(scope="module", params=CONTAINERS)
def sound(request, tmp_path_factory):
    """A small cache of three shards, and a checksum of each of its sequences as they are read."""
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), random_sequences(12, vocab_size=300))
    folder = make_cache(tmp_path_factory.mktemp("cache") / "cache", corpus, container=request.param, tail_samples=2)
    return folder, read(folder)


def read(folder):
    """What a trainer sees of every sequence, as numbers that change with any bit of it."""
    cache = open_cache(folder)
    try:
        return [checksum_of(vars(item.targets) | columns_of(item)) for item in cache]
    finally:
        cache.close()


def columns_of(item):
    plain = {name: value for name, value in vars(item).items() if isinstance(value, np.ndarray)}
    return plain | {"key": np.frombuffer(item.key, np.uint8), "temperatures": np.array(item.targets.temperatures)}


def fuzz(sound, num_cases, seed):
    """Damage one file at a time; returns how many cases were read and how many refused."""
    folder, expected = sound
    random = np.random.default_rng(seed)
    paths = sorted((folder / SHARDS).iterdir()) * 3 + sorted((folder / COMMITS).iterdir())
    paths += [folder / INDEX, folder / "manifest.json"]
    outcomes = {"read": 0, "refused": 0}
    for case in range(num_cases):
        path = paths[case % len(paths)]
        contents = path.read_bytes()
        damaged = bytearray(contents)
        DAMAGES[random.integers(len(DAMAGES))](damaged, random)
        path.write_bytes(damaged)
        try:
            outcomes[outcome(folder, path, expected, changed=damaged != contents)] += 1
        finally:
            path.write_bytes(contents)
    assert read(folder) == expected
    return outcomes


def outcome(folder, path, expected, changed):
    """`read` or `refused`; fails if it is neither, or if `verify` does not name a file that has changed."""
    refusal = refusal_of(lambda: read(folder) == expected)
    assert not refusal or path.name in refusal, refusal
    problems: list[str] = []
    problems += [refusal_of(lambda: problems.extend(verify_cache(folder).problems) or True)]
    if changed and path.name != INDEX:
        assert any(path.name in problem for problem in problems), path
    return "refused" if refusal else "read"


def refusal_of(check):
    """The message of the CacheError that `check` raises; empty if it raises none, and it must be true then."""
    try:
        held = check()
    except CacheError as error:
        return str(error)
    assert held, "read, but not what was written"
    return ""


def test_damaged_files_are_refused_by_name(sound):
    outcomes = fuzz(sound, 70, seed=0)
    assert outcomes["refused"] > 50
    assert outcomes["read"] > 0  # the index is made again


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_files_are_refused_by_name(sound, seed):
    fuzz(sound, 260, seed)
