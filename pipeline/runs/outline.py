"""What a run consists of, for who looks at it from outside: the capture of a cache, or the preparation of a corpus.

A capture's outline follows from the manifest of its cache. A preparation writes its own, units/outline.json, and is
finished when the corpus has its manifest.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cache.commits import commit_path, read_commit
from pipeline.cache.manifest import MANIFEST, CacheManifest
from pipeline.corpus import MANIFEST as CORPUS_MANIFEST
from pipeline.corpus import CorpusManifest
from pipeline.documents import Count, Text, document_of
from pipeline.errors import CorpusError
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_document, read_json, write_json
from pipeline.stores.store import Store

UNITS = "units"
"""The folder of a corpus in which its preparation is a run."""
OUTLINE = "outline.json"


@dataclass(frozen=True, kw_only=True)
class WrittenOutline:
    """The outline of a run that has no manifest."""

    total: Count
    unit: Text
    """Of what is counted towards the total."""
    phases: dict[Text, tuple[Count, Count]]
    """First task and the one behind the last, in the order in which they are done."""

    def write(self, folder: Store) -> None:
        """Leave it in the folder of the run."""
        write_json(folder / OUTLINE, asdict(self))


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What the record of a task says for who counts."""

    done: Count = 0
    """Of the run's total."""
    bytes: Count = 0
    """That were written."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A run as `pipeline status` sees it."""

    folder: Store
    """Where its commits and leases are."""
    began: Store
    """The file that was written when it began."""
    planned: frozenset[int]
    total: int
    unit: str
    tasks: str
    """What its tasks are called."""
    amounts: Callable[[int], Amounts | None]
    """Of a task that is done; None if its record is gone."""
    settings: dict[str, Any] = field(default_factory=dict)
    phases: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    is_finished: bool = False
    """Nothing is left of the run but what it has made."""


def outline_of(place: str | Path | Store) -> Outline:
    """The run at a cache or a corpus; raises CacheError or CorpusError."""
    folder = store_of(place)
    if not (folder / MANIFEST).is_file():
        if (folder / UNITS / OUTLINE).is_file():
            return _of_units(folder / UNITS)
        if (folder / CORPUS_MANIFEST).is_file():
            return _of_corpus(folder)
    manifest = CacheManifest.read(folder)

    def amounts(partition: int) -> Amounts | None:
        commit = read_commit(folder, partition)
        return None if commit is None else Amounts(done=commit.num_tokens, bytes=commit.bytes)

    return Outline(
        folder=folder,
        began=folder / MANIFEST,
        planned=frozenset(range(manifest.num_partitions)),
        total=manifest.num_tokens,
        unit="tokens",
        tasks="partitions",
        amounts=amounts,
        settings=manifest.settings,
    )


def _of_units(folder: Store) -> Outline:
    written = read_document(folder / OUTLINE, WrittenOutline, CorpusError)

    def amounts(task: int) -> Amounts | None:
        path = commit_path(folder, task)
        with contextlib.suppress(FileNotFoundError):
            return document_of(Amounts, read_json(path, CorpusError), path, CorpusError, newer=True)
        return None

    return Outline(
        folder=folder,
        began=folder / OUTLINE,
        planned=frozenset(task for first, stop in written.phases.values() for task in range(first, stop)),
        total=written.total,
        unit=written.unit,
        tasks="tasks",
        amounts=amounts,
        phases=written.phases,
    )


def _of_corpus(folder: Store) -> Outline:
    manifest = CorpusManifest.read(folder)
    return Outline(
        folder=folder,
        began=folder / CORPUS_MANIFEST,
        planned=frozenset(),
        total=manifest.num_tokens,
        unit="tokens",
        tasks="tasks",
        amounts=lambda task: None,
        is_finished=True,
    )
