"""Shards as Arrow IPC files: one row a sequence, memory-mapped, readable by anything that reads Arrow.

The fast twin of the Zarr archive: nothing is compressed, nothing is decoded. Columns of targets are
lists of fixed-size lists, or of lists where targets have different numbers of entries. Rows come in
record batches of about BATCH_TARGETS targets, so that a writer's memory stays bounded.
"""

import contextlib
import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.documents import printable
from pipeline.errors import CacheCorruptError
from pipeline.formats.containers import Container
from pipeline.formats.layout import ALIGNMENT, OF_ENTRIES, ShardLayout
from pipeline.formats.ragged import require_counts
from pipeline.ipc import file_batches
from pipeline.parallel import ALONE, Threads

BATCH_TARGETS = 65_536
BATCH_ENTRIES = 1 << 27
"""Of targets with different numbers of entries, whose offsets are 32 bits wide."""
FORMAT = {"format": "sparse-target-shard"}


def arrow_schema(layout: ShardLayout) -> pa.Schema:
    """The schema of a shard; its metadata states the temperatures and the alignment."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in _OF_SEQUENCES.items()]
    for name, counted in layout.ragged().items():
        if name in NOT_STORED:
            continue
        dtype, shape = layout.columns()[name]
        value = pa.from_numpy_dtype(dtype)
        if len(shape) == 2 or counted == "num_entries":
            value = pa.list_(pa.field("item", value, nullable=False), shape[1] if len(shape) == 2 else -1)
        fields.append(pa.field(name, pa.list_(pa.field("item", value, nullable=False)), nullable=False))
    metadata = {
        "format_version": str(layout.format_version),
        "temperatures": ",".join(map(repr, layout.spec.temperatures)),
        "max_kl_error": repr(layout.spec.max_kl_error),
        "alignment": ALIGNMENT,
    }
    return pa.schema(fields, metadata=FORMAT | metadata)


_OF_SEQUENCES = {"key": pa.binary(16), "checksum": pa.uint64()}
NOT_STORED = ("counts",)
"""Columns that the lengths of lists say."""


class ArrowShardWriter:
    """Appends sequences to a new file at `path`; the file is complete only after `close`."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self._schema, self._counted = arrow_schema(layout), layout.ragged()
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._pending: list[dict[str, np.ndarray]] = []
        self._pending_targets = self._pending_entries = 0

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Add the stored columns of one sequence."""
        self._pending.append(columns)
        self._pending_targets += int(columns["num_targets"][0])
        self._pending_entries += int(columns["num_entries"][0]) if "num_entries" in columns else 0
        if self._pending_targets >= BATCH_TARGETS or self._pending_entries >= BATCH_ENTRIES:
            self._flush()

    def close(self, threads: Threads = ALONE) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()
        self._file.close()

    def discard(self) -> None:
        """Let go of the file, finished or not."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(_record_batch(self._pending, self._schema, self._counted))
            self._pending, self._pending_targets, self._pending_entries = [], 0, 0


