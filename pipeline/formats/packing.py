"""The columns of a shard as the integers that the archive holds, and back, bit for bit.

Shape suffixes: N targets, K entries, T temperatures; U ids, C tables and E table entries of the shard's model.

What a column's values allow is used up here, so that the arrays below are small numbers of which pcodec
makes an entropy code: logits on a grid become differences of places, ids become codes in the shard's
context model, and inside a run of equal logits the order of the codes carries nothing, so they are stored
as rising differences. What follows from other columns is not stored.

    codes         uint32 [N, K]     ids, by `pipeline.formats.contexts`
    modes         uint16 [N]        2 * level of the grid + kind of table
    steps         uint16 [N, K - 1] how many places a logit lies below the one before it
    tails         uint16 [N, T]     tail masses, in steps of the angle of `pipeline.formats.grid`
    nats          uint16 [N, T]     entropies, in steps of 1/64
    label_steps   uint16 [N]        logits below the largest of labels that are not stored, in steps of 1/1024
    vocabulary    uint32 [U]        \\
    table_tokens  uint32 [C]         | the context model: ids; contexts, sizes and entries of the tables,
    table_sizes   uint32 [C]         | of which the first `previous_tables` are of the kind "previous"
    table_entries uint32 [E]        /

Every other column is an array of its own name. Without a grid (lossless) so are logits, logsumexps,
tail_logprobs, entropies and label_logits; `codes` are plain and `modes` have no level.
"""

from collections.abc import Callable, Collection, Iterator

import numpy as np

from pipeline.formats.codec import ENTROPY_STEP, LABEL_STEP, rising_in_runs, run_numbers
from pipeline.formats.contexts import (
    ContextModel,
    Tables,
    code_differences,
    learn,
    row_blocks,
    sum_differences,
)
from pipeline.formats.grid import Grid, grid_of, tail_places, tail_values
from pipeline.formats.layout import ShardLayout
from pipeline.parallel import Threads

Arrays = dict[str, np.ndarray]

PACKED = {
    "ids": ("codes", "modes"),
    "logits": ("steps",),
    "levels": (),
    "tail_logprobs": ("tails",),
    "entropies": ("nats",),
    "label_logits": ("label_steps",),
}
"""Columns of a shard on the grid, and the arrays that they become."""
LARGEST_ID = 1 << 24
"""A model keeps an array of so many entries at most, whatever its file says."""
MODEL = ("vocabulary", "table_tokens", "table_sizes", "table_entries")
"""Arrays that describe the ids of the whole shard."""


