"""The command `pipeline prepare`: unit after unit, each committed before the next, so that a killed one goes on there.

The same inputs, settings and tokenizer give the same files, interrupted or not.
"""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa
import xxhash

from pipeline.corpus import (
    END_TOKEN_IDS,
    MANIFEST,
    TOKENIZER,
    CorpusManifest,
    CorpusPartition,
    TokenSequence,
    read_partition,
    write_partition,
)
from pipeline.documents import entry_of, printable
from pipeline.errors import ConfigError, CorpusError
from pipeline.files import replacing
from pipeline.hub import located
from pipeline.progress import KeptLines, Progress, Reporter
from pipeline.settings import resolved
from pipeline.tokenizer import TokenizerIdentity, identify, load_tokenizer, save_tokenizer
from stages.prepare.conversations import Refused
from stages.prepare.documents import DocumentEncoder, is_overlong
from stages.prepare.forms import Undesirable, content_of
from stages.prepare.inputs import UNIT_BYTES, InputFile, InputFiles, describe, divide, find_inputs, same_files
from stages.prepare.near_duplicates import near_duplicates, require_datasketch
from stages.prepare.packing import Packer
from stages.prepare.quality import rules_of
from stages.prepare.readers import BadLines, Record, read_records
from stages.prepare.settings import PACKINGS, PrepareConfig
from stages.prepare.tokens import ENDED_BY, Document, spoken
from stages.prepare.units import (
    FinishedUnit,
    check_folder,
    check_same,
    collect_rejected,
    commit,
    document_keys_of,
    exclusive,
    remove_units,
    resume,
    start,
    write_rejected,
)

PROGRESS_BYTES = 1 << 20


def prepare(config: PrepareConfig, reporter: Reporter | None = None, *, unit_bytes: int = UNIT_BYTES) -> CorpusManifest:
    """Write the corpus that `config` describes and return its manifest; a finished one is returned as it is.

    Raises ConfigError or CorpusError. After a crash or an error, the same call goes on.
    """
    reporter = reporter or Reporter()
    config = located(config, "tokenizer", reporter, with_weights=False)
    if config.near_duplicates is not None:
        require_datasketch()
    check_folder(config.out)
    inputs = find_inputs(config.inputs, config.out)
    if inputs.note:
        reporter.note(f"{', '.join(map(str, config.inputs))}: not read: {inputs.note}")
    tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code, note=reporter.note)
    identity = identify(tokenizer)
    settings = _compared_settings(config, tokenizer, identity)
    if manifest := _finished(config, settings, inputs, reporter):
        return manifest
    with exclusive(config.out):
        if manifest := _finished(config, settings, inputs, reporter):  # by the process that held the lock
            return manifest
        start(config.out, settings)
        _save_tokenizer(tokenizer, config)
        dropped = _near_duplicates(config, tokenizer, inputs.files, reporter)
        units = _run(config, tokenizer, divide(inputs.files, unit_bytes), dropped, reporter)
        statistics = sum((Counter(unit.statistics) for unit in units), Counter())
        names = [*dict.fromkeys(name for unit in units for name in unit.statistics), *inputs.counts]
        statistics.update(inputs.counts)
        manifest = CorpusManifest(
            sequence_length=config.sequence_length,
            packing=config.packing,
            tokenizer=identity,
            partitions=tuple(partition for unit in units for partition in unit.partitions),
            settings={
                **resolved(config),
                **settings,
                END_TOKEN_IDS: _end_token_ids(tokenizer, statistics),
                "input_files": [list(file.identity) for file in inputs.files],
            },
            statistics={name: statistics[name] for name in names},
        )
        if not manifest.partitions:
            raise CorpusError(
                f"{', '.join(map(str, config.inputs))}: nothing to train on is left ({_counts(manifest)}); "
                "give more text, or look at the loss masks."
            )
        if config.rejected is not None:
            collect_rejected(config.out, len(units), config.rejected)
        manifest.write(config.out)
        remove_units(config.out)
    reporter.log(f"{config.out}: {_summary(manifest)}")
    return manifest


def _run(
    config: PrepareConfig,
    tokenizer: Any,
    groups: Sequence[Sequence[InputFile]],
    dropped: set[bytes],
    reporter: Reporter,
) -> list[FinishedUnit]:
    units = resume(config.out, groups, config.skip_bad_lines)
    with reporter.progress("prepare", sum(file.size for files in groups for file in files), "bytes") as progress:
        if tokenizer.eos_token_id is None:
            reporter.note(
                f"{config.tokenizer}: has no end-of-sequence token; what does not end with one stays without."
            )
        work = _Work(config, tokenizer, dropped, reporter, progress)
        for index, unit in enumerate(units):
            work.recall(index, unit)
        for index in range(len(units), len(groups)):
            units.append(work.do(index, groups[index]))
    return units