class ArrowShard:
    """A finished Arrow shard, memory-mapped; reading a sequence copies nothing but its mask."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path, self._names = path, list(layout.columns())
        self._counted = layout.ragged()
        try:
            self._contents = pa.memory_map(str(path)).read_buffer()
            self._batches = file_batches(self._contents, arrow_schema(layout))
            for batch in self._batches:
                _require_sound(batch, layout)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, struct.error) as exc:
            if isinstance(exc, MemoryError):
                raise
            raise CacheCorruptError(
                f"{path}: not a whole Arrow file of this cache; the shard is truncated or foreign "
                f"({printable(str(exc))})."
            ) from exc
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._views: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def columns(self, start: int, stop: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """The stored columns of sequences `start` to `stop`, or those of `names` alone."""
        first, last = np.searchsorted(self._starts, (start, stop - 1), side="right") - 1
        parts = []
        for batch in range(int(first), int(last) + 1):
            begin, end = int(self._starts[batch]), int(self._starts[batch + 1])
            parts.append(self._slice(batch, max(start, begin) - begin, min(stop, end) - begin, names or self._names))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def heads(self) -> dict[str, np.ndarray]:
        """What every sequence has one of."""
        names = ["key", "token_ids", "document_lengths", "entropies"]
        names += ["ids"] if "num_entries" in self._names else []
        heads: dict[str, list[np.ndarray]] = {self._counted.get(name, name): [] for name in names}
        for batch in range(len(self._batches)):
            views = self._view(batch)
            for name in names:
                values, offsets = views[name]
                heads[self._counted.get(name, name)].append(values if name == "key" else np.diff(offsets))
        return {name: np.concatenate(parts) for name, parts in heads.items()}

    def parts(self) -> dict[str, int]:
        """Bytes of every column, its offsets among them."""
        names = self._batches[0].schema.names if self._batches else []
        return {name: sum(batch.column(name).nbytes for batch in self._batches) for name in names}

    def checked_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the file's bytes that the sequences' checksums cover."""
        buffers = [buffer for batch in self._batches for buffer in _value_buffers(batch)]
        starts = [buffer.address - self._contents.address for buffer in buffers]
        return sorted((start, start + buffer.size) for start, buffer in zip(starts, buffers))

    def close(self) -> None:
        """Forget the mapping; arrays that were handed out keep it alive."""
        self._views.clear()
        self._batches.clear()

    def _slice(self, batch: int, start: int, stop: int, names: Collection[str]) -> dict[str, np.ndarray]:
        columns = {}
        for name, (values, offsets) in self._view(batch).items():
            columns[name] = values[offsets[start] : offsets[stop]]
            if name in self._counted:
                columns[self._counted[name]] = np.diff(offsets[start : stop + 1])
        return {name: columns[name] for name in names}

    def _view(self, batch: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        if batch not in self._views:
            self._views[batch] = _views(self._batches[batch])
        return self._views[batch]


def _record_batch(rows: list[dict[str, np.ndarray]], schema: pa.Schema, counted: dict[str, str]) -> pa.RecordBatch:
    arrays = [
        pa.array([row["key"].tobytes() for row in rows], _OF_SEQUENCES["key"]),
        pa.array(np.concatenate([row["checksum"] for row in rows])),
    ]
    for name in schema.names[len(_OF_SEQUENCES) :]:
        of_entries = counted[name] == "num_entries"
        sizes = (int(row["num_targets" if of_entries else counted[name]][0]) for row in rows)
        offsets = np.cumsum([0, *sizes]).astype(np.int32)
        values = np.concatenate([row[name] for row in rows])
        list_type = schema.field(name).type
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        if of_entries:
            ends = np.cumsum(np.concatenate([[0], *(row["counts"] for row in rows)]))
            flat = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, type=list_type.value_type)
        elif values.ndim == 2:
            flat = pa.FixedSizeListArray.from_arrays(flat, type=list_type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), flat, type=list_type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _require_sound(batch: pa.RecordBatch, layout: ShardLayout) -> None:
    """Raise ValueError unless the columns of which a sequence has several rows agree on how many."""
    ends: dict[str, np.ndarray] = {}
    counted = layout.ragged() | (dict.fromkeys(OF_ENTRIES, "num_targets") if layout.spec.is_ragged else {})
    inner: list[np.ndarray] = []
    for name in batch.schema.names[len(_OF_SEQUENCES) :]:
        offsets = batch.column(name).offsets.to_numpy()
        if not np.array_equal(offsets, ends.setdefault(counted[name], offsets)):
            raise ValueError(f"column {name!r} counts other rows than its neighbours")
        rows = batch.column(name).values
        if pa.types.is_list(rows.type):
            inner.append(rows.offsets.to_numpy())
            if inner[-1][0] != 0 or not np.array_equal(inner[-1], inner[0]):
                raise ValueError(f"column {name!r} has other entries than its neighbour")
            require_counts(np.diff(inner[-1]), len(rows.values), layout.spec.top_k)
        if pa.types.is_fixed_size_list(rows.type) and len(rows.values) != len(rows) * rows.type.list_size:
            raise ValueError(f"column {name!r} has entries that belong to no row")


def _views(batch: pa.RecordBatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The flat values of every column, and where the rows of each sequence begin in them."""
    each = np.arange(batch.num_rows + 1)
    keys = np.frombuffer(batch.column("key").buffers()[1], np.uint8, 16 * batch.num_rows).reshape(-1, 16)
    views = {"key": (keys, each), "checksum": (batch.column("checksum").to_numpy(), each)}
    for name in batch.schema.names[len(_OF_SEQUENCES) :]:
        column = batch.column(name)
        values, offsets, width = column.values, column.offsets.to_numpy(), None
        if isinstance(values.type, pa.FixedSizeListType):
            values, width = values.values, values.type.list_size
        elif isinstance(values.type, pa.ListType):
            entries = values.offsets.to_numpy()
            views["counts"] = np.diff(entries), offsets
            values, offsets = values.values, entries[offsets]
        flat = values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
        views[name] = (flat.reshape(-1, width) if width else flat, offsets)
    return views


def _value_buffers(batch: pa.RecordBatch) -> list[pa.Buffer]:
    """The values of every column but of those that pack several into a byte; without offsets and padding."""
    plain = [column for column in batch.columns if not isinstance(column.type, pa.ListType)]
    values = [column.values for column in batch.columns if isinstance(column.type, pa.ListType)]
    values = [item.values if isinstance(item.type, pa.FixedSizeListType | pa.ListType) else item for item in values]
    return [array.buffers()[1] for array in plain + values if not pa.types.is_boolean(array.type) and len(array)]


CONTAINER = Container(".arrow", ArrowShardWriter, ArrowShard, lambda layout: layout.format_version)
