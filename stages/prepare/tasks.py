"""What a worker does of a preparation: each task of the plan, from what earlier tasks have left to its own record."""

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.corpus import (
    END_TOKEN_IDS,
    PARTITIONS,
    CorpusManifest,
    CorpusPartition,
    TokenSequence,
    read_partition,
    sequences_of,
    write_partition,
)
from pipeline.errors import CorpusError
from pipeline.files import replacing
from pipeline.parallel import map_in_threads
from pipeline.progress import KeptLines, Reporter
from pipeline.runs.outline import UNITS
from pipeline.stores.store import Store
from pipeline.tokenizer import identify
from stages.prepare.conversations import Refused
from stages.prepare.documents import DocumentEncoder, is_overlong
from stages.prepare.duplicates import Duplicates, find_duplicates
from stages.prepare.forms import Undesirable, content_of
from stages.prepare.inputs import Piece, describe
from stages.prepare.near_duplicates import KEY_BYTES, near_duplicates
from stages.prepare.packing import Packer
from stages.prepare.plan import Plan
from stages.prepare.quality import rules_of
from stages.prepare.readers import BadLines, Record, read_records
from stages.prepare.settings import PACKINGS, PrepareConfig
from stages.prepare.staging import FinishedTask, StagedFile, read_documents, write_documents, write_keys, write_staged
from stages.prepare.tokens import ENDED_BY, Document, spoken

PROGRESS_BYTES = 1 << 20
READERS = 16
"""Records that are read at the same time."""
Advance = Callable[[int, int, int], None]
"""Told of input bytes, documents and tokens that are done."""