class _Work:
    """Does one unit after the other; remembers every key, about 90 bytes of memory a document and a row."""

    def __init__(
        self, config: PrepareConfig, tokenizer: Any, dropped: set[bytes], reporter: Reporter, progress: Progress
    ) -> None:
        self._config, self._dropped = config, dropped
        self._tokenizer = tokenizer
        self._reporter = reporter
        self._progress = progress
        self._document_keys: set[bytes] = set()
        self._row_keys: set[bytes] = set()
        self._num_partitions = 0
        self._unsaid = self._inside = 0
        """Bytes up to the record in hand that are not counted as done, and those of them that are by now."""
        self._documents = self._tokens = 0
        self._started = time.monotonic()

    def recall(self, index: int, unit: FinishedUnit) -> None:
        """Count a unit that is finished as done, and remember its keys."""
        self._document_keys.update(document_keys_of(self._config.out, index, unit))
        for partition in unit.partitions:
            self._row_keys.update(_row_keys(read_partition(self._config.out, partition)))
        self._num_partitions += len(unit.partitions)
        self._progress.recall(unit.statistics["input_bytes"])

    def do(self, index: int, files: Sequence[InputFile]) -> FinishedUnit:
        """Read, pack and write one unit, and commit it."""
        config = self._config
        bad_lines = BadLines(config.skip_bad_lines, self._reporter)
        encoder = DocumentEncoder(
            config, self._tokenizer, bad_lines, self._reporter, self._advance_inside, self._dropped
        )
        packer: Packer = PACKINGS[config.packing](config.sequence_length)
        counts: Counter[str] = Counter(duplicate_documents=0, documents=0, duplicate_sequences=0)
        partitions: list[CorpusPartition] = []
        keys: list[bytes] = []

        def rows(records: Iterator[Record]) -> Iterator[TokenSequence]:
            for document in encoder.encode(records):
                if self._is_new_document(document, keys, counts) and not is_overlong(document, config, counts):
                    yield from packer.add(document)
            yield from packer.flush()

        with closing(self._records(files, bad_lines)) as records:  # its file, too, whatever ends the unit
            for sequences in self._partitions(rows(records), counts):
                partitions.append(write_partition(config.out, self._num_partitions, sequences))
                self._num_partitions += 1
        self._progress.advance(0, self._note())
        _check_unchanged(files)
        if bad_lines.count:
            self._reporter.note(f"skipped {bad_lines.count:,} records of {files[0].path} to {files[-1].path}")
        statistics = {
            "files": len(files),
            "input_bytes": sum(file.size for file in files),
            "bad_lines": bad_lines.count,
            **encoder.counts,
            **counts,
            **packer.counts,
        }
        if config.quality or config.near_duplicates is not None:
            write_rejected(config.out, index, encoder.rejected)
        return commit(config.out, index, files, partitions, statistics, b"".join(keys))

    def _records(self, files: Sequence[InputFile], bad_lines: BadLines) -> Generator[Record, None, None]:
        for file in files:
            said = 0
            with closing(read_records(file, self._config.text_field, bad_lines)) as records:
                for record in records:
                    self._unsaid = record.offset - said
                    yield record
                    if record.offset - said >= PROGRESS_BYTES:
                        self._progress.advance(self._unsaid - self._inside, self._note())
                        said, self._inside = record.offset, 0
            self._progress.advance(file.size - said - self._inside, self._note())
            self._unsaid = self._inside = 0

    def _advance_inside(self, share: float) -> None:
        """Count the bytes of the record in hand as done as far as its long text is tokenised."""
        done = int(self._unsaid * share)
        self._progress.advance(max(done - self._inside, 0), self._note())
        self._inside = max(done, self._inside)

    def _note(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._documents:,} documents, {self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"

    def _is_new_document(self, document: Document, keys: list[bytes], counts: Counter[str]) -> bool:
        key = document.key
        if key in self._document_keys:
            counts["duplicate_documents"] += 1
            return False
        self._document_keys.add(key)
        keys.append(key)
        counts["documents"] += 1
        self._documents += 1
        self._tokens += len(document.token_ids)
        return True

    def _partitions(self, rows: Iterator[TokenSequence], counts: Counter[str]) -> Iterator[list[TokenSequence]]:
        sequences: list[TokenSequence] = []
        tokens = 0
        for row in rows:
            if row.key in self._row_keys:
                counts["duplicate_sequences"] += 1
                continue
            self._row_keys.add(row.key)
            if sequences and tokens + len(row.token_ids) > self._config.partition_tokens:
                yield sequences
                sequences, tokens = [], 0
            sequences.append(row)
            tokens += len(row.token_ids)
        if sequences:
            yield sequences


def _near_duplicates(
    config: PrepareConfig, tokenizer: Any, files: Sequence[InputFile], reporter: Reporter
) -> set[bytes]:
    """Keys of the texts to drop, from a pass of its own over all inputs; nothing unless it is asked for."""
    if config.near_duplicates is None:
        return set()
    bad_lines = BadLines(True, KeptLines())  # they are named when they are read again

    def texts() -> Iterator[str]:
        with reporter.progress("near duplicates", sum(file.size for file in files), "bytes") as progress:
            for file in files:
                for record in read_records(file, config.text_field, bad_lines):
                    with contextlib.suppress(Refused, Undesirable):
                        content = content_of(record.fields, config.text_field, bool(tokenizer.chat_template))
                        if isinstance(content, str):
                            yield content
                progress.advance(file.size)

    return near_duplicates(texts(), config.near_duplicates, rules_of(config.quality))


def _compared_settings(config: PrepareConfig, tokenizer: Any, identity: TokenizerIdentity) -> dict[str, Any]:
    """What decides the tokens, other than the inputs; `skip_bad_lines` does so only where a record was skipped."""
    template = tokenizer.chat_template
    return {
        "sequence_length": config.sequence_length,
        "text_field": config.text_field,
        "packing": config.packing,
        "overlong": config.overlong,
        "last_turn_only": config.last_turn_only,
        "partition_tokens": config.partition_tokens,
        "quality": list(rules_of(config.quality)) or None,  # none in what earlier versions made
        "near_duplicates": config.near_duplicates,
        **{f"tokenizer_{name}": value for name, value in identity.to_dict().items()},
        "tokenizer_special_ids": list(tokenizer("", verbose=False)["input_ids"]),
        "tokenizer_eos_id": tokenizer.eos_token_id,
        "chat_template": None if template is None else xxhash.xxh3_128_hexdigest(repr(template).encode()),
    }


def _end_token_ids(tokenizer: Any, statistics: Counter[str]) -> list[int]:
    """The tokens that the documents' labels end with: where a student is to stop."""
    tokens = [name.removeprefix(ENDED_BY) for name in statistics if name.startswith(ENDED_BY)]
    return sorted(tokenizer.convert_tokens_to_ids(tokens))


def _finished(
    config: PrepareConfig, settings: dict[str, Any], inputs: InputFiles, reporter: Reporter
) -> CorpusManifest | None:
    """The manifest in `out`, if there is one; raises ConfigError if it is not of this run."""
    if not (config.out / MANIFEST).is_file():
        return None
    manifest = CorpusManifest.read(config.out)
    check_same(config.out, manifest.settings, settings)
    if manifest.statistics.get("bad_lines") and not config.skip_bad_lines:
        check_same(config.out, manifest.settings, {"skip_bad_lines": False})
    where, kind = f"{config.out / MANIFEST}: settings", list[tuple[str, int, int]]
    found = entry_of(manifest.settings, "input_files", kind, [], where, CorpusError)
    wanted = [file.identity for file in inputs.files]
    if not same_files(inputs.files, found):
        changed = [identity for identity in [*wanted, *found] if identity not in found or identity not in wanted]
        name = printable(changed[0][0]) if changed else "their order"
        raise ConfigError(
            f"{config.out}: was made from {len(found)} input files, this run has {len(wanted)}, and {name} differs "
            "(path, size or time of change); choose another --out, or delete this folder."
        )
    remove_units(config.out)
    if config.rejected is not None and not config.rejected.is_file():
        reporter.note(f"{config.rejected}: cannot be listed again for a finished corpus; delete {config.out} to do so.")
    reporter.log(f"{config.out}: already finished by the same settings and inputs; {_summary(manifest)}")
    return manifest


def _save_tokenizer(tokenizer: Any, config: PrepareConfig) -> None:
    folder = config.out / TOKENIZER
    with replacing(folder) as partial:
        save_tokenizer(tokenizer, partial, trust_remote_code=config.trust_remote_code)
        shutil.rmtree(folder, ignore_errors=True)


def _row_keys(table: pa.Table) -> list[bytes]:
    return table.column("key").to_pylist()


def _check_unchanged(files: Sequence[InputFile]) -> None:
    for file in files:
        if not file.path.is_file() or describe(file.path, file.name) != file:
            raise CorpusError(
                f"{file.path}: changed while it was read; run `pipeline prepare` again once it is complete."
            )


def _summary(manifest: CorpusManifest) -> str:
    return (
        f"{manifest.num_sequences:,} sequences, {manifest.num_tokens:,} tokens, {manifest.num_targets:,} targets "
        f"from {_counts(manifest)}."
    )


def _counts(manifest: CorpusManifest) -> str:
    return ", ".join(f"{count:,} {spoken(name)}" for name, count in manifest.statistics.items() if count)
