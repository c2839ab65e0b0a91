"""The columns of a shard as the integers that the archive holds, and back, bit for bit.

Shape suffixes: N targets, K entries, E entries of all, T temperatures; U ids, C tables and L entries of all tables.

What a column's values allow is used up here, so that the arrays below are small numbers of which pcodec
makes an entropy code: logits on a grid become differences of places, ids become codes by the shard's
tables, and inside a run of equal logits the order of the codes carries nothing, so they are stored
as rising differences; so are the entries inside a stratum of a table. What follows from other columns is not stored.

    codes         uint32 [N, K]     ids, by `pipeline.formats.topics`
    topics        uint16 [N]        the table of each target
    levels        uint16 [N]        of the grid
    steps         uint16 [N, K - 1] how many places a logit lies below the one before it
    tails         uint16 [N, T]     tail masses, in steps of the angle of `pipeline.formats.grid`
    nats          uint16 [N, T]     entropies, in steps of 1/64
    label_steps   uint16 [N]        logits below the largest of labels that are not stored, in steps of 1/1024
    vocabulary    uint32 [U]        ids, most frequent first
    table_sizes   uint32 [C]        entries of every table
    table_entries uint32 [L]        places in the vocabulary, of all tables

Where targets have different numbers of entries, `counts` int32 [N] says how many, and codes [E] and steps [E - N] are
flat: the rows one after the other, whatever their lengths. Every other column is an array of its own name.

Without a grid (lossless) so are logits, logsumexps, tail_logprobs, entropies and label_logits; `codes` are plain, and
there are no levels.

Format version 2 has the ids by `pipeline.formats.contexts`: `modes`, twice the level plus the kind of table, and
`table_tokens`, the contexts of the tables, of which the first `previous_tables` are of the kind "previous".
"""

from collections.abc import Callable, Collection, Iterator

import numpy as np

from pipeline.formats.codec import ENTROPY_STEP, LABEL_STEP, rising_in_runs, run_numbers
from pipeline.formats.contexts import ContextModel, Tables
from pipeline.formats.grid import Grid, grid_of, tail_places, tail_values
from pipeline.formats.layout import ShardLayout
from pipeline.formats.ragged import is_entry, padded, require_counts, starts_of
from pipeline.formats.topics import (
    TopicModel,
    code_differences,
    inside_strata,
    learn,
    row_blocks,
    sum_differences,
)
from pipeline.parallel import Threads

Arrays = dict[str, np.ndarray]
Model = TopicModel | ContextModel

PACKED = {
    "ids": ("codes", "topics"),
    "logits": ("steps",),
    "tail_logprobs": ("tails",),
    "entropies": ("nats",),
    "label_logits": ("label_steps",),
}
"""Columns of a shard on the grid, and the arrays of other names that they become."""
PACKED_2 = PACKED | {"ids": ("codes", "modes"), "levels": ()}
"""The same in format version 2."""
LARGEST_ID = 1 << 24
"""A model keeps an array of so many entries at most, whatever its file says."""
MODEL = ("vocabulary", "table_sizes", "table_entries")
"""Arrays that describe the ids of the whole shard."""
MODEL_2 = ("vocabulary", "table_tokens", "table_sizes", "table_entries")
"""The same in format version 2."""
FLAT = ("codes", "steps", "logits")
"""Arrays that are flat where targets have different numbers of entries."""
NO_RUN = 1
"""A step that goes on no run."""

Shape = tuple[int, ...]