def array_specs(layout: ShardLayout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of every array of a shard but those of its model."""
    num_targets, temperatures = layout.counts.num_targets, len(layout.spec.temperatures)
    packed = {
        "codes": (np.uint32, (num_targets, layout.spec.top_k)),
        "modes": (np.uint16, (num_targets,)),
        "steps": (np.uint16, (num_targets, layout.spec.top_k - 1)),
        "tails": (np.uint16, (num_targets, temperatures)),
        "nats": (np.uint16, (num_targets, temperatures)),
        "label_steps": (np.uint16, (num_targets,)),
    }
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, spec in layout.columns().items():
        for array in PACKED.get(name, (name,)) if layout.on_grid or name == "ids" else (name,):
            dtype, shape = packed.get(array, spec)
            if 0 not in shape[1:]:
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
        previous, labels = neighbours(columns)
        arrays = dict(columns)
        if self._layout.spec.top_k:
            arrays["previous"] = previous
        if self._layout.on_grid:
            arrays |= _pack_values(columns, labels, self._layout)
            for name in ("logits", "tail_logprobs", "entropies", "label_logits"):
                del arrays[name]
        for name, values in arrays.items():
            self._pending.setdefault(name, []).append(values)

    def arrays(self, block_rows: int, threads: Threads) -> tuple[Arrays, Callable[[], Iterator[Arrays]]]:
        """All arrays but `codes` and `modes`, and a function that gives those in blocks of rows."""
        whole = {name: np.concatenate(self._pending.pop(name)) for name in list(self._pending)}
        if not self._layout.spec.top_k:
            return whole, lambda: iter(())
        ids, previous = whole.pop("ids"), whole.pop("previous")
        levels = whole.pop("levels", np.zeros(len(ids), np.uint8))
        steps = whole.get("steps") if self._layout.on_grid else None
        model = learn(ids, previous, threads)

        def block(rows: slice) -> Arrays:
            codes, kinds = model.encode(ids[rows], previous[rows])
            if steps is not None:
                inside = _inside(steps[rows])
                codes = code_differences(rising_in_runs(codes, run_numbers(inside)), inside)
            return {"codes": codes, "modes": 2 * levels[rows].astype(np.uint16) + kinds}

        stored = {name: values for name, values in whole.items() if 0 not in values.shape[1:]}
        return stored | _model_arrays(model), lambda: threads.map(block, row_blocks(len(ids), block_rows))


def unpack(arrays: Arrays, model: ContextModel | None, layout: ShardLayout) -> Arrays:
    """The columns of the sequences whose arrays are given; an IndexError or ValueError if they make no sense."""
    columns = dict(arrays)
    if model is None:  # draws alone
        return columns
    previous, labels = neighbours(arrays)
    codes, modes = columns.pop("codes"), columns.pop("modes")
    if not layout.on_grid:
        columns["ids"] = model.decode(codes.view(np.int32), modes & 1, previous)
        return columns
    columns["levels"] = (modes >> 1).astype(np.uint8)
    steps = columns.pop("steps", np.zeros((len(codes), 0), np.uint16))
    grid, codes = grid_of(layout.spec.temperatures), codes.view(np.int32)
    blocks = [
        _unpack_entries(codes[rows], modes[rows], steps[rows], previous[rows], model, grid)
        for rows in row_blocks(max(1, len(codes)))
    ]
    for name, parts in zip(("ids", "logits"), zip(*blocks)):
        columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    columns |= _unpack_scalars(columns, labels)
    for name in ("tails", "nats", "label_steps"):
        del columns[name]
    return columns


def arrays_of(names: Collection[str], layout: ShardLayout) -> set[str] | None:
    """The arrays that some columns alone are made of; None if that takes all of them, as ids do."""
    if "ids" in names or ("label_logits" in names and layout.on_grid):
        return None
    return {array for name in names for array in (_WITHOUT_IDS.get(name, (name,)) if layout.on_grid else (name,))}


_WITHOUT_IDS = {"logits": ("steps", "modes"), "levels": ("modes",)} | {
    name: PACKED[name] for name in ("tail_logprobs", "entropies")
}
"""Columns on the grid that are read without the ids, and the arrays that they are made of."""


def unpack_some(arrays: Arrays, names: Collection[str], layout: ShardLayout) -> Arrays:
    """Columns that `arrays_of` knows arrays of, from those."""
    if not layout.on_grid:
        return {name: arrays[name] for name in names}
    made: dict[str, Callable[[], np.ndarray]] = {
        "tail_logprobs": lambda: tail_values().take(arrays["tails"]),
        "entropies": lambda: arrays["nats"] * np.float32(ENTROPY_STEP),
        "levels": lambda: (arrays["modes"] >> 1).astype(np.uint8),
        "logits": lambda: _unpack_logits(arrays, grid_of(layout.spec.temperatures)),
    }
    return {name: made[name]() if name in made else arrays[name] for name in names}


def _unpack_logits(arrays: Arrays, grid: Grid) -> np.ndarray:
    modes = arrays["modes"]
    steps = arrays.get("steps", np.zeros((len(modes), 0), np.uint16))
    logits = np.empty((len(modes), steps.shape[1] + 1), np.float32)
    for rows in row_blocks(max(1, len(modes))):
        places = np.zeros(logits[rows].shape, np.int32)
        places[:, 1:] = steps[rows]
        logits[rows] = grid.logits(np.cumsum(places, axis=1, dtype=np.int32), modes[rows] >> 1)
    return logits


def neighbours(columns: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N], twice: the tokens at all target positions, and the tokens after them, which are the labels."""
    token_ids, is_label = columns["token_ids"], columns["loss_mask"].copy()
    counts = columns["num_tokens"]
    is_label[np.cumsum(counts) - counts] = False  # nothing predicts the first token of a sequence
    places = np.flatnonzero(is_label)
    return token_ids[places - 1], token_ids[places]


def model_of(arrays: Arrays, previous_tables: int) -> ContextModel:
    """The context model in a shard's model arrays; a ValueError if they contradict each other."""
    vocabulary, tokens, sizes, entries = (arrays[name].astype(np.int32) for name in MODEL)
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


def _model_arrays(model: ContextModel) -> Arrays:
    parts = {
        "table_tokens": [tables.tokens for tables in model.tables],
        "table_sizes": [tables.sizes for tables in model.tables],
        "table_entries": [tables.entries for tables in model.tables],
    }
    arrays = {name: np.concatenate(values).astype(np.uint32) for name, values in parts.items()}
    return arrays | {
        "vocabulary": model.vocabulary.astype(np.uint32),
        "previous_tables": np.array(len(model.tables[0].tokens)),
    }


def _inside(steps_NJ: np.ndarray) -> np.ndarray:
    """bool [N, K]: whether an entry goes on a run of equal logits; the first entry is a run of its own."""
    inside = np.zeros((len(steps_NJ), steps_NJ.shape[1] + 1), bool)
    inside[:, 2:] = steps_NJ[:, 1:] == 0
    return inside


def _pack_values(columns: Arrays, labels: np.ndarray, layout: ShardLayout) -> Arrays:
    grid = grid_of(layout.spec.temperatures)
    places = grid.exact_places(columns["logits"], columns["levels"])
    stored = (columns["ids"] == labels[:, None]).any(axis=1)
    return {
        "steps": np.diff(places, axis=1).astype(np.uint16),
        "tails": tail_places(columns["tail_logprobs"]),
        "nats": np.rint(columns["entropies"] / ENTROPY_STEP).astype(np.uint16),
        "label_steps": np.rint(columns["label_logits"] / -LABEL_STEP * ~stored).astype(np.uint16),
    }


def _unpack_entries(
    codes: np.ndarray, modes: np.ndarray, steps: np.ndarray, previous: np.ndarray, model: ContextModel, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logits [N, K] of rows that are few enough for a CPU's cache."""
    places = np.zeros(codes.shape, np.int32)
    places[:, 1:] = steps
    inside = places == 0
    inside[:, :2] = False
    ids = model.decode(sum_differences(codes, inside), modes & 1, previous)
    np.cumsum(places, dtype=np.int32, out=places.reshape(-1))  # through all rows; one call a row takes twice as long
    places -= places[:, :1].copy()
    return rising_in_runs(ids, places), grid.logits(places, modes >> 1)


def _unpack_scalars(columns: Arrays, labels: np.ndarray) -> Arrays:
    ids, logits = columns["ids"], columns["logits"]
    label_logits = columns["label_steps"] * np.float32(-LABEL_STEP)
    stored = np.flatnonzero(ids == labels[:, None])
    label_logits[stored // ids.shape[1]] = logits.take(stored)
    return {
        "tail_logprobs": tail_values().take(columns["tails"]),
        "entropies": columns["nats"] * np.float32(ENTROPY_STEP),
        "label_logits": label_logits,
    }
