"""Text that every Python has: the standard library's own sources and documentation.

Documents are split by file into training and held-out text. Tests, tables of character sets
and generated files stay out: they are not installed everywhere, or are near copies of each
other, which would flatter a held-out figure. Knows nothing of tokens or models.
"""

import ast
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CorpusError
from pipeline.files import replacing

TRAIN = "train.jsonl"
HELD_OUT = "heldout.jsonl"
HELD_OUT_SHARE = 0.05
TOPICS = "pydoc_data/topics.py"
"""The language reference, as one dictionary of texts."""

_SUFFIXES = (".py", ".txt")
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib-dynload"}
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_MIN_CHARACTERS = 64


@dataclass(frozen=True, kw_only=True)
class TextSummary:
    """What `collect_text` found."""

    train_documents: int
    train_bytes: int
    held_out_documents: int
    held_out_bytes: int
    duplicates: int
    """Documents dropped because an earlier one has the same text."""
    not_utf8: int
    """Files skipped because they are not UTF-8."""


def collect_text(out: Path, root: Path | None = None) -> TextSummary:
    """Write train.jsonl and heldout.jsonl, each replaced in one step, from the running Python's standard library.

    One line a document: {"text", "source"}, in the order of the paths. The same installation
    gives the same bytes. `root` replaces the standard library's folder.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[bytes] = set()
    documents: dict[str, list[dict[str, str]]] = {TRAIN: [], HELD_OUT: []}
    duplicates = not_utf8 = 0
    for source, path in _files(root):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            not_utf8 += 1
            continue
        for document in _documents(source, text):
            digest = hashlib.sha256(document["text"].encode()).digest()
            if digest in seen:
                duplicates += 1
            else:
                seen.add(digest)
                documents[HELD_OUT if is_held_out(source) else TRAIN].append(document)
    if not documents[TRAIN] or not documents[HELD_OUT]:
        raise CorpusError(
            f"{root}: found {len(documents[TRAIN])} training and {len(documents[HELD_OUT])} held-out documents; "
            "expected a standard library with its sources. Run the demo with a Python that has them."
        )
    for name, lines in documents.items():
        write_documents(out / name, lines)
    return TextSummary(
        train_documents=len(documents[TRAIN]),
        train_bytes=_text_bytes(documents[TRAIN]),
        held_out_documents=len(documents[HELD_OUT]),
        held_out_bytes=_text_bytes(documents[HELD_OUT]),
        duplicates=duplicates,
        not_utf8=not_utf8,
    )


def sample_documents(source: Path, out: Path, num_bytes: int) -> int:
    """Write about `num_bytes` of the documents in `source`, drawn by a hash of their names; returns the bytes written.

    The last document is cut at the end of a line, so that the sample never exceeds `num_bytes`.
    """
    chosen: list[dict[str, str]] = []
    left = num_bytes
    for document in sorted(read_documents(source), key=lambda document: _hash(document["source"])):
        text = document["text"].encode()
        if len(text) > left:
            text = text[: text.rfind(b"\n", 0, left) + 1]
        if text:
            chosen.append({**document, "text": text.decode()})
            left -= len(text)
        if len(text) < len(document["text"].encode()):
            break
    write_documents(out, chosen)
    return num_bytes - left


def is_held_out(source: str) -> bool:
    """Whether the file at the relative path `source` is held out; documents of one file stay together."""
    return source != TOPICS and _hash(source) < HELD_OUT_SHARE * 2**64


def read_documents(path: Path) -> Iterator[dict[str, str]]:
    """The documents of a jsonl file, in order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_documents(path: Path, documents: Iterable[dict[str, str]]) -> None:
    """Write a jsonl file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """(relative path, path) of every file to read, sorted by the relative path."""
    found: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if _is_wanted(name)]
        for name in names:
            path = Path(folder, name)
            if name.endswith(_SUFFIXES) and _is_wanted(name) and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    yield from sorted(found.items())


def _is_wanted(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)


def _documents(source: str, text: str) -> Iterator[dict[str, str]]:
    pairs = _topics(source, text) if source == TOPICS else [(source, text)]
    for name, contents in pairs:
        if len(contents) >= _MIN_CHARACTERS:
            yield {"text": contents, "source": name}


def _topics(source: str, text: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every topic of the language reference, read without running the file."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, contents in sorted(ast.literal_eval(node.value).items()):
                yield f"{source}#{topic}", contents


def _text_bytes(documents: list[dict[str, str]]) -> int:
    return sum(len(document["text"].encode()) for document in documents)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
