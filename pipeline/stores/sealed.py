"""JSON documents that carry a checksum of themselves, in any store: manifests, commit records, marks."""

import json
from pathlib import Path
from typing import Any

import xxhash

from pipeline.documents import Kind, Refusal, document_of, parse_json
from pipeline.stores.places import store_of
from pipeline.stores.store import Store

LARGEST_DOCUMENT = 64 << 20
"""Bytes; more are not even read."""


def write_json(path: Path | Store, document: dict[str, Any], *, first_wins: bool = False) -> bool:
    """Write `document` with a checksum of itself, atomically; False if `first_wins` and the name was taken."""
    body = json.dumps(document, indent=1, ensure_ascii=False).encode()
    contents = body.removesuffix(b"\n}") + _seal(body)
    store = store_of(path)
    if first_wins:
        return store.create(contents) is not None
    store.write(contents)
    return True


def read_json(path: Path | Store, error: Refusal, at_most: int = LARGEST_DOCUMENT) -> dict[str, Any]:
    """The document that `write_json` wrote, less its checksum; raises `error(message)` if a byte has changed."""
    contents = read_small(path, error, at_most)
    head, mark, _ = contents.rpartition(_MARK)
    body = head + b"\n}"
    if not mark or contents != head + _seal(body):
        raise error(
            f"{path}: its checksum does not match its contents; the file is damaged, foreign or edited by hand."
        )
    return parse_json(body, path, error)


def read_document(path: Path | Store, kind: type[Kind], error: Refusal) -> Kind:
    """The document of a class that `write_json` wrote, every entry checked; raises `error(message)`."""
    return document_of(kind, read_json(path, error), path, error)


def read_small(path: Path | Store, error: Refusal, at_most: int = LARGEST_DOCUMENT) -> bytes:
    """The contents of a file that holds one document; raises `error(message)` if it is too large for that."""
    contents = store_of(path).read(at_most)
    if contents is None:
        raise error(f"{path}: not a plain file of {at_most:,} bytes or less, as a document of this pipeline is.")
    return contents


_MARK = b',\n "checksum": "'
"""Begins the last entry of a document: the hash of its bytes without that entry."""


def _seal(body: bytes) -> bytes:
    return _MARK + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n'