class Tasks:
    """Does the tasks of a plan, one after the other."""

    def __init__(self, config: PrepareConfig, plan: Plan, tokenizer: Any, reporter: Reporter, advance: Advance) -> None:
        self._config, self._plan, self._tokenizer = config, plan, tokenizer
        self._reporter, self._advance = reporter, advance
        self.folder: Store = config.out / UNITS

    def find_near_duplicates(self, task: int) -> FinishedTask:
        """Keys of the texts that are nearly like one before them, from a pass of its own over all inputs."""
        threshold = self._config.near_duplicates
        assert threshold is not None
        self._reporter.log(f"{self._config.out}: near duplicates: reading {self._plan.num_bytes:,} bytes")
        found = sorted(near_duplicates(self._plain_texts(), threshold, rules_of(self._config.quality)))
        return FinishedTask(
            keys=write_staged(self.folder, task, "near", lambda path: _write_bytes(path, b"".join(found)))
        )

    def tokenise(self, unit: int) -> FinishedTask:
        """The documents of a unit as tokens, each once, and their keys."""
        pieces, config = self._plan.units[unit], self._config
        bad_lines = BadLines(config.skip_bad_lines, self._reporter)
        counting = _Counting(self._advance)
        encoder = DocumentEncoder(
            config, self._tokenizer, bad_lines, self._reporter, counting.inside, self._near_duplicates
        )
        keys: dict[bytes, None] = {}
        shares = config.shares()
        counts: Counter[str] = Counter(left_out_by_weight=0, duplicate_documents=0)

        def documents(records: Iterator[Record]) -> Iterator[Document]:
            for document in encoder.encode(records):
                key = document.key
                if document.source in shares and _fraction(key) >= shares[document.source]:
                    counts["left_out_by_weight"] += 1
                    continue
                if key in keys:
                    counts["duplicate_documents"] += 1
                    continue
                keys[key] = None
                counting.document(document)
                yield document

        with closing(self._records(pieces, bad_lines, counting)) as records:  # its file, too, whatever ends the unit
            staged = write_staged(
                self.folder, unit, "documents", lambda path: write_documents(path, documents(records))
            )
        counting.flush()
        _check_unchanged(pieces)
        if bad_lines.count:
            names = f"{pieces[0].file.path} to {pieces[-1].file.path}"
            self._reporter.note(f"skipped {bad_lines.count:,} records of {names}")
        statistics = {
            "files": sum(piece.start == 0 for piece in pieces),
            "input_bytes": sum(piece.size for piece in pieces),
            "bad_lines": bad_lines.count,
            **encoder.counts,
            **counts,
        }
        return FinishedTask(
            pieces=[piece.identity for piece in pieces],
            documents=staged,
            keys=self._keys(unit, list(keys)),
            rejected=self._rejected(unit, encoder.rejected),
            statistics=statistics,
            done=statistics["input_bytes"],
        )

    def compare_documents(self, task: int) -> FinishedTask:
        """Which documents of a bucket are duplicates."""
        return self._compare(task, self._plan.comparing_documents, self._tokenised)

    def pack(self, task: int) -> FinishedTask:
        """The rows of a unit in files of the corpus, each once, and their keys."""
        unit = task - self._plan.packing.start
        tokenised = FinishedTask.read(self.folder, unit)
        assert tokenised.documents is not None
        path = tokenised.documents.on_this_machine(self.folder)
        duplicates = self._duplicate_documents.of(unit)
        packer: Packer = PACKINGS[self._config.packing](self._config.sequence_length)
        sources: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2, np.int64))
        counts: Counter[str] = Counter(duplicate_documents=len(duplicates), documents=0, duplicate_sequences=0)
        keys: dict[bytes, None] = {}

        def rows() -> Iterator[TokenSequence]:
            for document in _without(read_documents(path), duplicates):
                counts["documents"] += 1
                sources[document.source] += np.array([1, len(document.token_ids)])
                if not is_overlong(document, self._config, counts):
                    yield from packer.add(document)
            yield from packer.flush()

        def new_rows() -> Iterator[TokenSequence]:
            for row in rows():
                if row.key in keys:
                    counts["duplicate_sequences"] += 1
                else:
                    keys[row.key] = None
                    yield row

        partitions = self._write(f"{unit:05d}", new_rows())
        return FinishedTask(
            keys=self._keys(task, list(keys)),
            partitions=partitions,
            statistics={**counts, **packer.counts},
            sources={name: (int(sums[0]), int(sums[1])) for name, sums in sources.items()},
            bytes=sum(partition.bytes for partition in partitions),
        )

    def compare_rows(self, task: int) -> FinishedTask:
        """Which rows of a bucket are duplicates."""
        return self._compare(task, self._plan.comparing_rows, self._packed)

    @property
    def to_drop(self) -> list[int]:
        """Tasks for the units that have rows of units before them."""
        return [self._plan.dropping[unit] for unit in self._duplicate_rows.units()]

    def drop(self, task: int) -> FinishedTask:
        """The rows of a unit without those that units before it have, in files of other names."""
        unit = task - self._plan.dropping.start
        packed, duplicates = self._packed[unit], self._duplicate_rows.of(unit)
        tables = (read_partition(self._config.out, partition) for partition in packed.partitions)
        rows = (row for table in tables for row in sequences_of(table, 0, table.num_rows))
        partitions = self._write(f"{unit:05d}-once", _without(rows, duplicates))
        return FinishedTask(partitions=partitions, statistics={"duplicate_sequences": len(duplicates)})

    def finish(self, task: int) -> FinishedTask:
        """The manifest, which declares the corpus finished."""
        dropped = dict(zip(self._duplicate_rows.units(), self._read(self.to_drop)))
        units = [dropped.get(unit, packed) for unit, packed in enumerate(self._packed)]
        statistics: Counter[str] = Counter()
        for done in (*self._tokenised, *self._packed, *dropped.values()):
            statistics.update(done.statistics)
        statistics.update(self._plan.counts)
        manifest = CorpusManifest(
            sequence_length=self._config.sequence_length,
            packing=self._config.packing,
            tokenizer=identify(self._tokenizer),
            partitions=tuple(partition for unit in units for partition in unit.partitions),
            settings={
                **self._plan.resolved,
                **self._plan.settings,
                END_TOKEN_IDS: self._end_token_ids(statistics),
                "sources": self._sources(),
                "input_files": [list(file[1:]) for file in self._plan.files],
            },
            statistics=dict(statistics),
        )
        if not manifest.partitions:
            raise CorpusError(
                f"{', '.join(self._plan.resolved['inputs'])}: nothing to train on is left ({counts_of(manifest)}); "
                "give more text, or look at the loss masks."
            )
        if self._config.rejected is not None:
            self._list_rejected(self._config.rejected)
        kept = {partition.file for partition in manifest.partitions}
        for name in (self._config.out / PARTITIONS).names():
            if name.endswith(".arrow") and name not in kept:  # with duplicates, or of another plan
                (self._config.out / PARTITIONS / name).unlink(missing_ok=True)
        manifest.write(self._config.out)
        return FinishedTask()

    @cached_property
    def _near_duplicates(self) -> frozenset[bytes]:
        """Keys of texts to drop; none unless it is asked for."""
        content = b""
        for task in self._read(self._plan.near_duplicates):
            assert task.keys is not None
            content = task.keys.on_this_machine(self.folder).read_bytes()
        return frozenset(content[at : at + KEY_BYTES] for at in range(0, len(content), KEY_BYTES))

    @cached_property
    def _tokenised(self) -> list[FinishedTask]:
        return self._read(self._plan.tokenising)

    @cached_property
    def _packed(self) -> list[FinishedTask]:
        return self._read(self._plan.packing)

    @cached_property
    def _duplicate_documents(self) -> Duplicates:
        return Duplicates(self.folder, self._read(self._plan.comparing_documents))

    @cached_property
    def _duplicate_rows(self) -> Duplicates:
        return Duplicates(self.folder, self._read(self._plan.comparing_rows))

    def _read(self, tasks: Sequence[int]) -> list[FinishedTask]:
        return map_in_threads(lambda task: FinishedTask.read(self.folder, task), tasks, READERS)

    def _keys(self, task: int, keys: list[bytes]) -> Any:
        """The keys on disk, for comparing; one unit alone is compared with none."""
        if not self._plan.num_buckets:
            return None
        return write_staged(self.folder, task, "keys", lambda path: write_keys(path, keys))

    def _rejected(self, unit: int, rejected: Sequence[dict[str, str]]) -> StagedFile | None:
        """On disk what of a unit was dropped, in the order of the input, if anything can be."""
        if not self._config.quality and self._config.near_duplicates is None:
            return None
        lines = "".join(json.dumps(entry) + "\n" for entry in rejected)
        return write_staged(self.folder, unit, "rejected", lambda path: _write_bytes(path, lines.encode()))

    def _list_rejected(self, file: Path) -> None:
        """One list of what all units have dropped, in the order of the input."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, partial.open("wb") as target:
            for unit in self._tokenised:
                assert unit.rejected is not None
                target.write(unit.rejected.on_this_machine(self.folder).read_bytes())

    def _plain_texts(self) -> Iterator[str]:
        """All of the inputs, in their order; what cannot be read is named when it is read again."""
        text_field, has_template = self._config.text_field, bool(self._tokenizer.chat_template)
        bad_lines = BadLines(True, KeptLines())
        for pieces in self._plan.units:
            for piece in pieces:
                with closing(read_records(piece, text_field, bad_lines)) as records:
                    for record in records:
                        with contextlib.suppress(Refused, Undesirable):
                            content = content_of(record.fields, text_field, has_template)
                            if isinstance(content, str):
                                yield content
            _check_unchanged(pieces)

    def _compare(self, task: int, tasks: range, units: Sequence[FinishedTask]) -> FinishedTask:
        keys = [unit.keys for unit in units if unit.keys is not None]
        assert len(keys) == len(units)
        return find_duplicates(self.folder, task, task - tasks.start, len(tasks), keys)

    def _records(
        self, pieces: Sequence[Piece], bad_lines: BadLines, counting: "_Counting"
    ) -> Generator[Record, None, None]:
        more_fields = () if self._config.source_field is None else (self._config.source_field,)
        for piece in pieces:
            with closing(read_records(piece, self._config.text_field, bad_lines, more_fields)) as records:
                for record in records:
                    counting.at(record.offset)
                    yield record
            counting.at(piece.size)
            counting.next_piece()

    def _write(self, name: str, rows: Iterator[TokenSequence]) -> tuple[CorpusPartition, ...]:
        return tuple(
            write_partition(self._config.out, f"{name}-{number:03d}", sequences)
            for number, sequences in enumerate(_divided(rows, self._config.partition_tokens))
        )

    def _sources(self) -> dict[str, list[int]]:
        """Documents and tokens by source, before what is too long is cut or dropped."""
        sums: dict[str, list[int]] = {}
        for packed in self._packed:
            for name, (documents, tokens) in packed.sources.items():
                before = sums.get(name, [0, 0])
                sums[name] = [before[0] + documents, before[1] + tokens]
        return sums

    def _end_token_ids(self, statistics: Counter[str]) -> list[int]:
        """The tokens that the documents' labels end with: where a student is to stop."""
        tokens = [name.removeprefix(ENDED_BY) for name in statistics if name.startswith(ENDED_BY)]
        return sorted(self._tokenizer.convert_tokens_to_ids(tokens))


