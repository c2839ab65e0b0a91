"""Shards as Zarr v3: a group of flat arrays in one uncompressed zip file.

Arrays are chunked, compressed with pcodec, checked by crc32c and bundled by the sharding codec.
They are written front to back, one zip entry at a time, each entry once.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs.numcodecs
from zarr.storage import ZipStore

from pipeline.errors import CacheCorruptError
from pipeline.shards.layout import ALIGNMENT, ShardLayout

CHUNK_VALUES = 32_768
"""Values in an inner chunk, the unit of reading."""
CHUNKS_IN_BUNDLE = 128
"""Inner chunks in one entry of the zip file, the unit of writing."""
PCODEC_LEVEL = 8
_FILTERS = threading.Lock()
"""Held while the warning filters, which all threads share, are changed."""


class ZarrShardWriter:
    """Appends sequences to a new zip file at `path`; the file is complete only after `close`."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self._store = ZipStore(path, mode="x")
        with _pcodec_is_meant():
            group = zarr.create_group(self._store, attributes=_attributes(layout))
            self._columns = {name: _Column(group, name, *spec) for name, spec in layout.columns().items()}

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Add the stored columns of one sequence."""
        for name, column in self._columns.items():
            column.append(columns[name])

    def close(self) -> None:
        """Write what is pending and the zip directory."""
        for column in self._columns.values():
            column.flush()
        self._store.close()

    def discard(self) -> None:
        """Let go of the file, finished or not."""
        with contextlib.suppress(OSError):  # the zip directory does not fit a full disk either
            self._store.close()


class ZarrShard:
    """A finished Zarr shard; reading a sequence decodes the chunks that it touches."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        try:
            self._store = ZipStore(path, mode="r")
            with _pcodec_is_meant():
                group = zarr.open_group(self._store, mode="r")
                self._arrays = {name: group[name] for name in layout.columns()}
        except Exception as exc:  # zipfile, zarr and json each raise their own for a damaged file
            raise CacheCorruptError(f"{path}: not a whole Zarr shard; it is truncated or foreign ({exc}).") from exc
        specs = {name: (array.dtype, array.shape) for name, array in self._arrays.items()}
        if specs != layout.columns() or dict(group.attrs) != _attributes(layout):
            raise CacheCorruptError(f"{path}: its arrays are not the manifest's; the shard belongs to another cache.")
        self._ragged = layout.ragged()
        self._offsets = {name: np.cumsum([0, *self._read(name, 0, None)]) for name in set(self._ragged.values())}

    def __len__(self) -> int:
        return self._arrays["key"].shape[0]

    def columns(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The stored columns of sequences `start` to `stop`."""
        columns = {"key": self._read("key", start, stop)}
        for name, counted in self._ragged.items():
            offsets = self._offsets[counted]
            columns[name] = self._read(name, int(offsets[start]), int(offsets[stop]))
        for counted, offsets in self._offsets.items():
            columns[counted] = np.diff(offsets[start : stop + 1])
        return columns

    def heads(self) -> dict[str, np.ndarray]:
        """What every sequence has one of."""
        names = ("key", "num_tokens", "num_documents", "num_targets")
        return {name: self._read(name, 0, None) for name in names}

    def close(self) -> None:
        """Close the zip file."""
        self._store.close()

    def _read(self, name: str, start: int, stop: int | None) -> np.ndarray:
        try:
            return np.asarray(self._arrays[name][start:stop])
        except Exception as exc:  # a flipped byte surfaces as any of a dozen decoder errors
            raise CacheCorruptError(f"{self.path}: column {name!r} cannot be decoded ({exc}).") from exc


class _Column:
    """One array of a shard that is being written: rows wait until they fill a bundle."""

    def __init__(self, group: zarr.Group, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        chunk = max(1, CHUNK_VALUES // int(np.prod(shape[1:], dtype=int)))
        self._bundle = chunk * CHUNKS_IN_BUNDLE
        self._array = _create(group, name, dtype, shape, chunk, self._bundle)
        self._pending: list[np.ndarray] = []
        self._rows = self._written = 0

    def append(self, rows: np.ndarray) -> None:
        self._pending.append(rows)
        self._rows += len(rows)
        while self._rows - self._written >= self._bundle:
            self._write(self._bundle)

    def flush(self) -> None:
        if self._rows > self._written:
            self._write(self._rows - self._written)
        assert self._rows == self._array.shape[0], f"{self._rows} rows for an array of shape {self._array.shape}"

    def _write(self, count: int) -> None:
        rows = np.concatenate(self._pending)
        self._array[self._written : self._written + count] = rows[:count]
        self._written += count
        self._pending = [rows[count:]]


def _create(group: zarr.Group, name: str, dtype: np.dtype, shape: tuple[int, ...], chunk: int, bundle: int) -> Any:
    rest = tuple(max(1, size) for size in shape[1:])
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *rest),
        shards=(bundle, *rest),
        serializer="auto" if dtype.itemsize == 1 else zarr.codecs.numcodecs.PCodec(level=PCODEC_LEVEL),
        compressors=zarr.codecs.ZstdCodec(level=3) if dtype.itemsize == 1 else None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )


@contextlib.contextmanager
def _pcodec_is_meant() -> Iterator[None]:
    """Without zarr's warning that numcodecs' codecs are an extension of the specification."""
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")
        yield


def _attributes(layout: ShardLayout) -> dict[str, Any]:
    return {"temperatures": list(layout.temperatures), "alignment": ALIGNMENT, "codec": layout.codec}
