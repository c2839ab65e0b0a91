"""The bundles of a Zarr shard, written and read without zarr's machinery, which spends 0.15 to 3 ms on every chunk.

A bundle is what Zarr calls a shard: chunks, each with its crc32c, then an index of where they are, with its own.
A shard file is a zip file whose entries are stored as they are, so that any chunk is a slice of the mapped file.
Reads what `pipeline.formats.zarr` writes, no more.
"""

import itertools
import json
import mmap
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from pcodec import standalone as pcodec

from pipeline.errors import CacheCorruptError
from pipeline.parallel import ALONE, Threads

CRC_BYTES = 4
ABSENT = 2**64 - 1
"""Offset and length of a chunk that lies outside the array."""
CHUNKS_AT_ONCE = 16
"""Chunks that a thread takes at a time: one alone is compressed in less time than it takes to wake a thread."""
KEPT_BLOCKS = 2
"""Decoded rows of chunks that an array keeps: neighbouring sequences share them."""


Compress = Callable[[np.ndarray], bytes]


def bundles(
    values: np.ndarray,
    chunk_shape: tuple[int, ...],
    bundle_shape: tuple[int, ...],
    compress: Compress,
    threads: Threads = ALONE,
) -> Iterator[bytes]:
    """The bundles of consecutive rows, the first of which begins one. Chunks are filled up with zeros."""

    def chunks_at(some: list[tuple[int, ...]]) -> list[bytes]:
        return [_with_crc(compress(_chunk(rows, chunk_shape, place))) for place in some]

    for start in range(0, len(values), bundle_shape[0]):
        rows = values[start : start + bundle_shape[0]]
        index = np.full((*(size // chunk for size, chunk in zip(bundle_shape, chunk_shape)), 2), ABSENT, "<u8")
        places = list(np.ndindex(*(-(-size // chunk) for size, chunk in zip(rows.shape, chunk_shape))))
        some = [places[first : first + CHUNKS_AT_ONCE] for first in range(0, len(places), CHUNKS_AT_ONCE)]
        parts, offset = list(itertools.chain.from_iterable(threads.map(chunks_at, some))), 0
        for place, part in zip(places, parts):
            index[place] = offset, len(part)
            offset += len(part)
        yield b"".join([*parts, _with_crc(index.tobytes())])


def _chunk(rows: np.ndarray, shape: tuple[int, ...], place: tuple[int, ...]) -> np.ndarray:
    piece = rows[tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, shape))]
    filled = np.zeros(shape, rows.dtype)
    filled[tuple(map(slice, piece.shape))] = piece
    return filled


def _with_crc(body: bytes) -> bytes:
    return body + google_crc32c.value(body).to_bytes(CRC_BYTES, "little")


class Archive:
    """A zip file of stored entries, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.zstd = path, zstandard.ZstdDecompressor()
        with path.open("rb") as file:
            self.contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with zipfile.ZipFile(path) as archive:
            self._entries = {info.filename: info for info in archive.infolist()}

    def extent(self, name: str) -> tuple[int, int]:
        """First and last byte (exclusive) of an entry's contents."""
        info = self._entries[name]
        names = self.contents[info.header_offset + 26 : info.header_offset + 30]
        start = info.header_offset + 30 + sum(np.frombuffer(names, "<u2").tolist())
        is_inside = info.header_offset >= 0 and start + info.file_size <= len(self.contents)
        if info.compress_type != zipfile.ZIP_STORED or not is_inside:
            raise ValueError(f"entry {name!r} is compressed or does not fit the file")
        return start, start + info.file_size

    def json(self, name: str) -> Any:
        """A JSON entry; its bytes are covered by the shard's `structure` checksum."""
        start, stop = self.extent(name)
        return json.loads(self.contents[start:stop])

    def close(self) -> None:
        """Release the mapping."""
        self.contents.close()


class ArchivedArray:
    """One array of an archive: chunks of rows and columns, bundled; rows are read by slices."""

    def __init__(
        self,
        archive: Archive,
        name: str,
        dtype: np.dtype,
        shape: tuple[int, ...] | None,
        codecs: Callable[[tuple[int, ...]], Any],
    ) -> None:
        """`codecs(shape)` is what the metadata must say of the chunks; a shape of None is any one-dimensional one."""
        self._archive, self._name, self._dtype = archive, name, dtype
        found = archive.json(f"{name}/zarr.json")
        self.shape = tuple(found["shape"]) if shape is None else shape
        expected = {"shape": list(self.shape), "data_type": dtype.name, "codecs": codecs(self.shape), "zarr_format": 3}
        different = [key for key, value in expected.items() if found.get(key) != value]
        if different or (shape is None and len(self.shape) != 1):
            raise ValueError(f"array {name!r} differs from the manifest in {', '.join(different)}")
        self._chunk_shape = tuple(expected["codecs"][0]["configuration"]["chunk_shape"])
        bundle_rows = found["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._across = -(-self.shape[1] // self._chunk_shape[1]) if len(self.shape) > 1 else 1
        self._blocks_in_bundle = bundle_rows // self._chunk_shape[0]
        columns = "/0" * (len(self.shape) - 1)
        bundles = range(-(-len(self) // bundle_rows))
        self.extents = [archive.extent(f"{name}/c/{bundle}{columns}") for bundle in bundles]
        self._indexes: dict[int, list[list[int]]] = {}
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        if start >= stop:
            return np.zeros((0, *self.shape[1:]), self._dtype)
        size = self._chunk_shape[0]
        first, last = start // size, (stop - 1) // size
        parts = [self._block(block) for block in range(first, last + 1)]
        parts[-1] = parts[-1][: stop - last * size]
        parts[0] = parts[0][start - first * size :]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _block(self, block: int) -> np.ndarray:
        """All rows of a row of chunks; the last one is filled up with zeros."""
        if block in self._kept:
            self._kept.move_to_end(block)
            return self._kept[block]
        bundle, place = divmod(block, self._blocks_in_bundle)
        index = self._index(bundle)[place * self._across : (place + 1) * self._across]
        chunks = [self._chunk(start, stop, block) for start, stop in index]
        values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks, axis=1)
        if len(self.shape) > 1 and values.shape[1] > self.shape[1]:
            values = values[:, : self.shape[1]]
        values.flags.writeable = False
        self._kept[block] = values
        if len(self._kept) > KEPT_BLOCKS:
            self._kept.popitem(last=False)
        return values

    def _chunk(self, start: int, stop: int, block: int) -> np.ndarray:
        contents = self._checked(start, stop, f"chunk {block}")
        values = np.empty(self._chunk_shape, self._dtype)
        if self._dtype.itemsize == 1:
            found = zstandard.get_frame_parameters(contents).content_size  # the memory that is asked for
            whole = found == values.nbytes
            if whole:
                values.reshape(-1)[:] = np.frombuffer(self._archive.zstd.decompress(contents), self._dtype)
        else:
            found = pcodec.simple_decompress_into(contents, values.reshape(-1)).n_processed
            whole = found == values.size
        if not whole:
            raise ValueError(f"{self._name}: chunk {block} has not the size of a chunk")
        return values

    def _index(self, bundle: int) -> list[list[int]]:
        """Where every chunk of a bundle begins and ends in the file."""
        if bundle not in self._indexes:
            start, stop = self.extents[bundle]
            size = self._blocks_in_bundle * self._across * 16
            contents = self._checked(max(start, stop - size - CRC_BYTES), stop, f"index of bundle {bundle}")
            index = np.frombuffer(contents, "<u8").reshape(-1, 2).astype(np.int64)  # absent chunks become -1
            index[:, 1] += index[:, 0]
            self._indexes[bundle] = np.where(index < 0, 0, index + start).tolist()
        return self._indexes[bundle]

    def _checked(self, start: int, stop: int, what: str) -> bytes:
        """Bytes of the file whose last four are the crc32c of the others, without those four."""
        contents = self._archive.contents[start:stop]
        body, crc = contents[:-CRC_BYTES], contents[-CRC_BYTES:]
        if len(crc) < CRC_BYTES or google_crc32c.value(body) != int.from_bytes(crc, "little"):
            raise CacheCorruptError(f"{self._archive.path}: {self._name}: {what} does not match its checksum.")
        return body
