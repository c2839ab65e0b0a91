"""A tokenised corpus on disk: what `pipeline prepare` writes and `pipeline cache-logits` reads.

    CORPUS/
      corpus.json            written last: a corpus without it is not finished
      partitions/00000.arrow Arrow IPC files, one row a sequence, whole sequences
      tokenizer/             the tokenizer that made the ids

Knows nothing of text, teachers or targets.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.documents import Count, FileName, Hash, Text, Width, document_of, printable, short
from pipeline.errors import CorpusError
from pipeline.files import canonical_json, hash_file, naming, partial_path
from pipeline.ipc import file_batches
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_json, write_json
from pipeline.stores.store import Store
from pipeline.tokenizer import TokenizerIdentity

FORMAT = "tokenised-corpus"
FORMAT_VERSION = 1
MANIFEST = "corpus.json"
PARTITIONS = "partitions"
TOKENIZER = "tokenizer"
END_TOKEN_IDS = "end_token_ids"
"""Name in a manifest's settings of the tokens that end the documents' labels."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("document_lengths", pa.list_(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One row of a corpus: whole documents, or pieces of one, that are trained on together."""

    token_ids: np.ndarray
    """int32 [S]"""
    loss_mask: np.ndarray
    """bool [S], True where the token is a label; never the first token of an isolated document."""
    document_lengths: np.ndarray
    """int32 [D], adds up to S. Attention stays inside a document; one entry if it may cross all."""

    @cached_property
    def key(self) -> bytes:
        """16 bytes that name the contents: equal sequences have equal keys, in any corpus."""
        digest = xxhash.xxh3_128(np.ascontiguousarray(self.token_ids, dtype="<i4").tobytes())
        digest.update(np.packbits(self.loss_mask).tobytes())
        digest.update(np.ascontiguousarray(self.document_lengths, dtype="<i4").tobytes())
        return digest.digest()

    @cached_property
    def target_positions(self) -> np.ndarray:
        """int32 [N]: the positions t whose next token, t + 1, is a label."""
        return target_positions(self.loss_mask)


def comparable_keys(keys: np.ndarray) -> np.ndarray:
    """uint8 [S, 16] keys of sequences as one value a row, to be sorted and compared."""
    return np.ascontiguousarray(keys).view("S16").ravel()


def target_positions(loss_mask: np.ndarray) -> np.ndarray:
    """int32 [N]: the positions t for which `loss_mask[t + 1]` is True."""
    return np.flatnonzero(loss_mask[1:]).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class CorpusPartition:
    """One file of a corpus, as its manifest records it."""

    file: FileName
    num_sequences: Count
    num_tokens: Count
    num_targets: Count
    bytes: Count
    xxh3_128: Hash


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """What a finished corpus holds and how it was made."""

    sequence_length: Width
    packing: Text
    tokenizer: TokenizerIdentity
    partitions: tuple[CorpusPartition, ...]
    settings: dict[str, Any]
    """The resolved settings of `pipeline prepare`."""
    statistics: dict[str, Count]
    """Counts of what was read, skipped, cut and deduplicated."""

    @property
    def num_sequences(self) -> int:
        return sum(partition.num_sequences for partition in self.partitions)

    @property
    def num_tokens(self) -> int:
        return sum(partition.num_tokens for partition in self.partitions)

    @property
    def num_targets(self) -> int:
        return sum(partition.num_targets for partition in self.partitions)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and of every partition's contents."""
        contents = [self.tokenizer.to_dict(), self.packing, [part.xxh3_128 for part in self.partitions]]
        return xxhash.xxh3_128_hexdigest(canonical_json(contents))

    def write(self, folder: Path | Store) -> None:
        """Declare the corpus in `folder` finished."""
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        write_json(store_of(folder) / MANIFEST, document)

    @classmethod
    def read(cls, folder: Path | Store) -> "CorpusManifest":
        """The manifest of the finished corpus in `folder`; raises CorpusError."""
        path = store_of(folder) / MANIFEST
        if not path.is_file():
            raise CorpusError(f"{folder}: no finished corpus ({MANIFEST} is missing); run `pipeline prepare` first.")
        document = read_json(path, CorpusError)
        found = (document.pop("format", None), document.pop("format_version", None))
        if found != (FORMAT, FORMAT_VERSION):
            raise CorpusError(f"{path}: format {short(found)}; this version reads {(FORMAT, FORMAT_VERSION)}.")
        return document_of(cls, document, path, CorpusError)


def write_partition(folder: Path | Store, name: str, sequences: Sequence[TokenSequence]) -> CorpusPartition:
    """Write a partition of the corpus in `folder` atomically; no other partition has its name."""
    place = store_of(folder) / PARTITIONS
    for each in (place.parent, place):
        each.mkdir(exist_ok=True)
    partial = partial_path(place.workshop() / f"{name}.arrow")
    try:
        with naming(partial), pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for start in range(0, len(sequences), 256):
                writer.write_batch(_batch(sequences[start : start + 256]))
        written = CorpusPartition(
            file=f"{name}.arrow",
            num_sequences=len(sequences),
            num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
            num_targets=sum(len(sequence.target_positions) for sequence in sequences),
            bytes=partial.stat().st_size,
            xxh3_128=hash_file(partial),
        )
        (place / written.file).publish(partial)
    finally:
        partial.unlink(missing_ok=True)
    return written


