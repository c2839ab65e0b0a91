"""A view: some sequences of a finished cache, and some of their documents, in one small file that copies no target.

    VIEW.json    a document with a checksum of itself, as manifests are

It names its sequences by their place in the cache and their keys, and the cache by a fingerprint of what is in it,
wherever it lies and in whichever container. Whoever opens it has a cache of those sequences: `reader.CacheView`.

Shape suffixes: S sequences, D documents of these sequences.
"""

import base64
import dataclasses
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from pipeline.cache.manifest import CacheManifest
from pipeline.documents import Count, Hash, Text, document_of, short
from pipeline.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError
from pipeline.files import canonical_json
from pipeline.stores.sealed import read_json, write_json
from pipeline.stores.store import Store

FORMAT, FORMAT_VERSION = "sparse-target-view", 1
LARGEST_VIEW = 1 << 30
"""Bytes: some 30 million sequences."""
HOW_IT_IS_KEPT = ("container", "partitions")
"""Entries of a cache's identity that do not change which sequences it has, nor their order."""


def fingerprint(manifest: CacheManifest) -> str:
    """xxh3-128 of what decides the sequences of a cache, their order and their targets."""
    entries = {name: value for name, value in manifest.identity().items() if name not in HOW_IT_IS_KEPT}
    return xxhash.xxh3_128_hexdigest(canonical_json(entries))


@dataclass(frozen=True, kw_only=True)
class ViewFile:
    """What the file of a view holds; arrays are little-endian bytes in base64."""

    cache: Text
    """Folder or URL of the cache; relative to the view's folder if it lies below that."""
    fingerprint: Hash
    """Of the cache."""
    rule: dict[str, Any]
    """How the sequences were selected."""
    num_sequences: Count
    num_tokens: Count
    num_documents: Count
    """In these sequences, selected or not."""
    num_targets: Count
    """That are selected."""
    rows: str
    """uint32 [S]: rising numbers of the sequences in the cache."""
    keys: str
    """uint8 [S, 16]: their keys in the cache."""
    document_counts: str | None
    """uint32 [S]: how many documents each of them has; None if all documents are selected."""
    documents: str | None
    """A bit for each of these documents: whether it is selected."""


def described(rule: dict[str, Any]) -> str:
    """The rule of a view, for a person: what it says."""
    return ", ".join(
        f"{name} {short(value, quoted=False)}" for name, value in rule.items() if value not in (None, [], "")
    )


@dataclass(frozen=True)
class Selected:
    """The sequences of a view."""

    rows: np.ndarray
    """int64 [S]"""
    keys: np.ndarray
    """uint8 [S, 16]"""
    starts: np.ndarray | None
    """int64 [S + 1]: where the documents of every sequence begin in `documents`."""
    documents: np.ndarray | None
    """bool [D]"""

    @classmethod
    def of(cls, view: ViewFile, num_rows: int) -> "Selected":
        """Raises ValueError if arrays of a view do not fit each other, or a cache of so many sequences."""
        rows = _array(view.rows, "<u4").astype(np.int64)
        keys = _array(view.keys, np.uint8)
        rises = len(rows) > 0 and bool((np.diff(rows) > 0).all()) and int(rows[-1]) < num_rows
        if not rises or len(rows) != view.num_sequences or len(keys) != 16 * len(rows):
            raise ValueError("its sequences are not numbers of the cache that rise, each with a key")
        if view.documents is None or view.document_counts is None:
            return cls(rows, keys.reshape(-1, 16), None, None)
        starts = np.concatenate([[0], np.cumsum(_array(view.document_counts, "<u4"), dtype=np.int64)])
        bits = _array(view.documents, np.uint8)
        if len(starts) != len(rows) + 1 or len(bits) != -(-int(starts[-1]) // 8) or starts[-1] != view.num_documents:
            raise ValueError("its documents do not fit its sequences")
        return cls(rows, keys.reshape(-1, 16), starts, np.unpackbits(bits, count=int(starts[-1])).astype(bool))

    def documents_of(self, index: int) -> np.ndarray | None:
        """bool [documents of the sequence]; None if all are selected."""
        if self.documents is None or self.starts is None:
            return None
        return self.documents[self.starts[index] : self.starts[index + 1]]


def _array(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)


def encoded(values: np.ndarray, dtype: Any) -> str:
    """An array in the form of a view's."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def write_view(place: Store, cache: Store, view: ViewFile) -> None:
    """Write the file, with the place of its cache as somebody who reads it finds it."""
    named = str(cache.absolute())
    if cache.path is not None and place.path is not None:
        beside = os.path.relpath(named, place.path.absolute().parent)
        named = named if beside.startswith(os.pardir) else beside
    document = asdict(dataclasses.replace(view, cache=named))
    write_json(place, {"format": FORMAT, "format_version": FORMAT_VERSION, **document})


def read_view(place: Store) -> ViewFile:
    """What the file of a view holds; raises CacheError."""
    if not place.is_file():
        raise CacheIncompleteError(f"{place}: no view there; `pipeline select` makes one.")
    document = read_json(place, CacheCorruptError, LARGEST_VIEW)
    found = (document.pop("format", None), document.pop("format_version", None))
    if found != (FORMAT, FORMAT_VERSION):
        raise CacheMismatchError(
            f"{place}: format {short(found)}; expected a view, {(FORMAT, FORMAT_VERSION)}, or the folder of a cache."
        )
    return document_of(ViewFile, document, place, CacheCorruptError)
