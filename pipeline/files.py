"""Crash-safe files: what exists under its final name is whole.

Every file is written under a temporary name in its own folder, flushed to the disk, and
moved to its final name in one step. JSON documents carry a checksum of themselves.
Knows nothing of corpora or caches.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from pipeline.documents import Kind, Refusal, document_of, printable
from pipeline.errors import PipelineError
from pipeline.processes import owner_is_dead, owner_name
from pipeline.stores.objects import Location, ObjectPath

LARGEST_DOCUMENT = 64 << 20
"""Bytes; more are not even read."""
PARTIAL = ".partial"
"""Suffix of files that are being written; nothing reads them."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
"""What a hard link comes to where there are none: on FAT, exFAT, some network and FUSE file systems."""

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
"""What a lock comes to where there are none."""


def sync_folder(folder: Location) -> None:
    """Make renames inside `folder` survive a power cut; an object store needs no such thing."""
    if isinstance(folder, ObjectPath):
        return
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


def publish(partial: Path, final: Location) -> None:
    """Move a finished file or folder to its final name, replacing a file of that name."""
    if isinstance(final, ObjectPath):
        final.upload(partial)
        partial.unlink()
        return
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
    """A temporary name for `final` in its own folder, unique to this process."""
    return final.with_name(f"{final.name}.{owner_name()}{PARTIAL}")


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
def naming(path: Location) -> Iterator[None]:
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
    """True if nothing is there, or a folder in which at most something is being written, or was when its writer died."""
    if not folder.is_dir():
        return not folder.exists()
    return all(name.endswith(PARTIAL) for name in os.listdir(folder))


def _owner_of(name: str) -> str:
    """The owner in a name by `partial_path`: host, which may have dots, namespace and pid come last."""
    return ".".join(name.removesuffix(PARTIAL).split(".")[-owner_name().count(".") - 1 :]) if PARTIAL in name else ""


def list_names(folder: Location) -> list[str]:
    """Names of the numbered files in a folder, less those that are being written; empty if there is no folder."""
    try:
        names = os.listdir(folder) if isinstance(folder, Path) else [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in names if "0" <= name[:1] <= "9" and not name.endswith(PARTIAL)]


def numbers_in(names: Iterable[str], form: str) -> list[tuple[int, ...]]:
    """The numbers in the names that have this form, a regular expression; names of others are not ours."""
    found = (re.fullmatch(form, name, re.ASCII) for name in names)
    return [tuple(map(int, match.groups())) for match in found if match]


def write_json(path: Location, document: dict[str, Any], *, first_wins: bool = False) -> bool:
    """Write `document` with a checksum of itself, atomically; False if `first_wins` and the name was taken."""
    body = json.dumps(document, indent=1, ensure_ascii=False).encode()
    contents = body.removesuffix(b"\n}") + _seal(body)
    if isinstance(path, ObjectPath):
        return path.write_bytes(contents, first_wins=first_wins)
    partial = partial_path(path)
    try:
        with naming(path):
            partial.write_bytes(contents)
            if first_wins:
                return publish_first(partial, path)
            publish(partial, path)
            return True
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Location, error: Refusal) -> dict[str, Any]:
    """The document that `write_json` wrote, less its checksum; raises `error(message)` unless every byte is as it was."""
    contents = read_small(path, error)
    head, mark, _ = contents.rpartition(_MARK)
    body = head + b"\n}"
    if not mark or contents != head + _seal(body):
        raise error(
            f"{path}: its checksum does not match its contents; the file is damaged, foreign or edited by hand."
        )
    return parse_json(body, path, error)


def read_document(path: Location, kind: type[Kind], error: Refusal) -> Kind:
    """The document of a class that `write_json` wrote, every entry checked; raises `error(message)`."""
    return document_of(kind, read_json(path, error), path, error)


def parse_json(contents: bytes, where: object, error: Refusal) -> dict[str, Any]:
    """A JSON object; raises `error(message)` if it is anything else."""
    try:
        document = json.loads(contents)
    except (ValueError, RecursionError) as exc:
        raise error(f"{where}: not JSON ({printable(str(exc))}); the file is damaged or foreign.") from None
    if not isinstance(document, dict):
        raise error(f"{where}: JSON of type {type(document).__name__}; expected an object.")
    return document


def read_small(path: Location, error: Refusal, at_most: int = LARGEST_DOCUMENT) -> bytes:
    """The contents of a file that holds one document; raises `error(message)` if it is too large for that."""
    if isinstance(path, ObjectPath):
        contents = path.read_bytes(at_most)
    else:
        status = path.stat()
        fits = stat.S_ISREG(status.st_mode) and status.st_size <= at_most
        contents = path.read_bytes() if fits else None
    if contents is None:
        raise error(f"{path}: not a plain file of {at_most:,} bytes or less, as a document of this pipeline is.")
    return contents


_MARK = b',\n "checksum": "'
"""Begins the last entry of a document: the hash of its bytes without that entry."""


def _seal(body: bytes) -> bytes:
    return _MARK + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n'


def canonical_json(value: Any) -> bytes:
    """One byte string for equal JSON values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def hash_folder(folder: Location) -> dict[str, str]:
    """xxh3-128 of every file directly in `folder`, by name; empty if there is no such folder."""
    paths = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return {
        path.name: hash_file(path) if isinstance(path, Path) else xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in paths
    }


def remove_tree(folder: Location) -> None:
    """Delete a folder and the files in it, or what has its name, if it is there."""
    if isinstance(folder, ObjectPath):
        for path in folder.iterdir():
            path.unlink()
    elif folder.is_dir():  # a pipe of that name would be waited for
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
