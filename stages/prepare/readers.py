"""From an input file to its records, streamed. Text keeps its bytes: line ends and spaces are data.

A broken record goes to `BadLines`, which stops the run or counts it; a broken file always stops it.
"""

import codecs
import contextlib
import functools
import gzip
import io
import json
import math
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
from stages.prepare.inputs import InputFile, Piece, suffix_of
from stages.prepare.json_files import json_values

EXAMPLES = 3
"""Skipped records that are shown."""
PARQUET_ROWS = 1024
ARROW_MAGIC, END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\x00\x00\x00\x00"
READ_BYTES = 1 << 20
REMOTE_BYTES = 8 << 20
"""Bytes that an object store is asked for at a time."""
LONGEST_LINE = 256 << 20
"""Bytes. A compressed file of a few kilobytes may hold one line of gigabytes."""
ZSTD_BYTES = 2048
"""Compressed bytes taken at a time: the most that they can stand for is 64 MiB."""
LARGEST_ZSTD_WINDOW = 1 << 31


@dataclass(frozen=True, slots=True)
class Record:
    """One document as its file holds it."""

    where: object
    """File, and line or row from 1, once it is asked for as a string."""
    fields: dict[str, Any]
    offset: int
    """Bytes of the piece that have been read so far."""
    source: str = ""
    """Name of what it came from: its file."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a piece; which of the file it is, is counted when somebody asks."""

    piece: Piece
    number: int
    """From 1 in the piece."""

    def __str__(self) -> str:
        return f"{self.piece.file.path}: line {self.number + _lines_before(self.piece)}"


@functools.lru_cache(maxsize=1)
def _lines_before(piece: Piece) -> int:
    """Lines of the file that stand before the piece, which takes reading them; once where many of a piece are named."""
    left, lines = piece.start, 0
    with piece.file.path.reader() as raw, io.BufferedReader(raw, READ_BYTES) as file:
        while left and (block := file.read(min(left, READ_BYTES))):
            lines += block.count(b"\n")
            left -= len(block)
        if piece.start:  # the piece begins inside a line, which belongs to the one before
            file.seek(piece.start - 1)
            lines += file.read(1) != b"\n"
    return lines


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


def read_records(
    piece: Piece, text_field: str, bad_lines: BadLines, more_fields: tuple[str, ...] = ()
) -> Generator[Record, None, None]:
    """The records of a piece in order; a .txt or .md file is one record with its contents in `text_field`.

    `more_fields` of a Parquet file are read beside those that hold text.
    """
    file, suffix = piece.file, suffix_of(piece.file.path)
    if suffix in (".txt", ".md"):
        return _read_text(file, text_field, bad_lines)
    if suffix == ".parquet":
        return _read_parquet(piece, text_field, more_fields)
    if suffix == ".arrow":
        return _read_arrow(file, text_field, more_fields)
    if suffix == ".json":
        return _read_json(file, bad_lines)
    return _read_lines(piece, DECOMPRESSORS[suffix], bad_lines)


def _source(file: InputFile) -> Any:
    """The file's bytes; of one in an object store many at a time."""
    raw = file.path.reader()
    return raw if file.path.path is not None else io.BufferedReader(raw, REMOTE_BYTES)


def _read_text(file: InputFile, text_field: str, bad_lines: BadLines) -> Generator[Record, None, None]:
    contents = file.path.read() or b""
    text = _decode(contents.removeprefix(codecs.BOM_UTF8), str(file.path), bad_lines)
    if text is not None:
        yield Record(str(file.path), {text_field: text}, file.size, file.name)


def _read_json(file: InputFile, bad_lines: BadLines) -> Generator[Record, None, None]:
    for number, (fields, offset) in enumerate(json_values(file, LONGEST_LINE), start=1):
        where = f"{file.path}: record {number}"
        if isinstance(fields, dict):
            yield Record(where, fields, offset, file.name)
        else:
            bad_lines.reject(
                f"{where}: found a JSON {type(fields).__name__}; expected an object with the text in a field"
            )


