"""What a task has finished, on disk: its record, and the files that later tasks read.

    CORPUS/units/
      plan.json        what is read, by which settings, and how it is divided (plan.py)
      commits/         a record a finished task: the first one wins, and it alone counts
      staged/          tokens of a unit's documents, and what of it was dropped; sorted keys of documents and rows;
                       which of them are duplicates; keys of texts that are nearly like others
      leases/ failures/ workers/ events/ run.json    as in a capture (pipeline/runs)

The folder is removed when the corpus is finished.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.cache.commits import commit_path, new_shard_name
from pipeline.corpus import CorpusPartition, list_column, lists_of
from pipeline.documents import Count, FileName, Hash, Text
from pipeline.errors import CorpusError
from pipeline.files import PARTIAL, hash_file, naming
from pipeline.ipc import file_batches
from pipeline.stores.sealed import read_document, write_json
from pipeline.stores.store import Store
from stages.prepare.tokens import Document

STAGED = "staged"
KINDS = ("text", "completion", "chat")
BATCH_DOCUMENTS = 1024
ENTRY_BYTES = 20
"""Of a key and its place."""
DOCUMENTS = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class StagedFile:
    """A file that a task has left for others."""

    file: FileName
    bytes: Count
    xxh3_128: Hash

    def on_this_machine(self, folder: Store, *, check: bool = True) -> Path:
        """The file in the run at `folder`, itself or a copy; raises CorpusError if it is not as it was written."""
        try:
            return (folder / STAGED / self.file).as_file(self.xxh3_128, self.bytes, check=check)
        except (FileNotFoundError, ValueError) as exc:
            raise CorpusError(f"{folder}: {exc}; delete {folder.parent} and prepare it again.") from exc


@dataclass(frozen=True, kw_only=True)
class FinishedTask:
    """The record of a task."""

    pieces: list[tuple[Text, int, int, int, int]] = field(default_factory=list)
    """Of a unit that was tokenised: identities of what was read."""
    documents: StagedFile | None = None
    keys: StagedFile | None = None
    duplicates: StagedFile | None = None
    rejected: StagedFile | None = None
    """Of a unit that was tokenised: what quality rules and nearness to other texts have dropped, if they are on."""
    partitions: tuple[CorpusPartition, ...] = ()
    """Of a unit that was packed: its files of the corpus."""
    statistics: dict[str, Count] = field(default_factory=dict)
    sources: dict[Text, tuple[Count, Count]] = field(default_factory=dict)
    """Of a unit that was packed: its documents and their tokens by the names of their sources."""
    done: Count = 0
    bytes: Count = 0
    """For who counts (pipeline/runs/outline.py): input that was read, and what was written of the corpus."""

    def commit(self, folder: Store, task: int) -> bool:
        """Declare a task of the run at `folder` finished; False if another worker has done so before."""
        return write_json(commit_path(folder, task), asdict(self), first_wins=True)

    @classmethod
    def read(cls, folder: Store, task: int) -> "FinishedTask":
        """The record of a task; raises FileNotFoundError, CorpusError."""
        return read_document(commit_path(folder, task), cls, CorpusError)


def write_staged(folder: Store, task: int, kind: str, write: Callable[[Path], None]) -> StagedFile:
    """Publish what `write` puts into the file that it is given, under a name that no other attempt uses."""
    place = folder / STAGED
    partial = place.workshop() / (new_shard_name(task, f".{kind}") + PARTIAL)
    try:
        with naming(partial):
            write(partial)
        name, size, checksum = partial.name.removesuffix(PARTIAL), partial.stat().st_size, hash_file(partial)
        (place / name).publish(partial)
    finally:
        partial.unlink(missing_ok=True)
    return StagedFile(file=name, bytes=size, xxh3_128=checksum)


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write documents in order, a few at a time in memory."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, DOCUMENTS) as writer:
        documents = iter(documents)
        while batch := list(islice(documents, BATCH_DOCUMENTS)):
            columns = [
                list_column([document.token_ids for document in batch], pa.int32()),
                list_column([document.loss_mask for document in batch], pa.bool_()),
                pa.array([KINDS.index(document.kind) for document in batch], pa.int8()),
                pa.array([document.source for document in batch], pa.string()),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=DOCUMENTS))


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a staged file, in order; raises CorpusError."""
    try:
        with pa.memory_map(str(path)) as source:
            batches = file_batches(source.read_buffer(), DOCUMENTS)
    except (pa.ArrowException, OSError, ValueError, struct.error) as exc:
        raise CorpusError(f"{path}: not a file of documents ({exc}); prepare the corpus again.") from exc
    for batch in batches:
        table = pa.Table.from_batches([batch])
        (tokens, ends), (masks, _) = lists_of(table, "token_ids"), lists_of(table, "loss_mask")
        kinds, sources = table.column("kind").to_pylist(), table.column("source").to_pylist()
        for (start, stop), kind, source in zip(pairwise(ends.tolist()), kinds, sources):
            yield Document(tokens[start:stop], masks[start:stop], KINDS[kind], source)


def write_keys(path: Path, keys: Sequence[bytes]) -> None:
    """Write keys of 16 bytes, sorted, each with its place among those given."""
    numbers = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    with path.open("wb") as file:
        for column in (numbers[:, 0], numbers[:, 1], np.arange(len(keys), dtype="<u4")):
            file.write(column[order].tobytes())


def read_keys(path: Path, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys of a file whose first half lies in [first, stop): both halves, uint64 [n], and places, uint32 [n].

    The file is mapped, and let go of at once: there may be more of them than a process may have open.
    """
    count, rest = divmod(path.stat().st_size, ENTRY_BYTES)
    if rest:
        raise CorpusError(f"{path}: not a file of keys; prepare the corpus again.")
    contents = np.memmap(str(path), np.uint8, "r") if count else np.zeros(0, np.uint8)
    high = contents[: 8 * count].view("<u8")
    begin = int(np.searchsorted(high, np.uint64(first)))
    end = count if stop >= 1 << 64 else int(np.searchsorted(high, np.uint64(stop)))
    low, places = contents[8 * count : 16 * count].view("<u8"), contents[16 * count :].view("<u4")
    return np.array(high[begin:end]), np.array(low[begin:end]), np.array(places[begin:end])
