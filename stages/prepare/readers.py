"""From an input file to its records, streamed. Text keeps its bytes: line ends and spaces are data.

A broken record goes to `BadLines`, which stops the run or counts it; a broken file always stops it.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import CorpusError
from pipeline.progress import Reporter
from stages.prepare.forms import field_names, forms_in
from stages.prepare.inputs import InputFile, suffix_of
from stages.prepare.json_files import json_values

EXAMPLES = 3
"""Skipped records that are shown."""
PARQUET_ROWS = 1024
READ_BYTES = 1 << 20
LONGEST_LINE = 256 << 20
"""Bytes. A compressed file of a few kilobytes may hold one line of gigabytes."""
ZSTD_BYTES = 2048
"""Compressed bytes taken at a time: the most that they can stand for is 64 MiB."""
LARGEST_ZSTD_WINDOW = 1 << 31


@dataclass(frozen=True, slots=True)
class Record:
    """One document as its file holds it."""

    where: str
    """File, and line or row from 1."""
    fields: dict[str, Any]
    offset: int
    """Bytes of the file that have been read so far."""


class BadLines:
    """Stops at the first record that cannot be read, or counts them and shows a few."""

    def __init__(self, skip: bool, reporter: Reporter) -> None:
        self.count = 0
        self._skip = skip
        self._reporter = reporter

    def reject(self, problem: str, remedy: str = "mend the record") -> None:
        """Raise CorpusError, or count the record if such records are skipped."""
        if not self._skip:
            raise CorpusError(f"{problem}; {remedy}, or leave such records out with --skip-bad-lines.")
        self.count += 1
        if self.count <= EXAMPLES:
            self._reporter.note(f"skipped: {problem}")


def read_records(file: InputFile, text_field: str, bad_lines: BadLines) -> Generator[Record, None, None]:
    """The records of `file` in order; a .txt or .md file is one record with its contents in `text_field`."""
    suffix = suffix_of(file.path)
    if suffix in (".txt", ".md"):
        return _read_text(file, text_field, bad_lines)
    if suffix == ".parquet":
        return _read_parquet(file, text_field)
    if suffix == ".json":
        return _read_json(file, bad_lines)
    return _read_lines(file, DECOMPRESSORS[suffix], bad_lines)


def _read_text(file: InputFile, text_field: str, bad_lines: BadLines) -> Generator[Record, None, None]:
    contents = file.path.read_bytes()
    text = _decode(contents.removeprefix(codecs.BOM_UTF8), str(file.path), bad_lines)
    if text is not None:
        yield Record(str(file.path), {text_field: text}, file.size)


def _read_json(file: InputFile, bad_lines: BadLines) -> Generator[Record, None, None]:
    for number, (fields, offset) in enumerate(json_values(file, LONGEST_LINE), start=1):
        where = f"{file.path}: record {number}"
        if isinstance(fields, dict):
            yield Record(where, fields, offset)
        else:
            bad_lines.reject(
                f"{where}: found a JSON {type(fields).__name__}; expected an object with the text in a field"
            )


def _read_lines(
    file: InputFile, decompress: Callable[[BinaryIO], Any], bad_lines: BadLines
) -> Generator[Record, None, None]:
    with file.path.open("rb", buffering=0) as raw, io.BufferedReader(decompress(raw), READ_BYTES) as stream:
        for number, line in enumerate(_whole_lines(file, stream), start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.isspace() or not content:
                continue
            where = f"{file.path}: line {number}"
            fields = _parse(content, where, bad_lines)
            if fields is not None:
                yield Record(where, fields, raw.tell())


def _whole_lines(file: InputFile, stream: io.BufferedReader) -> Iterator[bytes]:
    number = 0
    try:
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise CorpusError(f"{file.path}: line {number} has more than {LONGEST_LINE:,} bytes; cut the record.")
            yield line
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as exc:
        reason = " ".join(str(exc).split())
        raise CorpusError(
            f"{file.path}: the compressed stream is damaged or cut off after line {number} ({reason}); "
            "fetch or compress this file again."
        ) from exc


def _parse(content: bytes, where: str, bad_lines: BadLines) -> dict[str, Any] | None:
    text = _decode(content, where, bad_lines)
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as exc:
        bad_lines.reject(f"{where}: not JSON ({exc}); expected one object a line")
        return None
    if not isinstance(fields, dict):
        bad_lines.reject(f"{where}: found a JSON {type(fields).__name__}; expected an object with the text in a field")
        return None
    return fields


def _decode(content: bytes, where: str, bad_lines: BadLines) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as exc:
        line, byte = content.count(b"\n", 0, exc.start) + 1, content[exc.start]
        place = f"line {line}, byte {exc.start}" if b"\n" in content[:-1] else f"byte {exc.start}"
        bad_lines.reject(f"{where}: {place} is 0x{byte:02x}; expected UTF-8", "convert the file to UTF-8")
        return None


def _read_parquet(file: InputFile, text_field: str) -> Generator[Record, None, None]:
    with _readable_parquet(file), pq.ParquetFile(file.path, memory_map=True) as parquet:
        columns = _columns(file, parquet.schema_arrow.names, text_field)
        row, rows = 0, max(parquet.metadata.num_rows, 1)
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=columns):
            for fields in batch.to_pylist():
                row += 1
                yield Record(f"{file.path}: row {row}", fields, file.size * row // rows)


def _columns(file: InputFile, names: list[str], text_field: str) -> list[str]:
    if not forms_in(names, text_field):
        raise CorpusError(
            f"{file.path}: no column {text_field!r}, `messages`, or `prompt` with `completion`; "
            f"its columns are: {', '.join(names)}; name the one that holds the text with --text-field."
        )
    wanted = field_names(text_field)
    return [name for name in names if name in wanted]


@contextmanager
def _readable_parquet(file: InputFile) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        reason = " ".join(str(exc).split())
        raise CorpusError(f"{file.path}: not a whole Parquet file ({reason}); write or fetch this file again.") from exc


class _ZstdFile(io.RawIOBase):
    """Decompresses frames one after the other; unlike zstandard's own reader it notices a frame that was cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._frame_started = False
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._fill():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        compressed = self._compressed or self._raw.read(ZSTD_BYTES)
        if not compressed:
            if self._frame_started:
                raise EOFError("the last zstd frame has no end")
            return False
        self._ready = memoryview(self._frame.decompress(compressed))
        self._compressed = self._frame.unused_data
        self._frame_started = not self._frame.eof
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        return True


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".jsonl": lambda raw: raw,
    ".jsonl.gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".jsonl.zst": _ZstdFile,
}
