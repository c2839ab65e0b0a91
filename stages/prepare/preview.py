"""The first rows of a corpus, or of what `prepare` would make of inputs, as a person reads them. Writes nothing."""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.corpus import MANIFEST, TOKENIZER, Corpus, TokenSequence
from pipeline.documents import printable
from pipeline.errors import ConfigError
from pipeline.hub import located
from pipeline.progress import KeptLines, Reporter
from pipeline.spelling import units
from pipeline.tokenizer import load_tokenizer
from stages.prepare.documents import DocumentEncoder, is_overlong
from stages.prepare.inputs import InputFile, Piece, find_inputs
from stages.prepare.readers import BadLines, Record, read_records
from stages.prepare.settings import PACKINGS, PreviewConfig
from stages.prepare.tokens import spoken

SHADES = {True: ("\x1b[30;42m", "\x1b[30;102m"), False: ("\x1b[0m", "\x1b[2m")}
RESET = "\x1b[0m"
MEANINGS = {
    "spanning_tokens": "begin in a prompt and end in an answer; they are labels",
    "split_borders": "where an answer's end and what follows would have been one token",
    "doubled_starts": "the text had the tokenizer's start token itself",
    "doubled_ends": "the text had the tokenizer's end token itself",
    "appended_chat_ends": "the chat template ends no turn with a special token",
    "documents_without_end": "the last label is not an end token: nothing teaches to stop",
    "inserted_thoughts": "empty blocks of thinking by the chat template alone; no labels",
    "messages_not_written": "the chat template leaves their content out",
    "thoughts_not_written": "the chat template leaves the thinking out",
    "tools_not_written": "the chat template leaves `tools` out",
    "other_forms_ignored": "records with the fields of several forms; the first was read",
    "undesirable_completions": "`label` is false; left out",
    "overlong_chats_dropped": "longer than a sequence; see --overlong",
    "overlong_completions_dropped": "longer than a sequence; see --overlong",
    "truncated_chats": "without their oldest messages",
    "truncated_completions": "without the beginning of the prompt",
    "dropped_pieces": "nothing in them is a label",
    "cut_documents": "longer than a sequence; each piece is a document of its own",
    "bad_lines": "records that would stop `prepare`, or be left out with --skip-bad-lines",
}


def preview(config: PreviewConfig, color: bool) -> Iterator[str]:
    """Lines to print; raises ConfigError or CorpusError."""
    said = KeptLines()
    config = located(config, "tokenizer", said, with_weights=False)
    if len(config.inputs) == 1 and (config.inputs[0] / MANIFEST).is_file():
        folder = config.inputs[0]
        corpus = Corpus(folder)
        tokenizer = load_tokenizer(folder / TOKENIZER, trust_remote_code=config.trust_remote_code, note=said.note)
        rows, counts = list(corpus.rows(0, min(config.rows, len(corpus)))), corpus.manifest.statistics
        yield f"{folder}: the first {len(rows)} of {len(corpus):,} rows"
    else:
        tokenizer = load_tokenizer(_tokenizer_of(config), trust_remote_code=config.trust_remote_code, note=said.note)
        rows, counts = _first_rows(config, tokenizer, said)
        yield f"{', '.join(map(str, config.inputs))}: {len(rows)} rows of the first {counts['records']:,} records"
    for number, row in enumerate(rows, start=1):
        yield ""
        yield from _row_lines(config, tokenizer, row, number, color)
    yield ""
    yield from said.lines
    yield from count_lines(counts)


def marked(tokenizer: Any, row: TokenSequence, *, color: bool = False, borders: bool = False) -> str:
    """The text of tokens with the labels marked, and where the tokens begin if that is asked for."""
    parts = []
    before, shade = False, 0
    for text, stop in units(tokenizer, row.token_ids.tolist()):
        text, is_label = printable(text, newline="\n"), bool(row.loss_mask[stop - 1])
        if color:
            shade = 1 - shade if borders else 0
            parts.append(f"{SHADES[is_label][shade]}{text}{RESET}")
            continue
        opens, closes = ("«", "") if is_label and not before else ("", "»") if before and not is_label else ("", "")
        parts.append(f"{closes}{'·' if borders and parts else ''}{opens}{text}")
        before = is_label
    return "".join(parts) + ("»" if before else "")


def count_lines(counts: Mapping[str, int]) -> Iterator[str]:
    """What was met, dropped and changed, and why."""
    for name, count in counts.items():
        if count:
            yield f"{count:,} {printable(spoken(name))}" + (f": {MEANINGS[name]}" if name in MEANINGS else "")


def _tokenizer_of(config: PreviewConfig) -> Path:
    if config.tokenizer is None:
        raise ConfigError(f"{config.inputs[0]}: is no corpus; to see what it would become, name a --tokenizer.")
    return config.tokenizer


def _first_rows(config: PreviewConfig, tokenizer: Any, said: Reporter) -> tuple[list[TokenSequence], Counter[str]]:
    """The first rows that `prepare` would make, if it read no further than they need."""
    bad_lines = BadLines(True, said)
    encoder = DocumentEncoder(config, tokenizer, bad_lines, said)
    packer = PACKINGS[config.packing](config.sequence_length)
    inputs = find_inputs(config.inputs, None)
    if inputs.note:
        said.log(f"not read: {inputs.note}")
    rows: list[TokenSequence] = []
    counts: Counter[str] = Counter()
    keys: set[bytes] = set()
    tokens = 0
    with closing(_records(inputs.files, config, bad_lines)) as records:
        for document in encoder.encode(records):
            if document.key in keys:
                counts["duplicate_documents"] += 1
            elif not is_overlong(document, config, counts):
                rows += packer.add(document)
                tokens += len(document.token_ids)
            keys.add(document.key)
            if len(rows) >= config.rows or tokens >= 2 * config.rows * config.sequence_length:
                break
    rows += packer.flush()
    return rows[: config.rows], Counter(bad_lines=bad_lines.count) + encoder.counts + counts + packer.counts


def _records(files: Sequence[InputFile], config: PreviewConfig, bad_lines: BadLines) -> Generator[Record, None, None]:
    more_fields = () if config.source_field is None else (config.source_field,)
    for file in files:
        with closing(read_records(Piece.whole(file), config.text_field, bad_lines, more_fields)) as records:
            yield from records


def _row_lines(config: PreviewConfig, tokenizer: Any, row: TokenSequence, number: int, color: bool) -> Iterator[str]:
    lengths = row.document_lengths.tolist()
    labels = int(row.loss_mask.sum())
    yield f"== row {number}: {len(row.token_ids):,} tokens, {labels:,} labels, {len(lengths)} documents"
    start = 0
    for index, length in enumerate(lengths, start=1):
        stop = min(start + length, config.longest)
        piece = TokenSequence(
            token_ids=row.token_ids[start:stop],
            loss_mask=row.loss_mask[start:stop],
            document_lengths=np.array([stop - start], np.int32),
        )
        yield f"-- document {index}: {length:,} tokens, {int(row.loss_mask[start : start + length].sum()):,} labels"
        yield marked(tokenizer, piece, color=color, borders=config.borders)
        start += length
        if start > config.longest:
            yield f"... {len(row.token_ids) - stop:,} more tokens"
            return