class _Counting:
    """What is done of a unit, told now and then."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._said = self._unsaid = self._inside = 0
        """Bytes of the piece that were counted as done; up to the record in hand; those of its long text."""
        self._documents = self._tokens = 0

    def at(self, offset: int) -> None:
        """The records up to this byte of the piece are read."""
        if self._unsaid >= PROGRESS_BYTES:
            self._say(self._unsaid - self._inside)
            self._said, self._inside = self._said + self._unsaid, 0
        self._unsaid = max(offset - self._said, 0)

    def next_piece(self) -> None:
        """The piece is read to its end."""
        self._say(self._unsaid - self._inside)
        self._said = self._unsaid = self._inside = 0

    def inside(self, share: float) -> None:
        """So much of the long text in hand is tokenised."""
        done = int(self._unsaid * share)
        self._say(max(done - self._inside, 0))
        self._inside = max(done, self._inside)

    def document(self, document: Document) -> None:
        """One more."""
        self._documents += 1
        self._tokens += len(document.token_ids)

    def flush(self) -> None:
        """The unit is done."""
        self._say(0)

    def _say(self, num_bytes: int) -> None:
        self._advance(num_bytes, self._documents, self._tokens)
        self._documents = self._tokens = 0


class Speed:
    """What a person wants to know beside the bytes."""

    def __init__(self) -> None:
        self._documents = self._tokens = 0
        self._started = time.monotonic()

    def note(self, documents: int, tokens: int) -> str:
        """Count them; all so far, and how fast they came."""
        self._documents, self._tokens = self._documents + documents, self._tokens + tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._documents:,} documents, {self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"


def _fraction(key: bytes) -> float:
    """A number in [0, 1) that a document's content decides, evenly spread and whatever else is in the corpus."""
    return int.from_bytes(key[8:], "little") / 2**64


