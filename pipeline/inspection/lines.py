"""What `pipeline inspect` writes to a terminal."""

import math
import unicodedata
from collections.abc import Iterator, Mapping

from pipeline.cache.measures import Largest
from pipeline.cache.reader import ReadableCache
from pipeline.documents import printable
from pipeline.formats.layout import CachedSequence
from pipeline.inspection.figures import FEWEST, WAYS, Figures
from pipeline.inspection.summary import Summary
from pipeline.inspection.tokens import Said, Token, document_means, tokens_of
from pipeline.spelling import Speller

NAME_WIDTH, TOKEN_WIDTH = 12, 18
MASKED_WIDTH = 80
"""Columns of the text of tokens without a target, which come in one line."""
BEFORE = 12
"""Tokens that are shown before one that is named among the worst."""
OPENING = 16
"""Tokens that are shown of a document."""
UNITS = {"surprises": "nats", "entropies": "nats of entropy", "tail_masses": "outside the entries"}


def summary_lines(summary: Summary) -> Iterator[str]:
    """The cache in ten seconds."""
    yield printable(str(summary.cache.place))
    for name, text in summary.rows():
        yield f"  {name:<{NAME_WIDTH}}{printable(text)}"


def parts_line(parts: Mapping[str, float]) -> str:
    """What the bytes of a target go to."""
    return f"  {'of a target':<{NAME_WIDTH}}{', '.join(f'{part} {size:.1f}' for part, size in parts.items())} bytes"


def sequence_lines(
    cache: ReadableCache, number: int, speller: Speller, temperature: float, entries: int, longest: int
) -> Iterator[str]:
    """One sequence, a line a target."""
    sequence = cache[number]
    yield (
        f"sequence {number} of {len(cache):,}, key {sequence.key.hex()}, shard {cache.partition_of(number)}: "
        f"{len(sequence.token_ids):,} tokens, {int(sequence.loss_mask.sum()):,} labels, "
        f"{len(sequence.document_lengths):,} documents; T = {temperature:g}"
    )
    tokens = tokens_of(sequence, speller, temperature, entries, longest)
    yield _columns("", "token", "label", "rank", "entropy", "tail", "the teacher's own choice")
    means = document_means(sequence, temperature)
    masked: list[Token] = []
    for token in tokens:
        if masked and (token.begins or token.said is not None):
            yield _masked_line(masked)
            masked = []
        if token.begins:
            yield _document_line(token.document, *means[token.document])
        if token.said is not None:
            yield _token_line(token, token.said)
        elif token.is_label:
            yield f"{token.position:>6}  {quoted(token.text)} begins the sequence: nothing predicts it"
        else:
            masked.append(token)
    if masked:
        yield _masked_line(masked)
    if len(tokens) < len(sequence.token_ids):
        yield f"... {len(sequence.token_ids) - len(tokens):,} more tokens; --longest shows more"


def worst_lines(cache: ReadableCache, figures: Figures, speller: Speller) -> Iterator[str]:
    """Positions and documents of the sample, the worst first."""
    for way, worst in figures.worst_positions.items():
        name = WAYS[way]
        yield f"-- positions: {name}"
        yield from _position_lines(cache, worst, speller, UNITS[way])
        if len(figures.worst_documents[way].values):
            yield f"-- documents of {FEWEST} targets or more: {name} in the mean"
            yield from _document_lines(cache, figures.worst_documents[way], speller, UNITS[way])


def quoted(text: str) -> str:
    """Text of a token, so that its spaces show and a terminal is left in peace."""
    return f"'{printable(text)}'"


def _position_lines(cache: ReadableCache, worst: Largest, speller: Speller, unit: str) -> Iterator[str]:
    for value, (number, position) in zip(worst.values.tolist(), worst.places.tolist()):
        before, label, choice = context(cache[number], position, speller)
        instead = f", teacher {quoted(choice)}" if choice else ""
        yield f"{value:9.4f} {unit}  {number}:{position}  {quoted(before)} -> {quoted(label)}{instead}"


def _document_lines(cache: ReadableCache, worst: Largest, speller: Speller, unit: str) -> Iterator[str]:
    for value, (number, document) in zip(worst.values.tolist(), worst.places.tolist()):
        start, length, text = opening(cache[number], document, speller)
        yield f"{value:9.4f} {unit}  {number}:{start}  document {document + 1}, {length:,} tokens  {quoted(text)}"


def context(sequence: CachedSequence, position: int, speller: Speller) -> tuple[str, str, str]:
    """What stands before a label, the label, and the teacher's first choice, empty if no entries are kept."""
    ends = sequence.document_lengths.cumsum()
    start = max(int(ends[ends <= position].max(initial=0)), position - BEFORE)
    texts = speller.row(sequence.token_ids[start : position + 1].tolist())
    row = int(sequence.target_positions.searchsorted(position - 1))
    ids = sequence.targets.ids[row]
    return "".join(texts[:-1]), texts[-1], speller.token(int(ids[0])) if len(ids) else ""


def opening(sequence: CachedSequence, document: int, speller: Speller) -> tuple[int, int, str]:
    """Where a document begins in its sequence, how many tokens it has, and its first ones."""
    start = int(sequence.document_lengths[:document].sum())
    length = int(sequence.document_lengths[document])
    return start, length, "".join(speller.row(sequence.token_ids[start : start + min(length, OPENING)].tolist()))


def _columns(position: str, token: str, label: str, rank: str, entropy: str, tail: str, choices: str) -> str:
    padding = " " * max(0, TOKEN_WIDTH - _width(token))
    return f"{position:>6}  {token}{padding} {label:>8} {rank:>4} {entropy:>8} {tail:>7}  {choices}".rstrip()


def _token_line(token: Token, said: Said) -> str:
    choices = [f"{quoted(text)} {prob:.3f}" for _, text, prob in said.alternatives]
    if not choices:  # a cache of draws alone
        choices = [f"{quoted(text)} drawn {count}x" for _, text, count in said.draws]
    return _columns(
        str(token.position),
        quoted(token.text),
        f"{said.label_prob:.2g}" if said.label_prob < 1e-3 else f"{said.label_prob:.3f}",
        str(said.rank or "-"),
        f"{said.entropy:.3f}",
        f"{said.tail_mass:.3f}",
        "  ".join(choices),
    )


def _masked_line(tokens: list[Token]) -> str:
    first, last = tokens[0], tokens[-1]
    text = printable("".join(token.text for token in tokens))
    shown = text if len(text) <= MASKED_WIDTH else f"{text[: MASKED_WIDTH - 3]}..."
    places = f"{first.position}" if first is last else f"{first.position}-{last.position}"
    return f"{places:>6}  masked: '{shown}'"


def _document_line(document: int, num_tokens: int, num_targets: int, mean: float) -> str:
    said = "no targets" if math.isnan(mean) else f"{num_targets:,} targets, {mean:.3f} nats a label"
    return f"-- document {document + 1}: {num_tokens:,} tokens, {said}"


def _width(text: str) -> int:
    """Columns that a terminal takes for it."""
    return sum(
        2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text if not unicodedata.combining(each)
    )
