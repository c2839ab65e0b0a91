"""Shards as Zarr v3: a group of flat arrays in one uncompressed zip file; the archive, as small as it gets.

The arrays are those of `pipeline.formats.packing`: chunked, compressed with pcodec (bytes with zstd), each
chunk with its crc32c, chunks bundled by the sharding codec. The file is written front to back when the last
sequence is there, and read, by `pipeline.formats.archive`; zarr makes the metadata, and reads it as well.
"""

import contextlib
import threading
import warnings
import zipfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numcodecs.pcodec import PCodec

from pipeline.errors import CacheCorruptError
from pipeline.formats.archive import Archive, ArchivedArray, bundles
from pipeline.formats.containers import Container
from pipeline.formats.layout import ALIGNMENT, ShardLayout
from pipeline.formats.packing import (
    FLAT,
    MODEL,
    MODEL_2,
    Model,
    Packer,
    array_specs,
    arrays_of,
    model_of,
    model_of_2,
    unpack,
    unpack_some,
)
from pipeline.parallel import ALONE, Threads

CHUNK_VALUES = 32_768
"""Values in the chunks of a row block, the unit of reading."""
MAX_CHUNK_ROWS = 4096
"""Of scalars; of coefficients too, each of which is a chunk of its own: they differ in their spread."""
FLAT_VALUES = 16_384
"""Values of a chunk of a flat array, whose chunks do not begin where rows do: more of a larger one is read in vain."""
STEP_COLUMNS = 16
"""Columns of a chunk of `steps`: ranks that are close to each other have like steps."""
CHUNKS_IN_BUNDLE = 128
"""Row blocks in one entry of the zip file, the unit of writing."""
PCODEC_LEVEL = 8
ZSTD_LEVEL = 3
OF_A_SEQUENCE = 16
"""Bytes of a sequence that nothing makes smaller: its key, which is a hash."""
FORMAT = "sparse-target-shard"
_FILTERS = threading.Lock()
"""Held while the warning filters, which all threads share, are changed."""


class ZarrShardWriter:
    """Takes sequences for a new zip file at `path`, which is written by `close` and complete only after it."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self._layout, self._packer = layout, Packer(layout)
        self._file = zipfile.ZipFile(path, mode="x")

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Add the stored columns of one or more sequences."""
        self._packer.append(columns)

    def close(self, threads: Threads = ALONE) -> None:
        """Learn the shard's model, write all arrays and the zip directory."""
        block_rows = chunk_shape("codes", (0, self._layout.spec.top_k))[0] * CHUNKS_IN_BUNDLE
        arrays, blocks = self._packer.arrays(block_rows, threads)
        version = format_version(self._layout)
        attributes = _attributes(self._layout, version) | ({"previous_tables": 0} if version == 2 else {})
        specs = {name: (values.dtype, values.shape) for name, values in arrays.items()}
        dtype, shape = array_specs(self._layout, version).get("codes", (None, None))
        if dtype is not None and shape is not None:
            specs["codes"] = dtype, shape
        for name, document in _metadata(attributes, specs).items():
            self._add(name, document)
        for name, values in arrays.items():
            self._write(name, values, 0, threads)
        for number, codes in enumerate(blocks()):
            self._write("codes", codes, number, threads)
        self._file.close()

    def discard(self) -> None:
        """Let go of the file, finished or not."""
        with contextlib.suppress(OSError):  # the zip directory does not fit a full disk either
            self._file.close()

    def _write(self, name: str, values: np.ndarray, first: int, threads: Threads) -> None:
        """Rows of an array as bundles, the first of which has the number `first`."""
        shapes = chunk_shape(name, values.shape), bundle_shape(name, values.shape)
        for number, bundle in enumerate(bundles(values, *shapes, _compress, threads), start=first):
            self._add(f"{name}/c/{number}{'/0' * (values.ndim - 1)}", bundle)

    def _add(self, name: str, contents: bytes) -> None:
        """An entry without the time of day: the same targets make the same file."""
        entry = zipfile.ZipInfo(name)
        entry.external_attr = 0o600 << 16
        self._file.writestr(entry, contents)


