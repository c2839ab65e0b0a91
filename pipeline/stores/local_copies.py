"""Copies on this machine of what lies in an object store: shards, in limited room."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.files import at_home
from pipeline.stores.patience import number_of_environment

COPIES, COPIES_GB = "LOGIT_CACHE_DIR", "LOGIT_CACHE_GB"
"""Environment variables: the folder for local copies of shards, and how much it may hold, in GB."""
DEFAULT_GB = 100.0
JUST_USED_S = 10.0
"""A copy that was used so recently is not removed: its reader may be about to open it."""
COPY = re.compile("[0-9a-f]{32}")
"""Name of a copy."""
DOWNLOAD = ".download-"
"""Begins the name of a folder in which a copy arrives."""
ABANDONED_S = 86_400.0
"""After so long, a download was killed."""

Download = Callable[[Path, int], None]
"""Writes an object of so many bytes into a file; raises ValueError if it has another size."""


def copies_folder() -> Path:
    """The folder for local copies of shards, made if need be."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "logit-cache-pipeline"
    folder = at_home(Path(os.environ.get(COPIES) or default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def copy_name(url: str, checksum: str) -> str:
    """Name of the copy of an object: ours, whatever a record claims the checksum to be.

    Two objects never share a copy. xxh3 does not withstand intent: a stranger can make a file of any given hash.
    """
    return hashlib.sha256(f"{url} {checksum}".encode()).hexdigest()[:32]


def local_copy(url: str, checksum: str, num_bytes: int, is_whole: Callable[[Path], bool], download: Download) -> Path:
    """A file of this machine with the contents of an object of a size, whose hash is `checksum`.

    The copy is kept for the next time, under `copy_name`; those used longest ago make room. Raises
    FileNotFoundError, ValueError if the object has another size or two downloads in turn are not `is_whole`, and
    StorageError where this machine cannot hold it.
    """
    folder = copies_folder()
    copy = folder / copy_name(url, checksum)
    for _ in range(2):
        try:
            return _kept_or_fetched(url, copy, num_bytes, is_whole, download)
        except OSError as exc:
            if exc.errno is None:  # the store has no such object
                raise
            problem = exc.strerror
            if exc.errno == errno.ENOENT:  # the folder was removed just now
                copies_folder()
            elif exc.errno not in (errno.ENOSPC, errno.EDQUOT) or not _make_room(copy, num_bytes):
                break
    raise StorageError(f"{folder}: no copy of {url}: {problem}; make room there, or name another folder in {COPIES}.")


def _kept_or_fetched(
    url: str, copy: Path, num_bytes: int, is_whole: Callable[[Path], bool], download: Download
) -> Path:
    with (copy.parent / f".lock-{copy.name[:2]}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of one machine download a shard once
        for _ in range(2):
            if copy.is_file() and is_whole(copy):
                os.utime(copy)
                return copy
            with tempfile.TemporaryDirectory(dir=copy.parent, prefix=DOWNLOAD) as scratch:
                download(Path(scratch) / copy.name, num_bytes)
                os.replace(Path(scratch) / copy.name, copy)
            _make_room(copy)
        if is_whole(copy):
            return copy
        copy.unlink(missing_ok=True)
    raise ValueError(f"{url}: its bytes are not those of the checksum of its record")


def _make_room(newest: Path, num_bytes: int = 0) -> bool:
    """Keep to the limit, and free so many bytes, if need be and others can go; whether any went."""
    limit = number_of_environment(COPIES_GB, DEFAULT_GB) * 1e9
    now = time.time()
    used = []
    for path in newest.parent.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # another process makes room too
            continue
        if path.name.startswith(DOWNLOAD) and now - status.st_mtime > ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)
        elif COPY.fullmatch(path.name):  # and not a shard that is being written
            used.append((status.st_mtime, status.st_size, path))
    total = before = sum(size for _, size, _ in used)
    limit = min(limit, total - num_bytes)
    for mtime, size, path in sorted(used):
        if total <= limit or now - mtime < JUST_USED_S:
            break
        path.unlink(missing_ok=True)
        total -= size
    return total < before
