"""Ids as small numbers: positions that name like ids share a table of them.

Shape suffixes: N positions, K stored entries of a position, E entries of all, U ids, C topics, D dimensions.

A shard sorts its positions into topics, and a topic lists the ids that its positions name more than once, by
falling count. An id's code is its place in the table of its position's topic, or TABLE_SIZE plus its place among
all ids of the shard. Decoding is one look-up in one array, the same for every entry: no entry waits for another.

Which topic a position gets is the writer's affair; a reader only looks it up. Here each id is a point in DIMENSIONS,
near those that come with it, a position the sum of its ids' points; topics begin as k-means of the positions, and
then each position tries the tables of the topics beside its own, and takes the one that makes its codes shortest.
All sums are of whole numbers that float32 holds exactly, so that no order of summation changes a shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.formats.ragged import starts_of
from pipeline.parallel import ALONE, Threads

TABLE_SIZE = 2048
"""Longest table."""
FIRST_STRATUM = 8
"""Places that count as equal, so that their order need not be stored: 0 to 7, then 8 to 15, 16 to 31 and so on."""
MIN_COUNT = 2
"""How often an id must come up in a topic to be in its table: each entry costs about 8 bits."""
POSITIONS_A_TOPIC, MAX_TOPICS = 192, 2048
"""More topics make codes shorter and tables longer; their sum is flat about here."""
DIMENSIONS = 32
"""Of the points."""
POINTS_SAMPLE, MEANS_SAMPLE = 8192, 32_768
"""Positions that are looked at to place the points, and the means."""
MEANS_ROUNDS = 5
NEIGHBOURS = 12
"""Topics whose tables a position tries."""
LARGEST = 255
"""Of the coordinates: products of DIMENSIONS of them add up to less than 2 ** 24."""
CACHED_ROWS = 1024
PIECE_ROWS = 8192
"""Positions that a thread takes at a time."""
TABLES_AT_ONCE = 16
"""Tables that are looked up together; one by one they are a hundred calls of numpy for a thousand targets."""


@dataclass(frozen=True)
class TopicModel:
    """What a shard knows about its ids."""

    vocabulary: np.ndarray
    """int32 [U]: every id of the shard, about by falling count."""
    sizes: np.ndarray
    """int32 [C]: entries of each topic's table."""
    entries: np.ndarray
    """int32: places in the vocabulary, of all tables, one after the other."""

    @cached_property
    def _flat(self) -> np.ndarray:
        """int32: ids by code, as if there were no tables; then those of all tables. The first are not used."""
        return np.concatenate([np.zeros(TABLE_SIZE, np.int32), self.vocabulary, self.vocabulary[self.entries]])

    @cached_property
    def _starts(self) -> np.ndarray:
        """int32 [C]: where each table begins in `_flat`."""
        return (starts_of(self.sizes) + TABLE_SIZE + len(self.vocabulary)).astype(np.int32)

    def decode(self, codes_NK: np.ndarray, topics_N: np.ndarray) -> np.ndarray:
        """int32 [N, K]: the ids; IndexError if the codes are none of this model."""
        return self._ids(codes_NK, self._starts.take(topics_N)[:, None])

    def decode_ragged(self, codes_E: np.ndarray, counts_N: np.ndarray, topics_N: np.ndarray) -> np.ndarray:
        """int32 [E]: the same of positions that have `counts_N` codes each, one after the other."""
        return self._ids(codes_E, np.repeat(self._starts.take(topics_N), counts_N))

    def _ids(self, codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return self._flat.take(codes + (codes < TABLE_SIZE) * starts)  # np.where takes ten times as long

    def encode(self, ids_NK: np.ndarray, topics_N: np.ndarray) -> np.ndarray:
        """int32 [N, K]: the codes of ids that are all in the vocabulary, with the given tables."""
        num_ids = len(self.vocabulary)
        places_NK = _inverse(self.vocabulary)[ids_NK]
        codes = np.empty(ids_NK.shape, np.int32)
        order, topics, lengths = _groups(topics_N)
        starts, ends = starts_of(self.sizes), np.cumsum(lengths)
        without = np.arange(TABLE_SIZE, TABLE_SIZE + num_ids, dtype=np.int32)
        inverse = np.tile(without, TABLES_AT_ONCE)
        for first in range(0, len(topics), TABLES_AT_ONCE):
            some = slice(first, first + TABLES_AT_ONCE)
            sizes = self.sizes[topics[some]]
            within = _counting(sizes)
            entries = self.entries[np.repeat(starts[topics[some]], sizes) + within]
            listed = np.repeat(np.arange(len(sizes)) * num_ids, sizes) + entries
            inverse[listed] = within
            own = order[ends[first] - lengths[first] : ends[some][-1]]
            begins = np.repeat(np.arange(len(sizes), dtype=np.int32) * np.int32(num_ids), lengths[some])
            codes[own] = inverse.take(places_NK[own] + begins[:, None])
            inverse[listed] = without[entries]
        return codes


def learn(
    ids_NK: np.ndarray, threads: Threads = ALONE, is_entry_NK: np.ndarray | None = None
) -> tuple[TopicModel, np.ndarray]:
    """The model of a shard's ids, where `is_entry_NK` is True if it is given; uint16 [N]: every position's topic."""
    vocabulary, places = _vocabulary(ids_NK, is_entry_NK, threads)
    num_ids, num_topics = len(vocabulary), min(MAX_TOPICS, len(ids_NK) // POSITIONS_A_TOPIC)
    topics_N = np.zeros(len(ids_NK), np.uint16)
    if num_topics > 1:
        points_ND = _positions(places, num_ids, threads)
        means_CD = _means(points_ND[_sample(len(points_ND), MEANS_SAMPLE)], num_topics)
        nearest = threads.map(lambda rows: _nearest(points_ND[rows], means_CD), row_blocks(len(places)))
        topics_N = np.concatenate(list(nearest))
        tables = _learn_tables(places, topics_N, num_ids, num_topics, threads)
        topics_N = _cheapest(places, topics_N, means_CD, tables, num_ids, threads)
    counts = np.bincount(topics_N, minlength=1)
    by_size = np.argsort(-counts, kind="stable")  # small numbers for the most frequent
    topics_N = _inverse(by_size).astype(np.uint16)[topics_N]
    tables = _learn_tables(places, topics_N, num_ids, int((counts > 0).sum()), threads)
    sizes = np.array([len(table) for table in tables], np.int32)
    return TopicModel(vocabulary, sizes, np.concatenate([np.zeros(0, np.int32), *tables])), topics_N


def row_blocks(num_rows: int, block_rows: int = CACHED_ROWS) -> Iterator[slice]:
    """All rows, in blocks: by default those that fit a CPU's cache."""
    return (slice(start, start + block_rows) for start in range(0, num_rows, block_rows))


def code_differences(codes_NK: np.ndarray, inside_NK: np.ndarray) -> np.ndarray:
    """Codes that rise inside each run, each but a run's first less the one before it."""
    differences = codes_NK.copy()
    differences[:, 1:] -= codes_NK[:, :-1] * inside_NK[:, 1:]
    return differences


def sum_differences(differences: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """int32: the codes of `code_differences`; `inside` is False where a run begins, as every row does.

    One sum goes through all rows, and what it was before an entry's run is taken off: it may overflow, for what is
    left does not.
    """
    begins = ~inside.reshape(-1)
    sums = np.cumsum(differences.reshape(-1), dtype=np.int32)
    before = sums.take(np.flatnonzero(begins) - 1)
    before[:1] = 0
    begins[:1] = False  # runs are numbered from 0
    runs = np.cumsum(begins.astype(np.int32), dtype=np.int32)
    sums -= before.take(runs, mode="wrap")  # the fastest mode; none is outside
    return sums.reshape(differences.shape)


def inside_strata(sizes_C: np.ndarray) -> np.ndarray:
    """bool [entries of all tables]: whether an entry goes on a stratum of its table."""
    within = _counting(sizes_C)
    return (within > 0) & ((within < FIRST_STRATUM) | (within & (within - 1) != 0))


def _vocabulary(ids_NK: np.ndarray, is_entry_NK: np.ndarray | None, threads: Threads) -> tuple[np.ndarray, np.ndarray]:
    """int32 [U]: all ids in strata; int32 [N, K]: the place of each there, U where there is no entry."""
    num_ids = int(ids_NK.max(initial=0)) + 1
    counts = np.zeros(num_ids, np.int64)

    def counted(rows: slice) -> np.ndarray:
        entries = ids_NK[rows].ravel() if is_entry_NK is None else ids_NK[rows][is_entry_NK[rows]]
        return np.bincount(entries, minlength=num_ids)

    for part in threads.map(counted, row_blocks(len(ids_NK), PIECE_ROWS)):
        counts += part
    vocabulary = _frequent(counts, 1, num_ids)
    places, inverse = np.empty(ids_NK.shape, np.int32), _inverse(vocabulary)
    for _ in threads.map(
        lambda rows: inverse.take(ids_NK[rows], out=places[rows], mode="clip"), row_blocks(len(ids_NK), PIECE_ROWS)
    ):
        pass
    if is_entry_NK is not None:
        places[~is_entry_NK] = len(vocabulary)
    return vocabulary, places


def _frequent(counts: np.ndarray, min_count: int, size: int) -> np.ndarray:
    """int32: the `size` most frequent of the values that come up `min_count` times or more, in strata."""
    found = np.flatnonzero(counts >= min_count)
    found = found[np.argsort(-counts[found], kind="stable")][:size].astype(np.int32)
    start, stop = 0, FIRST_STRATUM
    while start < len(found):
        found[start:stop].sort()
        start, stop = stop, 2 * stop
    return found


def _positions(places_NK: np.ndarray, num_ids: int, threads: Threads) -> np.ndarray:
    """float32 [N, D]: a point for every position, of whole numbers up to LARGEST."""
    points_UD = _points(places_NK[_sample(len(places_NK), POINTS_SAMPLE)], num_ids)
    blocks = row_blocks(len(places_NK), PIECE_ROWS)
    sums_ND = np.concatenate(list(threads.map(lambda rows: _sums(points_UD, places_NK[rows], np.int32), blocks)))
    sums_ND -= np.rint(sums_ND.mean(axis=0, dtype=np.float64)).astype(np.int32)
    points_ND = sums_ND.astype(np.float32)
    points_ND /= max(1, np.abs(sums_ND).max() / LARGEST)
    return np.rint(points_ND, out=points_ND)


def _points(places_SK: np.ndarray, num_ids: int) -> np.ndarray:
    """int8 [U + 1, D]: ids that come up together in a sample lie close to each other, frequent ones near 0.

    Every id gets random signs, a position the sum of its ids', an id the mean of its positions'. The last row is 0.
    """
    flat, (num_rows, width) = places_SK.ravel(), places_SK.shape
    counts = np.bincount(flat, minlength=num_ids + 1)
    counts[num_ids] = 0
    weights_U1 = np.log1p(num_rows / np.maximum(counts, 1))[:, None] * (counts > 0)[:, None]
    signs_UD = np.random.default_rng(0).integers(0, 2, (num_ids + 1, DIMENSIONS)) * 2.0 - 1
    rows_SD = _sums(signs_UD * weights_U1, places_SK, np.float64)
    rows_SD -= rows_SD.mean(axis=0)
    means_UD = np.stack(
        [np.bincount(flat, np.repeat(rows_SD[:, d], width), minlength=num_ids + 1) for d in range(DIMENSIONS)], axis=1
    )
    means_UD *= weights_U1 / np.maximum(counts, 1)[:, None]
    means_UD -= (means_UD * counts[:, None]).sum(axis=0) / counts.sum() * (counts > 0)[:, None]
    return np.rint(means_UD * (127 / max(np.abs(means_UD).max(), 1e-9))).astype(np.int8)


def _sums(points_UD: np.ndarray, places_NK: np.ndarray, dtype: type) -> np.ndarray:
    """[N, D]: the sum of every position's points, one entry of all positions after the other: a fifth of the time."""
    sums_ND: np.ndarray = np.zeros((len(places_NK), points_UD.shape[1]), dtype)
    for places_N in places_NK.T:
        sums_ND += points_UD.take(places_N, axis=0)
    return sums_ND


def _means(points_SD: np.ndarray, num_topics: int) -> np.ndarray:
    """float32 [C, D]: whole numbers, by Lloyd's algorithm from points of a sample; one without points stays."""
    chosen = np.random.default_rng(0).choice(len(points_SD), num_topics, replace=False)
    means_CD = points_SD[chosen]
    for _ in range(MEANS_ROUNDS):
        topics_S = np.concatenate([_nearest(points_SD[rows], means_CD) for rows in row_blocks(len(points_SD))])
        counts = np.bincount(topics_S, minlength=num_topics)
        for d in range(DIMENSIONS):
            sums = np.bincount(topics_S, points_SD[:, d], minlength=num_topics)
            means_CD[:, d] = np.where(counts, np.rint(sums / np.maximum(counts, 1)), means_CD[:, d])
    return means_CD


def _nearest(points_ND: np.ndarray, means_CD: np.ndarray) -> np.ndarray:
    """uint16 [N]: the topic whose mean is nearest to each point."""
    return _nearness(points_ND, means_CD).argmax(axis=1).astype(np.uint16)


def _nearness(points_ND: np.ndarray, means_CD: np.ndarray) -> np.ndarray:
    """float32 [N, C]: largest where the squared distance is smallest; exact."""
    return points_ND @ means_CD.T - (means_CD * means_CD).sum(axis=1) / 2


def _learn_tables(
    places_NK: np.ndarray, topics_N: np.ndarray, num_ids: int, num_topics: int, threads: Threads
) -> list[np.ndarray]:
    """int32 [size] of every topic: the places of its most frequent ids, in strata."""
    ends = np.cumsum(np.bincount(topics_N, minlength=num_topics))
    order = np.argsort(topics_N, kind="stable")

    def learnt(topics: range) -> list[np.ndarray]:
        own = (places_NK[order[ends[topic - 1] if topic else 0 : ends[topic]]].ravel() for topic in topics)
        counts = (np.bincount(places, minlength=num_ids)[:num_ids] for places in own)
        return [_frequent(count, MIN_COUNT, TABLE_SIZE) for count in counts]

    return [table for tables in threads.map(learnt, _pieces(num_topics)) for table in tables]


def _cheapest(
    places_NK: np.ndarray,
    topics_N: np.ndarray,
    means_CD: np.ndarray,
    tables: list[np.ndarray],
    num_ids: int,
    threads: Threads,
) -> np.ndarray:
    """uint16 [N]: for every position the topic that codes it best, of those beside its own."""
    near_CM = np.argsort(-_nearness(means_CD, means_CD), axis=1, kind="stable")[:, :NEIGHBOURS]
    owners = np.argsort(near_CM.ravel(), kind="stable") // near_CM.shape[1]
    trying = np.split(owners, np.cumsum(np.bincount(near_CM.ravel(), minlength=len(tables)))[:-1])
    counts = np.bincount(topics_N, minlength=len(tables))
    order, starts = np.argsort(topics_N, kind="stable"), starts_of(counts)
    without = _cost(np.arange(TABLE_SIZE, TABLE_SIZE + num_ids + 1))
    without[num_ids] = 0  # no entry
    within = _cost(np.arange(TABLE_SIZE))

    def tried(topics: range) -> list[tuple[int, np.ndarray, np.ndarray]]:
        costs, found = without.copy(), []
        for topic in topics:
            beside = trying[topic]
            rows = order[np.repeat(starts[beside], counts[beside]) + _counting(counts[beside])]
            costs[tables[topic]] = within[: len(tables[topic])]
            own = [costs.take(places_NK[rows[part]], mode="wrap").sum(axis=1) for part in row_blocks(len(rows))]
            found.append((topic, rows, np.concatenate([np.zeros(0, np.float32), *own])))
            costs[tables[topic]] = without[tables[topic]]
        return found

    best_N, chosen_N = np.full(len(topics_N), np.inf, np.float32), topics_N.copy()
    for found in threads.map(tried, _pieces(len(tables))):
        for topic, rows, costs in found:
            is_better = costs < best_N[rows]
            rows = rows[is_better]
            best_N[rows], chosen_N[rows] = costs[is_better], topic
    return chosen_N


def _cost(codes: np.ndarray) -> np.ndarray:
    """float32: about how many bits a code takes."""
    return np.log2(codes + np.float32(4), dtype=np.float32)


def _pieces(num_topics: int) -> Iterator[range]:
    """Topics, as many at a time as are worth a thread's while."""
    step = max(1, PIECE_ROWS // POSITIONS_A_TOPIC)
    return (range(start, min(start + step, num_topics)) for start in range(0, num_topics, step))


def _sample(num_rows: int, size: int) -> slice:
    """About so many of the rows, evenly spaced; twice as many at most, and all if there are no more."""
    return slice(None, None, max(1, num_rows // size))


def _counting(sizes: np.ndarray) -> np.ndarray:
    """From 0 to each of the sizes, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _groups(topics_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions, by their topics; every topic, rising; and how many positions have it."""
    order = np.argsort(topics_N, kind="stable")
    ordered = topics_N[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
    return order, ordered[starts], np.diff(starts, append=len(ordered))


def _inverse(values: np.ndarray) -> np.ndarray:
    """int32: the place of every value; 0 for those that are not there."""
    places = np.zeros(int(values.max(initial=0)) + 1, np.int32)
    places[values] = np.arange(len(values), dtype=np.int32)
    return places