class ZarrShard:
    """A finished Zarr shard; reading a sequence decodes the chunks that it touches."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path, self._layout = path, layout
        with self._damage_is_named():
            self._archive = Archive(path)
            group = self._archive.json("zarr.json")
            attributes = group["attributes"]
            previous_tables = attributes.pop("previous_tables", 0)
            version = attributes["format_version"]
            self._version, known = version, (format_version(layout), layout.format_version)
            if version not in known or attributes != _attributes(layout, version):
                raise CacheCorruptError(f"{path}: its attributes are not the manifest's; it belongs to another cache.")
            if layout.counts.num_sequences * OF_A_SEQUENCE > len(self._archive.contents):
                raise ValueError(f"{layout.counts.num_sequences} keys and checksums do not fit the file")
            self._arrays = {name: self._array(name, *spec) for name, spec in array_specs(layout, version).items()}
            names: tuple[str, ...] = (MODEL_2 if version == 2 else MODEL) if layout.spec.top_k else ()
            self._model_arrays = {name: self._array(name, np.dtype(np.uint32)) for name in names}
            self._model_of = partial(model_of_2, previous_tables=previous_tables) if version == 2 else model_of
            self._model: Model | None = None
            self._heads = {name: self._arrays[name][:] for name in _OF_SEQUENCES if name in self._arrays}
            counts = {name: values for name, values in self._heads.items() if name.startswith("num_")}
            self._offsets = {
                name: np.concatenate([[0], np.cumsum(values, dtype=np.int64)]) for name, values in counts.items()
            }
            self._names, ragged = list(layout.columns()), layout.ragged()
            if layout.spec.is_ragged:
                ragged |= {"codes": "num_entries", "steps": "num_steps"}
                self._offsets["num_steps"] = self._offsets["num_entries"] - self._offsets["num_targets"]
                self._require_entries(ragged)
        self._counted = {name: ragged.get(name, "num_targets") for name in self._arrays if name not in self._heads}

    def _require_entries(self, counted: dict[str, str]) -> None:
        """Raise ValueError unless the sequences have as many entries as are there, 1 to K of each target."""
        most = (self._layout.spec.top_k - 1) * self._heads["num_targets"].astype(np.int64)
        later = np.diff(self._offsets["num_steps"])
        if (later < 0).any() or (later > most).any():
            raise ValueError("a sequence of fewer entries than targets, or more than these can have")
        for name in FLAT:
            if name in self._arrays and len(self._arrays[name]) != self._offsets[counted[name]][-1]:
                raise ValueError(f"array {name!r} has not as many values as its sequences have entries")

    def __len__(self) -> int:
        return len(self._arrays["key"])

    def columns(self, start: int, stop: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """The stored columns of sequences `start` to `stop`, or those of `names` alone: few arrays, if not the ids."""
        with self._damage_is_named():
            needed = None if names is None else arrays_of(names, self._layout, self._version)
            if names is not None and needed is not None:
                return unpack_some(self._found(start, stop, needed), names, self._layout)
            if self._model is None and self._layout.spec.top_k:
                arrays = {name: array[:] for name, array in self._model_arrays.items()}
                self._model = self._model_of(arrays)
            columns = unpack(self._found(start, stop, self._arrays), self._model, self._layout)
            return {name: columns[name] for name in names or self._names}

    def _found(self, start: int, stop: int, names: Collection[str]) -> dict[str, np.ndarray]:
        """The arrays of these names, of some sequences."""
        found = {name: values[start:stop] for name, values in self._heads.items() if name in names}
        first, last = ({name: int(ends[at]) for name, ends in self._offsets.items()} for at in (start, stop))
        for name, counted in self._counted.items():
            if name in names:
                found[name] = self._arrays[name][first[counted] : last[counted]]
        return found

    def parts(self) -> dict[str, int]:
        """Bytes of every array, compressed, with the indexes and checksums of its chunks."""
        arrays = self._arrays | self._model_arrays
        return {name: sum(stop - start for start, stop in array.extents) for name, array in arrays.items()}

    def checked_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the file's bytes that have checksums of their own, which reading checks."""
        arrays = [*self._arrays.values(), *self._model_arrays.values()]
        return sorted(extent for array in arrays for extent in array.extents)

    def heads(self) -> dict[str, np.ndarray]:
        """What every sequence has one of."""
        return {name: values for name, values in self._heads.items() if name != "checksum"}

    def close(self) -> None:
        """Release the file."""
        self._archive.close()

    def _array(self, name: str, dtype: np.dtype, shape: tuple[int, ...] | None = None) -> ArchivedArray:
        return ArchivedArray(self._archive, name, dtype, shape, lambda found: codecs(name, dtype, found))

    @contextlib.contextmanager
    def _damage_is_named(self) -> Iterator[None]:
        try:
            yield
        except (CacheCorruptError, FileNotFoundError, MemoryError):
            raise
        except Exception as exc:  # zipfile, json, pcodec and numpy each raise their own for damaged bytes
            raise CacheCorruptError(f"{self.path}: not a whole Zarr shard of this cache ({exc}).") from exc