def counts_of(manifest: CorpusManifest) -> str:
    """What was met and dropped, as a person reads it."""
    return ", ".join(f"{count:,} {spoken(name)}" for name, count in manifest.statistics.items() if count)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _without(items: Iterator[Any], places: np.ndarray) -> Iterator[Any]:
    """The items but for those at rising places."""
    dropped, following = iter(places.tolist()), -1
    following = next(dropped, -1)
    for place, item in enumerate(items):
        if place == following:
            following = next(dropped, -1)
        else:
            yield item


def _divided(rows: Iterator[TokenSequence], partition_tokens: int) -> Iterator[list[TokenSequence]]:
    """The rows in lists of at most so many tokens."""
    sequences: list[TokenSequence] = []
    tokens = 0
    for row in rows:
        if sequences and tokens + len(row.token_ids) > partition_tokens:
            yield sequences
            sequences, tokens = [], 0
        sequences.append(row)
        tokens += len(row.token_ids)
    if sequences:
        yield sequences


def _check_unchanged(pieces: Sequence[Piece]) -> None:
    for file in {piece.file.path: piece.file for piece in pieces}.values():
        with contextlib.suppress(FileNotFoundError):
            if describe(file.path, file.name) == file:
                continue
        raise CorpusError(f"{file.path}: changed while it was read; run `pipeline prepare` again once it is complete.")
