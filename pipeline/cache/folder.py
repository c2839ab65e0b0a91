"""The folder of a cache: it comes into being in one step, with its manifest and its tokenizer."""

import shutil
import tempfile
from pathlib import Path

from pipeline.cache.commits import COMMITS, SHARDS
from pipeline.cache.manifest import MANIFEST, TOKENIZER, CacheManifest
from pipeline.errors import CacheMismatchError
from pipeline.files import remove_partials, remove_tree, replacing
from pipeline.runs.events import EVENTS
from pipeline.runs.failures import FAILURES
from pipeline.runs.leases import LEASES
from pipeline.runs.presence import WORKERS
from pipeline.stores.copies import local_folder
from pipeline.stores.objects import Location, ObjectPath

PLACES = (SHARDS, COMMITS, LEASES, FAILURES, WORKERS, EVENTS)
"""Folders of a run."""


def open_folder(folder: Location, manifest: CacheManifest, tokenizer: Location) -> None:
    """Make the cache's folder, or check that it holds this very cache; raises CacheError.

    `tokenizer` is copied into it, again if `pipeline verify --repair` has dropped the copy.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = local_folder(tokenizer, Path(scratch) / TOKENIZER)
        if isinstance(folder, ObjectPath):
            _open_prefix(folder, manifest, source)
        else:
            _open_folder(folder, manifest, source)


def make_places(folder: Location) -> None:
    """Make the folders of a run; an object store needs none."""
    if isinstance(folder, Path):
        for name in PLACES:
            (folder / name).mkdir(exist_ok=True)


def _open_prefix(folder: ObjectPath, manifest: CacheManifest, tokenizer: Path) -> None:
    """In an object store the manifest comes last, and nothing is written before it but the tokenizer."""
    if not (folder / MANIFEST).is_file():
        if foreign := {path.name for path in folder.iterdir()} - {TOKENIZER}:
            raise CacheMismatchError(f"{folder}: holds no cache but {min(foreign)}; choose another --out or empty it.")
        _upload(tokenizer, folder / TOKENIZER)
        manifest.write(folder)
    CacheManifest.read(folder).require_equal(manifest, folder)
    if not (folder / TOKENIZER).is_dir():
        _upload(tokenizer, folder / TOKENIZER)


def _upload(source: Path, target: ObjectPath) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def _open_folder(folder: Path, manifest: CacheManifest, tokenizer: Path) -> None:
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / MANIFEST).is_file():  # in this order: another process may just have made it
        raise CacheMismatchError(f"{folder}: exists and holds no cache; choose another --out or empty it.")
    if is_free:
        _create(folder, manifest, tokenizer)
    CacheManifest.read(folder).require_equal(manifest, folder)
    if not (folder / TOKENIZER).is_dir():
        _restore(tokenizer, folder / TOKENIZER)


def _create(folder: Path, manifest: CacheManifest, tokenizer: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(folder.parent, folder.name)
    try:
        with replacing(folder) as partial:
            remove_tree(partial)
            partial.mkdir()
            make_places(partial)
            _copy(tokenizer, partial / TOKENIZER)
            manifest.write(partial)
    except OSError:
        if not (folder / MANIFEST).is_file():  # no other process has made it meanwhile
            raise


def _restore(source: Path, final: Path) -> None:
    try:
        with replacing(final) as partial:
            _copy(source, partial)
    except OSError:
        if not final.is_dir():  # no other process has put it back meanwhile
            raise


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder; an error is the system's, where that of shutil is a list of them."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        copy.mkdir(exist_ok=True) if path.is_dir() else shutil.copyfile(path, copy)
