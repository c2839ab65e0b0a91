"""English, Chinese and code that a Debian or Python machine has, as passages; held out by document.

    code      the standard library's modules
    english   the language reference (pydoc), READMEs of the installed Python packages, texts in /usr/share/doc
    chinese   message catalogues (/usr/share/locale/zh_*), this repository's sample

One passage of a file, begun at a line that a hash of the file's name decides: a small corpus then has many documents.
A machine without catalogues (a slim container) has little Chinese; the counts that are returned say how much.
"""

import gzip
import hashlib
import os
import struct
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.demo.text import HELD_OUT, TRAIN, collect_text, read_documents, write_documents

PASSAGE_CHARACTERS = 1000
SHORTEST_PASSAGE = 200
HELD_OUT_SHARE = 0.15
CATALOGUES = Path("/usr/share/locale")
DOCUMENTATION = Path("/usr/share/doc")
SAMPLES = Path(__file__).parents[2] / "data" / "samples"
MO_MAGIC = 0x950412DE


class Source(NamedTuple):
    """A text of this machine."""

    name: str
    group: str
    """What must not be on both sides of the split: a package with all its languages and files."""
    text: str


Kinds = dict[str, Callable[[Path], Iterable[Source]]]
"""Sources by kind, of a folder to keep what was collected."""


def collect_passages(
    out: Path, tokenizer: Any, num_train: int, num_held_out: int, kinds: Kinds | None = None
) -> dict[str, dict[str, int]]:
    """Write train.jsonl and heldout.jsonl; tokens of either, by kind.

    Each kind gets a third of the tokens that are asked for, or what there is; its last passage is cut at a line.
    """
    kinds = kinds or KINDS
    counts: dict[str, dict[str, int]] = {TRAIN: {}, HELD_OUT: {}}
    documents: dict[str, list[dict[str, str]]] = {TRAIN: [], HELD_OUT: []}
    seen: set[str] = set()
    for kind, sources in kinds.items():
        budgets = {TRAIN: num_train // len(kinds), HELD_OUT: num_held_out // len(kinds)}
        counts[TRAIN][kind] = counts[HELD_OUT][kind] = 0
        for source in sorted(sources(out), key=lambda source: _hash(source.name)):
            side = HELD_OUT if _hash(source.group) < HELD_OUT_SHARE * 2**64 else TRAIN
            passage = _passage(source)
            if budgets[side] <= 0 or len(passage) < SHORTEST_PASSAGE or passage in seen:
                continue
            seen.add(passage)
            whole, num_tokens = passage, _count(passage, tokenizer)
            if num_tokens > budgets[side]:
                passage, num_tokens = _cut(passage, budgets[side], tokenizer)
            budgets[side] = budgets[side] - num_tokens if passage == whole else 0
            counts[side][kind] += num_tokens
            documents[side].append({"text": passage, "source": source.name, "kind": kind})
    for side, lines in documents.items():
        write_documents(out / side, [line for line in lines if line["text"]])
    return counts


def _cut(passage: str, budget: int, tokenizer: Any) -> tuple[str, int]:
    """As many whole lines as have no more tokens than are left, and their tokens."""
    lines = passage.splitlines(keepends=True)
    while lines and (num_tokens := _count("".join(lines), tokenizer)) > budget:
        lines.pop()
    return ("".join(lines), num_tokens) if lines else ("", 0)


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _passage(source: Source) -> str:
    lines = source.text.splitlines(keepends=True)
    room = max(1, len(source.text) - PASSAGE_CHARACTERS)
    start, passed = _hash(source.name) % room, 0
    for first, line in enumerate(lines):
        if passed >= start:
            return "".join(lines[first:])[:PASSAGE_CHARACTERS]
        passed += len(line)
    return ""


def _code(work: Path) -> Iterator[Source]:
    return (source for source in _standard_library(work) if source.name.endswith(".py"))


def _english(work: Path) -> Iterator[Source]:
    yield from (source for source in _standard_library(work) if not source.name.endswith(".py"))
    for path in sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info/METADATA")):
        text = _read(path)
        description = text.partition("\n\n")[2]  # behind the headers, as in a letter
        yield Source(path.parent.name, _package(path.parent.name.partition("-")[0]), description)
    for path in sorted(DOCUMENTATION.glob("*/*")):
        name = path.name.removesuffix(".gz")
        if name.endswith((".txt", ".md", ".rst")) or name.startswith("README"):
            yield Source(f"{path.parent.name}/{path.name}", _package(path.parent.name), _read(path))


def _chinese(work: Path) -> Iterator[Source]:
    yield Source("samples/chinese.txt", "samples", _read(SAMPLES / "chinese.txt"))
    for path in sorted(CATALOGUES.glob("zh_*/LC_MESSAGES/*.mo")):
        if not path.name.startswith("iso_"):  # lists of names
            language = path.parent.parent.name
            yield Source(f"{language}/{path.name}", _package(path.stem), "\n".join(_messages(path.read_bytes())))


def _standard_library(work: Path) -> Iterator[Source]:
    """As `pipeline demo` collects it; the split is our own."""
    folder = work / "stdlib"
    if not (folder / TRAIN).is_file():
        collect_text(folder)
    for side in (TRAIN, HELD_OUT):
        for document in read_documents(folder / side):
            yield Source(document["source"], document["source"], document["text"])


def _messages(data: bytes) -> Iterator[str]:
    """Translations in a GNU message catalogue, in its order; none of what is not in UTF-8.

    The standard library's gettext keeps them to itself.
    """
    for order in "<", ">":
        magic, _, number, _, offset = struct.unpack_from(f"{order}5I", data)
        if magic == MO_MAGIC:
            break
    else:
        return
    for index in range(1, number):  # the first is the catalogue's header
        length, start = struct.unpack_from(f"{order}2I", data, offset + 8 * index)
        try:
            yield data[start : start + length].decode().replace("\0", "\n")
        except UnicodeDecodeError:
            return


def _read(path: Path) -> str:
    """The text of a file; empty if it is none, or cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, UnicodeDecodeError, EOFError):
        return ""


def _package(name: str) -> str:
    """What a package's name begins with, so that git-doc and git, or python3.11 and python3-apt, are one group."""
    return os.path.splitext(name)[0].replace("_", "-").partition("-")[0].rstrip("0123456789.").lower()


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


KINDS: Kinds = {"english": _english, "chinese": _chinese, "code": _code}
