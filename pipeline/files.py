"""Crash-safe files: what exists under its final name is whole.

Every file is written under a temporary name in its own folder, flushed to the disk, and
moved to its final name in one step. Knows nothing of corpora or caches.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from pipeline.errors import ConfigError, PipelineError
from pipeline.processes import owner_is_dead, owner_name

PARTIAL = ".partial"
"""Suffix of files that are being written; nothing reads them."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
"""What a hard link comes to where there are none: on FAT, exFAT, some network and FUSE file systems."""

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
"""What a lock comes to where there are none."""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush the contents of `path` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Move a finished file or folder to its final name, replacing a file of that name."""
    if partial.is_dir():
        for path in sorted(partial.rglob("*")):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(partial)
    else:
        sync_file(partial)
    os.replace(partial, final)
    sync_folder(final.parent)


def publish_first(partial: Path, final: Path) -> bool:
    """Give a finished file its final name unless that name is taken; True if this call won."""
    sync_file(partial)
    try:
        os.link(partial, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not _rename_first(partial, final):
            return False
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(final.parent)
    return True


@contextmanager
def held(path: Path, otherwise: PipelineError) -> Iterator[None]:
    """Hold a file, made if need be, against other processes that do; raises `otherwise` if one does.

    The system frees it even after a kill -9. Where a file system knows no such locks, nothing is held.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise otherwise from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _rename_first(partial: Path, final: Path) -> bool:
    """`publish_first` for a file system without hard links, where no two look and rename at the same time."""
    descriptor = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # which the system frees, even after a kill -9
        if final.exists():
            return False
        os.rename(partial, final)
    finally:
        os.close(descriptor)
    return True


def partial_path(final: Path) -> Path:
    """A temporary name for `final` in its own folder, that no other has; its end names this process."""
    return final.with_name(f"{final.name}.{secrets.token_hex(4)}.{owner_name()}{PARTIAL}")


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A temporary name for a file or folder that takes its final name at the end, and is gone after an error."""
    partial = partial_path(final)
    try:
        with naming(final):
            yield partial
            publish(partial, final)
    finally:
        remove_tree(partial)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system that names no file, such as a write to a full disk, names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove_partials(folder: Path, name: str = "") -> int:
    """Delete what dead processes of this host were writing in `folder`, of one name or of any; returns how many."""
    removed = 0
    with contextlib.suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            if path.name.startswith(name) and owner_is_dead(_owner_of(path.name)):
                remove_tree(path)
                removed += 1
    return removed


def is_vacant(folder: Path) -> bool:
    """True if nothing is there, or a folder in which something is being written at most, or was by a dead writer."""
    if not folder.is_dir():
        return not folder.exists()
    return all(name.endswith(PARTIAL) for name in os.listdir(folder))


def _owner_of(name: str) -> str:
    """The owner in a name by `partial_path`, or by an earlier version, which had dashes or no digits there."""
    if found := re.fullmatch(rf".*[.-][0-9a-f]{{8}}[.-](.+\.\d+\.\d+){re.escape(PARTIAL)}", name, re.ASCII):
        return found[1]
    return ".".join(name.removesuffix(PARTIAL).split(".")[-owner_name().count(".") - 1 :]) if PARTIAL in name else ""


def canonical_json(value: Any) -> bytes:
    """One byte string for equal JSON values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def remove_tree(folder: Path) -> None:
    """Delete a folder and the files in it, or what has its name, if it is there."""
    if folder.is_dir():  # a pipe of that name would be waited for
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.unlink(missing_ok=True)


def hash_file(path: Path, block_bytes: int = 1 << 22) -> str:
    """xxh3-128 of the file's contents, as hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(block_bytes):
            digest.update(block)
    return digest.hexdigest()


def at_home(path: Path) -> Path:
    """The path with ~ or ~user at its beginning replaced; raises ConfigError if there is no such user, and for a name
    that is not UTF-8, which no document of ours can hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{path}: its name is not UTF-8; rename it.") from None
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ConfigError(
            f"{path}: there is no such user, or no home folder; write ./{path} for a file of that name, or set HOME."
        ) from exc