def array_specs(layout: ShardLayout, version: int) -> dict[str, tuple[np.dtype, Shape | None]]:
    """Dtype and shape of every array of a shard but those of its model; of flat ones only the shard knows the shape."""
    names = PACKED_2 if version == 2 else PACKED
    num_targets, temperatures = layout.counts.num_targets, len(layout.spec.temperatures)
    packed = {
        "codes": (np.uint32, (num_targets, layout.spec.top_k)),
        "topics": (np.uint16, (num_targets,)),
        "modes": (np.uint16, (num_targets,)),
        "levels": (np.uint16, (num_targets,)),
        "steps": (np.uint16, (num_targets, layout.spec.top_k - 1)),
        "tails": (np.uint16, (num_targets, temperatures)),
        "nats": (np.uint16, (num_targets, temperatures)),
        "label_steps": (np.uint16, (num_targets,)),
    }
    specs: dict[str, tuple[np.dtype, Shape | None]] = {}
    for name, spec in layout.columns().items():
        for array in names.get(name, (name,)) if layout.on_grid or name == "ids" else (name,):
            dtype, shape = packed.get(array, spec)
            if array in FLAT and layout.spec.is_ragged:
                specs[array] = (np.dtype(dtype), None)
            elif 0 not in shape[1:]:
                specs[array] = (np.dtype(dtype), shape)
    return specs


class Packer:
    """Takes the columns of a shard's sequences; gives its arrays when all of them are there.

    Ids wait as they are, the rest in its stored form: 400 bytes a target at K = 64, and the ids once more while
    their model is learnt.
    """

    def __init__(self, layout: ShardLayout) -> None:
        self._layout = layout
        self._pending: dict[str, list[np.ndarray]] = {}

    def append(self, columns: Arrays) -> None:
        """Add the stored columns of one or more sequences."""
        arrays = dict(columns)
        if self._layout.on_grid:
            arrays |= _pack_values(columns, _labels(columns), self._layout)
            for name in ("logits", "tail_logprobs", "entropies", "label_logits"):
                del arrays[name]
        for name, values in arrays.items():
            self._pending.setdefault(name, []).append(values)

    def arrays(self, block_rows: int, threads: Threads) -> tuple[Arrays, Callable[[], Iterator[np.ndarray]]]:
        """All arrays but `codes`, and a function that gives those in blocks of rows."""
        whole = {name: np.concatenate(self._pending.pop(name)) for name in list(self._pending)}
        if not self._layout.spec.top_k:
            return whole, lambda: iter(())
        ids = whole.pop("ids")
        steps = whole.get("steps") if self._layout.on_grid else None
        entries = None
        if self._layout.spec.is_ragged:
            counts = whole["counts"]
            width = int(counts.max(initial=1))
            entries = is_entry(counts, width)
            ids = padded(ids, entries, ids[starts_of(counts)][:, None])
            steps = None if steps is None else padded(steps, entries[:, 1:], NO_RUN)
        model, topics = learn(ids, threads, entries)

        def block(rows: slice) -> np.ndarray:
            codes = model.encode(ids[rows], topics[rows])
            if steps is not None:
                inside = _inside(steps[rows])
                codes = code_differences(rising_in_runs(codes, run_numbers(inside)), inside)
            return (codes if entries is None else codes[entries[rows]]).astype(np.uint32)

        stored = {name: values for name, values in whole.items() if 0 not in values.shape[1:]}
        stored |= {"topics": topics} | _model_arrays(model)
        blocks = threads.map(block, row_blocks(len(ids), block_rows))
        if entries is None:
            return stored, lambda: blocks
        return stored | {"codes": np.concatenate(list(blocks))}, lambda: iter(())  # they do not end where bundles do