def _read_lines(
    piece: Piece, decompress: Callable[[BinaryIO], Any], bad_lines: BadLines
) -> Generator[Record, None, None]:
    file = piece.file
    with _source(file) as raw, io.BufferedReader(decompress(raw), READ_BYTES) as stream:
        for number, line in enumerate(_whole_lines(piece, stream), start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 and piece.start == 0 else line
            if content.isspace() or not content:
                continue
            where = Line(piece, number)
            fields = _parse(content, where, bad_lines)
            if fields is not None:
                yield Record(where, fields, min(raw.tell() - piece.start, piece.size), file.name)


def _whole_lines(piece: Piece, stream: io.BufferedReader) -> Iterator[bytes]:
    """The lines that begin in the piece; the last may end behind it."""
    file, number, left = piece.file, 0, math.inf
    if file.is_divisible:
        left = piece.size
        if piece.start:
            stream.seek(piece.start - 1)
            left -= len(_rest_of_line(stream)) - 1
    try:
        while left > 0 and (line := stream.readline(LONGEST_LINE + 1)):
            number += 1
            left -= len(line)
            if len(line) > LONGEST_LINE:
                raise CorpusError(f"{Line(piece, number)} has more than {LONGEST_LINE:,} bytes; cut the record.")
            yield line
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as exc:
        reason = " ".join(str(exc).split())
        raise CorpusError(
            f"{file.path}: the compressed stream is damaged or cut off after line {number} ({reason}); "
            "fetch or compress this file again."
        ) from exc


def _rest_of_line(stream: io.BufferedReader) -> bytes:
    """What a line has left; of one that no reader would take, as much as shows it."""
    return stream.readline(LONGEST_LINE + 1)


def _parse(content: bytes, where: object, bad_lines: BadLines) -> dict[str, Any] | None:
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


def _decode(content: bytes, where: object, bad_lines: BadLines) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as exc:
        line, byte = content.count(b"\n", 0, exc.start) + 1, content[exc.start]
        place = f"line {line}, byte {exc.start}" if b"\n" in content[:-1] else f"byte {exc.start}"
        bad_lines.reject(f"{where}: {place} is 0x{byte:02x}; expected UTF-8", "convert the file to UTF-8")
        return None


def _read_parquet(piece: Piece, text_field: str, more_fields: tuple[str, ...]) -> Generator[Record, None, None]:
    """The rows of the groups that begin in the piece."""
    file = piece.file
    source = file.path.path or _source(file)
    with _readable_columns(file, "Parquet"), pq.ParquetFile(source, memory_map=True) as parquet:
        columns = _columns(file, parquet.schema_arrow.names, text_field, more_fields)
        groups, row, rows = _row_groups(parquet.metadata, piece)
        done = 0
        for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns):
            for fields in batch.to_pylist():
                row, done = row + 1, done + 1
                yield Record(f"{file.path}: row {row}", fields, piece.size * done // rows, file.name)


def _read_arrow(file: InputFile, text_field: str, more_fields: tuple[str, ...]) -> Generator[Record, None, None]:
    """The rows of an Arrow file, or of a stream, as `save_to_disk` of the datasets library writes it."""
    with _readable_columns(file, "Arrow"), contextlib.ExitStack() as stack:
        local = file.path.path
        source = stack.enter_context(
            pa.memory_map(str(local)) if local is not None else pa.PythonFile(_source(file), mode="r")
        )
        is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        if not is_file:  # a stream that is cut off between two batches would look whole
            source.seek(max(file.size - len(END_OF_STREAM), 0))
            if source.read() != END_OF_STREAM:
                raise pa.ArrowInvalid("its end is missing")
        source.seek(0)
        reader = stack.enter_context(pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source))
        columns = _columns(file, reader.schema.names, text_field, more_fields)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        row = 0
        for batch in batches:
            for start in range(0, batch.num_rows, PARQUET_ROWS):
                for fields in batch.select(columns).slice(start, PARQUET_ROWS).to_pylist():
                    row += 1
                    yield Record(f"{file.path}: row {row}", fields, min(source.tell(), file.size), file.name)


def _row_groups(metadata: Any, piece: Piece) -> tuple[list[int], int, int]:
    """The row groups that begin in the piece, rows before them, and rows in them, at least 1."""
    groups, before, rows = [], 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        first = group.column(0) if group.num_columns else None
        place = 0 if first is None else first.dictionary_page_offset or first.data_page_offset
        place = min(max(place, 0), max(piece.file.size - 1, 0))
        if place < piece.start:
            before += group.num_rows
        elif place < piece.stop:
            groups.append(index)
            rows += group.num_rows
    return groups, before, max(rows, 1)


def _columns(file: InputFile, names: list[str], text_field: str, more_fields: tuple[str, ...]) -> list[str]:
    if not forms_in(names, text_field):
        raise CorpusError(
            f"{file.path}: no column {text_field!r}, `messages`, or `prompt` with `completion`; "
            f"its columns are: {', '.join(names)}; name the one that holds the text with --text-field."
        )
    wanted = {*field_names(text_field), *more_fields}
    return [name for name in names if name in wanted]


@contextmanager
def _readable_columns(file: InputFile, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        reason = " ".join(str(exc).split())
        raise CorpusError(f"{file.path}: not a whole {kind} file ({reason}); write or fetch this file again.") from exc


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