_OF_SEQUENCES = ("key", "checksum", "num_tokens", "num_documents", "num_targets", "num_entries")


def chunk_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of a chunk of an array."""
    width = int(np.prod(shape[1:], dtype=int))
    if name in FLAT and len(shape) == 1:
        return (FLAT_VALUES,)
    if name == "coefficients":
        return (MAX_CHUNK_ROWS, 1)
    if name == "steps":
        return (_chunk_rows(width + 1), min(STEP_COLUMNS, width))
    return (_chunk_rows(width), *shape[1:])


def _chunk_rows(width: int) -> int:
    return min(MAX_CHUNK_ROWS, max(1, CHUNK_VALUES // max(1, width)))


def bundle_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of a bundle: all columns, in whole chunks."""
    rows, *columns = chunk_shape(name, shape)
    return (rows * CHUNKS_IN_BUNDLE, *(-(-size // chunk) * chunk for size, chunk in zip(shape[1:], columns)))


def codecs(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """What the metadata of an array says of its chunks."""
    crc = {"name": "crc32c"}
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    if dtype.itemsize == 1:
        inner = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}, crc]
    else:
        inner = [{"name": "numcodecs.pcodec", "configuration": _PCODEC}, crc]
    configuration = {
        "chunk_shape": list(chunk_shape(name, shape)),
        "codecs": inner,
        "index_codecs": [little, crc],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


_PCODEC: dict[str, Any] = {
    "level": PCODEC_LEVEL,
    "mode_spec": "classic",
    "delta_spec": "try_consecutive",
    "delta_encoding_order": 0,
}


def _compress(values: np.ndarray) -> bytes:
    if values.dtype.itemsize == 1:
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(values.data)
    return PCodec(**_PCODEC).encode(values.ravel())


def _metadata(attributes: dict[str, Any], specs: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, bytes]:
    """The documents of a group and its arrays, by their names in the zip file, as zarr writes them."""
    import zarr
    import zarr.codecs.numcodecs

    documents: dict[str, Any] = {}
    with _pcodec_is_meant():
        group = zarr.create_group(zarr.storage.MemoryStore(documents), attributes=attributes)
        for name, (dtype, shape) in specs.items():
            crc, is_bytes = zarr.codecs.Crc32cCodec(), dtype.itemsize == 1
            group.create_array(
                name,
                shape=shape,
                dtype=dtype,
                chunks=chunk_shape(name, shape),
                shards=bundle_shape(name, shape),
                serializer="auto" if is_bytes else zarr.codecs.numcodecs.PCodec(**_PCODEC),
                compressors=[zarr.codecs.ZstdCodec(level=ZSTD_LEVEL), crc] if is_bytes else crc,
                fill_value=0,
            )
    return {name: document.to_bytes() for name, document in documents.items()}


@contextlib.contextmanager
def _pcodec_is_meant() -> Iterator[None]:
    """Without zarr's warning that numcodecs' codecs are an extension of the specification."""
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")
        yield


def format_version(layout: ShardLayout) -> int:
    """Of the shards that are written: 3 where ids have topics. Those with contexts, of version 2, are still read."""
    return 3 if layout.spec.top_k else layout.format_version


def _attributes(layout: ShardLayout, version: int) -> dict[str, Any]:
    named = {
        "format": FORMAT,
        "format_version": version,
        "temperatures": list(layout.spec.temperatures),
        "max_kl_error": layout.spec.max_kl_error,
        "alignment": ALIGNMENT,
    }
    return named


CONTAINER = Container(".zarr.zip", ZarrShardWriter, ZarrShard, format_version, is_compressed=True, checks_columns=True)
