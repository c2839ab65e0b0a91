"""The folder of a cache: it comes into being in one step, with its manifest and its tokenizer."""

import os
import shutil
from pathlib import Path

from pipeline.errors import CacheMismatchError
from pipeline.files import partial_path, publish, sync_folder
from pipeline.manifest import MANIFEST, TOKENIZER, CacheManifest
from pipeline.runs.commits import COMMITS, SHARDS
from pipeline.runs.failures import FAILURES
from pipeline.runs.leases import LEASES
from pipeline.runs.presence import WORKERS


def open_folder(folder: Path, manifest: CacheManifest, tokenizer: Path) -> None:
    """Make the cache's folder, or check that it holds this very cache; raises CacheError.

    `tokenizer` is copied into it, again if `pipeline verify --repair` has dropped the copy.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CacheMismatchError(f"{folder}: exists and holds no cache; choose another --out or empty it.")
    if not (folder / MANIFEST).is_file():
        _create(folder, manifest, tokenizer)
    CacheManifest.read(folder).require_equal(manifest, folder)
    if not (folder / TOKENIZER).is_dir():
        _restore(tokenizer, folder / TOKENIZER)


def _create(folder: Path, manifest: CacheManifest, tokenizer: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    for name in (SHARDS, COMMITS, LEASES, FAILURES, WORKERS):
        (partial / name).mkdir(parents=True)
    shutil.copytree(tokenizer, partial / TOKENIZER)
    manifest.write(partial)
    try:
        os.rename(partial, folder)
        sync_folder(folder.parent)
    except OSError:
        shutil.rmtree(partial)
        if not (folder / MANIFEST).is_file():  # no other process has made it meanwhile
            raise


def _restore(source: Path, final: Path) -> None:
    partial = partial_path(final)
    shutil.copytree(source, partial, dirs_exist_ok=True)
    try:
        publish(partial, final)
    except OSError:
        shutil.rmtree(partial)
        if not final.is_dir():  # no other process has put it back meanwhile
            raise