def unpack(arrays: Arrays, model: Model | None, layout: ShardLayout) -> Arrays:
    """The columns of the sequences whose arrays are given; an IndexError or ValueError if they make no sense."""
    columns = dict(arrays)
    if model is None:  # draws alone
        return columns
    codes = columns.pop("codes").view(np.int32)
    if isinstance(model, ContextModel):
        modes = columns.pop("modes")
        tables, levels = np.column_stack([modes & 1, arrays["token_ids"][_label_places(arrays) - 1]]), modes >> 1
    else:
        tables, levels = columns.pop("topics"), columns.get("levels", np.zeros(0, np.uint16))
    counts = columns["counts"] if layout.spec.is_ragged else None
    if counts is not None:
        require_counts(counts, len(codes), layout.spec.top_k)
    if not layout.on_grid:
        return columns | {"ids": _ids(model, codes, tables, counts)}
    columns["levels"] = levels.astype(np.uint8)
    steps = columns.pop("steps", np.zeros((len(codes), 0), np.uint16))
    grid = grid_of(layout.spec.temperatures)
    if counts is None:
        blocks = [
            _unpack_entries(codes[rows], levels[rows], steps[rows], tables[rows], model, grid)
            for rows in row_blocks(max(1, len(codes)))
        ]
    else:
        blocks = [
            _unpack_ragged(codes[entries], counts[rows], levels[rows], steps[later], tables[rows], model, grid)
            for rows, entries, later in _blocks_of(counts)
        ]
    for name, parts in zip(("ids", "logits"), zip(*blocks)):
        columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    columns |= _unpack_scalars(columns, _labels(arrays), counts)
    for name in ("tails", "nats", "label_steps"):
        del columns[name]
    return columns


def arrays_of(names: Collection[str], layout: ShardLayout, version: int) -> set[str] | None:
    """The arrays that some columns alone are made of; None if that takes all of them, as ids do."""
    if "ids" in names or ("label_logits" in names and layout.on_grid):
        return None
    if not layout.on_grid:
        return set(names)
    levels = "modes" if version == 2 else "levels"
    made_of = {name: PACKED[name] for name in ("tail_logprobs", "entropies")}
    made_of |= {"levels": (levels,), "logits": ("steps", levels, *(["counts"] if layout.spec.is_ragged else []))}
    return {array for name in names for array in made_of.get(name, (name,))}


def unpack_some(arrays: Arrays, names: Collection[str], layout: ShardLayout) -> Arrays:
    """Columns that `arrays_of` knows arrays of, from those; an IndexError or ValueError if they make no sense."""
    if not layout.on_grid:
        return {name: arrays[name] for name in names}
    made: dict[str, Callable[[], np.ndarray]] = {
        "tail_logprobs": lambda: tail_values().take(arrays["tails"]),
        "entropies": lambda: arrays["nats"] * np.float32(ENTROPY_STEP),
        "levels": lambda: _levels(arrays).astype(np.uint8),
        "logits": lambda: _unpack_logits(arrays, layout),
    }
    return {name: made[name]() if name in made else arrays[name] for name in names}


def _levels(arrays: Arrays) -> np.ndarray:
    return arrays["modes"] >> 1 if "modes" in arrays else arrays["levels"]


def _unpack_logits(arrays: Arrays, layout: ShardLayout) -> np.ndarray:
    """Logits alone, [N, K] or [E]."""
    levels, grid = _levels(arrays), grid_of(layout.spec.temperatures)
    steps = arrays.get("steps", np.zeros((len(levels), 0), np.uint16))
    if layout.spec.is_ragged:
        counts = arrays["counts"]
        require_counts(counts, steps.size + len(counts), layout.spec.top_k)
        parts = [
            _ragged_logits(_ragged_steps(counts[rows], steps.reshape(-1)[later])[0], counts[rows], levels[rows], grid)
            for rows, _, later in _blocks_of(counts)
        ]
        return np.concatenate(parts)
    logits = np.empty((len(levels), steps.shape[1] + 1), np.float32)
    for rows in row_blocks(max(1, len(levels))):
        places = np.zeros(logits[rows].shape, np.int32)
        places[:, 1:] = steps[rows]
        logits[rows] = grid.logits(np.cumsum(places, axis=1, dtype=np.int32), levels[rows])
    return logits