def read_partition(folder: Path | Store, partition: CorpusPartition) -> pa.Table:
    """The rows of one partition, memory-mapped; raises CorpusError unless the file is as it was written and sound."""
    path = store_of(folder) / PARTITIONS / partition.file
    try:
        copy = path.as_file(partition.xxh3_128, partition.bytes, check=True)
    except FileNotFoundError:
        raise CorpusError(f"{path}: missing, although {MANIFEST} names it; run `pipeline prepare` again.") from None
    except ValueError:
        raise CorpusError(
            f"{path}: not the file that was written (checksum); delete {folder} and prepare it again."
        ) from None
    try:
        with pa.memory_map(str(copy)) as source:
            batches = file_batches(source.read_buffer(), SCHEMA)
        table = pa.Table.from_batches(batches, SCHEMA)
        _require_sound(table, partition)
    except (pa.ArrowException, OSError, ValueError, struct.error) as exc:
        raise CorpusError(f"{path}: not a partition of a corpus ({printable(str(exc))}); prepare it again.") from exc
    return table


def _require_sound(table: pa.Table, partition: CorpusPartition) -> None:
    """Raise ValueError unless tokens, masks and documents fit each other and the record."""
    (tokens, token_ends), (masks, mask_ends) = lists_of(table, "token_ids"), lists_of(table, "loss_mask")
    lengths, document_ends = lists_of(table, "document_lengths")
    if (table.num_rows, len(tokens)) != (partition.num_sequences, partition.num_tokens):
        raise ValueError(f"{table.num_rows} sequences of {len(tokens)} tokens; {MANIFEST} says otherwise")
    if len(masks) != len(tokens) or not np.array_equal(token_ends, mask_ends):
        raise ValueError("its tokens and masks do not fit each other")
    ends = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)[document_ends]
    if (lengths < 1).any() or (token_ends[1:] == token_ends[:-1]).any() or not np.array_equal(ends, token_ends):
        raise ValueError("its documents do not fit its tokens")
    if len(tokens) and int(tokens.min()) < 0:
        raise ValueError("a token id is below 0")


class Corpus:
    """A finished corpus, read in row order. Files are checked against their checksums when first used."""

    def __init__(self, folder: Path | Store) -> None:
        self.folder = store_of(folder)
        self.manifest = CorpusManifest.read(self.folder)
        sizes = [partition.num_sequences for partition in self.manifest.partitions]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return self.manifest.num_sequences

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[TokenSequence]:
        """Sequences `start` to `stop`, in order; holds one partition open at a time."""
        stop = len(self) if stop is None else stop
        while start < stop:
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[index + 1]))
            yield from sequences_of(
                self._table(index), start - int(self._starts[index]), end - int(self._starts[index])
            )
            start = end

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [len], twice: tokens and longest document of every sequence."""
        tables = [self._table(index) for index in range(len(self.manifest.partitions))]
        documents = [lists_of(table, "document_lengths") for table in tables]
        tokens = [np.diff(lists_of(table, "token_ids")[1]) for table in tables]
        longest = [np.maximum.reduceat(values, offsets[:-1]) for values, offsets in documents if len(offsets) > 1]
        return np.concatenate([np.zeros(0, np.int64), *tokens]), np.concatenate([np.zeros(0, np.int64), *longest])

    def largest_token_id(self) -> int:
        """Over all sequences; reads the whole corpus."""
        tables = (self._table(index) for index in range(len(self.manifest.partitions)))
        return max((int(lists_of(table, "token_ids")[0].max(initial=0)) for table in tables), default=0)

    def keys(self) -> np.ndarray:
        """uint8 [len, 16]: the key of every sequence."""
        tables = [self._table(index) for index in range(len(self.manifest.partitions))]
        keys = [b"".join(table.column("key").to_pylist()) for table in tables]
        return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)

    def _table(self, index: int) -> pa.Table:
        if index not in self._tables:
            self._tables = {index: read_partition(self.folder, self.manifest.partitions[index])}
        return self._tables[index]


def sequences_of(table: pa.Table, start: int, stop: int) -> Iterator[TokenSequence]:
    """Rows `start` to `stop` of a table of SCHEMA."""
    columns = {name: lists_of(table, name) for name in ("token_ids", "loss_mask", "document_lengths")}
    for row in range(start, stop):
        yield TokenSequence(
            **{name: values[offsets[row] : offsets[row + 1]] for name, (values, offsets) in columns.items()}
        )


def lists_of(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as flat values and int64 offsets [rows + 1]."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = column.offsets.to_numpy().astype(np.int64)
    return column.values.to_numpy(zero_copy_only=False), offsets


def _batch(sequences: Sequence[TokenSequence]) -> pa.RecordBatch:
    columns = [pa.array([sequence.key for sequence in sequences], pa.binary(16))]
    for name, kind in (("token_ids", pa.int32()), ("loss_mask", pa.bool_()), ("document_lengths", pa.int32())):
        columns.append(list_column([getattr(sequence, name) for sequence in sequences], kind))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def list_column(parts: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """A list column, with a row a part."""
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts), kind))