def _ids(model: Model, codes: np.ndarray, tables: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    if counts is None:
        return model.decode(codes, tables)
    assert isinstance(model, TopicModel)  # version 2 has no rows of different lengths
    return model.decode_ragged(codes, counts, tables)


def _label_places(columns: Arrays) -> np.ndarray:
    """int64 [N]: where the label of every target is among the tokens."""
    is_label, counts = columns["loss_mask"].copy(), columns["num_tokens"]
    is_label[np.cumsum(counts) - counts] = False  # nothing predicts the first token of a sequence
    return np.flatnonzero(is_label)


def _labels(columns: Arrays) -> np.ndarray:
    """int32 [N]: the tokens that follow the target positions."""
    return columns["token_ids"][_label_places(columns)]


def model_of(arrays: Arrays) -> TopicModel:
    """The model in a shard's model arrays; a ValueError or IndexError if they contradict each other."""
    vocabulary, sizes, entries = (arrays[name].astype(np.int64) for name in MODEL)
    if sizes.sum() != len(entries):
        raise ValueError(f"tables of {sizes.sum()} entries in all, of which {len(entries)} are there")
    vocabulary = _sum_strata(vocabulary, np.array([len(vocabulary)]), LARGEST_ID)
    return TopicModel(vocabulary, sizes.astype(np.int32), _sum_strata(entries, sizes, len(vocabulary)))


def model_of_2(arrays: Arrays, previous_tables: int) -> ContextModel:
    """The same of format version 2."""
    vocabulary, tokens, sizes, entries = (arrays[name].astype(np.int32) for name in MODEL_2)
    if (
        not (isinstance(previous_tables, int) and 0 <= previous_tables <= len(tokens) == len(sizes))
        or sizes.sum(dtype=np.int64) != len(entries)
        or min(part.min(initial=0) for part in (vocabulary, tokens, sizes, entries)) < 0
        or max(part.max(initial=0) for part in (vocabulary, tokens)) > LARGEST_ID
    ):
        raise ValueError("tables of the context model that do not fit each other")
    cut = int(sizes[:previous_tables].sum())
    first = Tables(tokens[:previous_tables], sizes[:previous_tables], entries[:cut])
    return ContextModel(vocabulary, (first, Tables(tokens[previous_tables:], sizes[previous_tables:], entries[cut:])))


def _model_arrays(model: TopicModel) -> Arrays:
    parts = {
        "vocabulary": _strata_differences(model.vocabulary, np.array([len(model.vocabulary)])),
        "table_sizes": model.sizes,
        "table_entries": _strata_differences(model.entries, model.sizes),
    }
    return {name: values.astype(np.uint32) for name, values in parts.items()}


def _strata_differences(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Tables that rise inside each stratum, each entry but a stratum's first less the one before it."""
    return code_differences(values[None], inside_strata(sizes)[None])[0]


def _sum_strata(differences: np.ndarray, sizes: np.ndarray, end: int) -> np.ndarray:
    """int32: the tables of `_strata_differences`; a ValueError if they have values from `end` on."""
    begins = np.flatnonzero(~inside_strata(sizes))
    if len(differences) and np.add.reduceat(differences, begins).max() >= end:
        raise ValueError(f"tables with values from {end} on")
    return sum_differences(differences, inside_strata(sizes))


def _inside(steps_NJ: np.ndarray) -> np.ndarray:
    """bool [N, K]: whether an entry goes on a run of equal logits; the first entry is a run of its own."""
    inside = np.zeros((len(steps_NJ), steps_NJ.shape[1] + 1), bool)
    inside[:, 2:] = steps_NJ[:, 1:] == 0
    return inside


def _pack_values(columns: Arrays, labels: np.ndarray, layout: ShardLayout) -> Arrays:
    grid = grid_of(layout.spec.temperatures)
    if layout.spec.is_ragged:
        rows = np.repeat(np.arange(len(labels)), columns["counts"])
        places = grid.exact_places(columns["logits"][:, None], columns["levels"][rows])[:, 0]
        steps = np.diff(places)[rows[1:] == rows[:-1]]
        stored = np.bincount(rows[columns["ids"] == labels[rows]], minlength=len(labels)) > 0
    else:
        steps = np.diff(grid.exact_places(columns["logits"], columns["levels"]), axis=1)
        stored = (columns["ids"] == labels[:, None]).any(axis=1)
    return {
        "levels": columns["levels"].astype(np.uint16),
        "steps": steps.astype(np.uint16),
        "tails": tail_places(columns["tail_logprobs"]),
        "nats": np.rint(columns["entropies"] / ENTROPY_STEP).astype(np.uint16),
        "label_steps": np.rint(columns["label_logits"] / -LABEL_STEP * ~stored).astype(np.uint16),
    }


def _unpack_entries(
    codes: np.ndarray, levels: np.ndarray, steps: np.ndarray, tables: np.ndarray, model: Model, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits [N, K] of rows that are few enough for a CPU's cache."""
    places = np.zeros(codes.shape, np.int32)
    places[:, 1:] = steps
    inside = places == 0
    inside[:, :2] = False
    ids = model.decode(sum_differences(codes, inside), tables)
    np.cumsum(places, dtype=np.int32, out=places.reshape(-1))  # through all rows; one call a row takes twice as long
    places -= places[:, :1].copy()
    return rising_in_runs(ids, places), grid.logits(places, levels)


def _unpack_ragged(
    codes: np.ndarray,
    counts: np.ndarray,
    levels: np.ndarray,
    steps: np.ndarray,
    tables: np.ndarray,
    model: Model,
    grid: Grid,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits [E] of such rows with different numbers of entries."""
    steps, begins = _ragged_steps(counts, steps)
    begins |= steps != 0
    inside = ~begins
    inside[starts_of(counts)[counts > 1] + 1] = False
    ids = _ids(model, sum_differences(codes, inside), tables, counts)
    runs = np.cumsum(begins, dtype=np.int32)
    return rising_in_runs(ids, runs), _ragged_logits(steps, counts, levels, grid)


def _ragged_steps(counts: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 [E]: the steps with a 0 for the first entry of every row; bool [E]: which entries those are."""
    begins = np.zeros(len(steps) + len(counts), bool)
    begins[starts_of(counts)] = True
    whole = np.zeros(len(begins), np.int32)
    whole[~begins] = steps
    return whole, begins


def _ragged_logits(steps: np.ndarray, counts: np.ndarray, levels: np.ndarray, grid: Grid) -> np.ndarray:
    """float32 [E]; the steps of all entries, whose array is used up."""
    places = np.cumsum(steps, dtype=np.int32, out=steps)
    places += np.repeat(grid.starts_of(levels) - places[starts_of(counts)], counts)
    return grid.values.take(places)


def _blocks_of(counts: np.ndarray) -> Iterator[tuple[slice, slice, slice]]:
    """Rows that are few enough for a CPU's cache; their entries; and those that are not the first of their row."""
    bounds = np.append(starts_of(counts), counts.sum(dtype=np.int64))
    for rows in row_blocks(max(1, len(counts))):
        start, stop, _ = rows.indices(len(counts))
        first, last = int(bounds[start]), int(bounds[stop])
        yield rows, slice(first, last), slice(first - start, last - stop)


def _unpack_scalars(columns: Arrays, labels: np.ndarray, counts: np.ndarray | None) -> Arrays:
    ids, logits = columns["ids"], columns["logits"]
    label_logits = columns["label_steps"] * np.float32(-LABEL_STEP)
    if counts is None:
        stored = np.flatnonzero(ids == labels[:, None])
        rows = stored // ids.shape[1]
    else:
        stored = np.flatnonzero(ids == np.repeat(labels, counts))
        rows = np.searchsorted(starts_of(counts), stored, side="right") - 1
    label_logits[rows] = logits.take(stored)
    return {
        "tail_logprobs": tail_values().take(columns["tails"]),
        "entropies": columns["nats"] * np.float32(ENTROPY_STEP),
        "label_logits": label_logits,
    }
