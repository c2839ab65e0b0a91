"""Object stores: a cache at s3://bucket/folder (or gs://, az://) instead of in a folder.

A file comes into being whole, by one PUT, and is read through a copy on this machine (pipeline/stores/local_copies.py).

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), as the
store's own tools read them. What fails is tried again as pipeline/stores/patience.py says.
"""

import contextlib
import io
import json
import math
import os
import posixpath
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.documents import is_file_name, short
from pipeline.errors import ConfigError, StorageError, StorageSilentError
from pipeline.files import hash_file
from pipeline.parallel import in_threads
from pipeline.processes import PARENT, follow_parent
from pipeline.redaction import without_secrets
from pipeline.stores.client import client, head, is_forked, of_a_store
from pipeline.stores.local_copies import copies_folder, local_copy
from pipeline.stores.patience import DOUBT, ask, is_bucket_missing, kind_of
from pipeline.stores.sealed import read_small
from pipeline.stores.store import Log, Store, Version

RANGE_BYTES, RANGES = 8 << 20, 8
"""Bytes of a file that are asked for at a time, and how many such requests are under way."""
LOG_BYTES = 256 << 10
"""An object of a log of this size grows no more."""
PARTS = 4
"""Parts of an upload, of 5 MiB, that are under way at a time."""
Result = TypeVar("Result")


class ObjectStore(Store):
    """An object, or the common prefix of several."""

    def __init__(self, url: str, patience_s: float | None = None) -> None:
        """`patience_s` makes all requests for this path and those below it hasty: so long is tried at most."""
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        if not bucket:
            raise ConfigError(f"{without_secrets(url)}: names no bucket; expected {scheme}://BUCKET/...")
        self._root, self._key = f"{scheme}://{bucket}", posixpath.normpath(key).strip("/") if key else ""
        self._patience_s = patience_s

    def __str__(self) -> str:
        return f"{self._root}/{self._key}"

    def __repr__(self) -> str:
        return f"ObjectStore({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectStore) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "ObjectStore") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> "ObjectStore":
        return ObjectStore(f"{self}/{name}", self._patience_s)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return posixpath.basename(self._key)

    @property
    def parent(self) -> "ObjectStore":
        """The URL without its last part."""
        return ObjectStore(f"{self._root}/{posixpath.dirname(self._key)}", self._patience_s)

    @property
    def path(self) -> None:
        """None: it is not on this machine."""

    def absolute(self) -> "ObjectStore":
        """The URL itself, which is absolute."""
        return self

    def hasty(self, seconds: float) -> "ObjectStore":
        """The same place, for requests that are tried for so long at most."""
        return ObjectStore(str(self), seconds)

    def is_file(self) -> bool:
        """Whether there is an object of this very name."""
        try:
            self._head()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Names of what lies directly below, in rising order."""
        from obstore.exceptions import PermissionDeniedError

        def list_names(store: Any, key: str) -> list[str]:
            found = _obstore().list_with_delimiter(store, f"{key}/" if key else None)
            listed = [entry["path"] for entry in found["objects"]] + list(found["common_prefixes"])
            if not listed:  # so reads a proxy's page, too
                with contextlib.suppress(FileNotFoundError, PermissionDeniedError):
                    of_a_store(_obstore().get(store, f"{key}/.nothing".strip("/")).meta)
            return listed

        depth = len(self._key) + 1 if self._key else 0
        return sorted(path[depth:].strip("/") for path in self._call("list", list_names))

    def changed_at(self) -> float:
        """The store's time of the object's last change; raises FileNotFoundError."""
        return self._head()["last_modified"].timestamp()

    def size_and_time(self) -> tuple[int, int]:
        """Bytes of the object, and its last change in nanoseconds."""
        found = self._head()
        return int(found["size"]), int(found["last_modified"].timestamp() * 1e9)

    def reader(self) -> io.RawIOBase:
        """The object's bytes, by a request for each read."""
        return _Reader(self, self.size_and_time()[0])

    def read_dated(self, at_most: float = math.inf) -> tuple[bytes | None, float]:
        """The whole object, None if it is larger than that, and the store's time of its last change."""

        def get(store: Any, key: str) -> tuple[bytes | None, float]:
            found = _obstore().get(store, key)
            meta = of_a_store(found.meta)
            contents = bytes(found.bytes()) if meta["size"] <= at_most else None
            return contents, meta["last_modified"].timestamp()

        return self._call("read", get)

    def read_end(self, num_bytes: int) -> bytes:
        """The whole object, nothing if it is larger than that: such a one is none of ours."""
        try:
            return self.read(num_bytes) or b""
        except FileNotFoundError:
            return b""

    def write(self, contents: bytes, *, lasting: bool = True) -> None:
        """Write the object by one PUT."""
        self._call("write", lambda store, key: _obstore().put(store, key, contents))

    def create(self, contents: bytes, *, lasting: bool = True) -> Version | None:
        """Write the object if there is none, on that condition."""
        return self._put_if("create", contents)

    def renew(self, contents: bytes, version: Version) -> Version | None:
        """Write the object again, on condition that it is of that version."""
        return self._put_if(json.loads(version), contents)

    def publish(self, partial: Path) -> None:
        """Upload a finished file in parts, of which memory holds a few."""
        with partial.open("rb") as file:

            def put(store: Any, key: str) -> None:
                file.seek(0)
                _obstore().put(store, key, file, max_concurrency=PARTS)

            self._call("write", put, in_parts=True)
        partial.unlink()

    def build(self, fill: Callable[[Store], None]) -> None:
        """Fill it where it is: what declares it whole comes last."""
        fill(self)

    def mkdir(self, *, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object, if it is there."""
        with contextlib.suppress(FileNotFoundError):  # Azure says so, S3 does not
            self._call("delete", lambda store, key: _obstore().delete(store, key))

    def remove_tree(self) -> None:
        """Delete the objects directly below."""
        for name in self.names():
            (self / name).unlink()

    def sync(self) -> None:
        """Nothing: what was answered lasts."""

    def as_file(self, checksum: str, num_bytes: int, *, check: bool) -> Path:
        """A copy on this machine, kept for the next time; raises FileNotFoundError, ValueError."""

        def is_whole(copy: Path) -> bool:
            return copy.stat().st_size == num_bytes and (not check or hash_file(copy) == checksum)

        return local_copy(str(self), checksum, num_bytes, is_whole, self.download)

    def as_folder(self, scratch: Path) -> Path:
        """A copy of the objects directly below, in `scratch`."""
        scratch.mkdir(parents=True, exist_ok=True)
        for name in self.names():
            if not is_file_name(name):
                raise StorageError(f"{self}: holds an object of name {short(name)}; expected plain files.")
            with contextlib.suppress(FileNotFoundError):  # a prefix of others
                (scratch / name).write_bytes(read_small(self / name, StorageError))
        return scratch

    def workshop(self) -> Path:
        """The folder for copies."""
        return copies_folder()

    def free_bytes(self) -> None:
        """None: an object store does not say."""

    def log(self) -> Log:
        """Objects that are written again as they grow: a store cannot append."""
        return _Objects(self)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`."""
        return self._call("read", lambda store, key: bytes(_obstore().get_range(store, key, start=start, end=stop)))

    def download(self, target: Path, num_bytes: int) -> None:
        """Write the object into a file, several ranges at a time; ValueError if it is of another size.

        Also in a process that was forked.
        """
        if is_forked():
            return _download_in_a_process(self, target, num_bytes)
        size = int(self._head()["size"])
        if size != num_bytes:
            raise ValueError(f"{self}: {size} bytes; {num_bytes} are expected")
        with target.open("wb") as file:

            def copy(start: int) -> None:
                os.pwrite(file.fileno(), self.read_range(start, min(start + RANGE_BYTES, size)), start)

            for _ in in_threads(copy, range(0, size, RANGE_BYTES), RANGES):
                pass

    def _head(self) -> Any:
        return self._call("read", head)

    def _put_if(self, mode: Any, contents: bytes) -> Version | None:
        """Write the object under a condition: "create", or that it is of a version; its new version, or None.

        A PUT whose answer was lost is tried again and then meets its own object: equal contents are ours.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put(store: Any, key: str) -> Version | None:
            try:
                return _version(_obstore().put(store, key, contents, mode=mode))
            except (AlreadyExistsError, PreconditionError):
                try:
                    found = _obstore().get(store, key)
                    meta = of_a_store(found.meta)
                    return _version(meta) if bytes(found.bytes()) == contents else None
                except FileNotFoundError as gone:
                    if is_bucket_missing(gone):
                        raise
                    if mode != "create":
                        return None
            raise AlreadyExistsError("status code: 409: a conflict with a request that came to nothing")

        return self._call("write", put)

    def _call(self, verb: str, request: Callable[[Any, str], Result], *, in_parts: bool = False) -> Result:
        """The answer to a request, waited for as patience.py says; raises FileNotFoundError, StorageError."""
        if is_forked():
            raise RuntimeError(f"{self}: asked for in a forked process; the client's threads do not live there")

        from obstore.exceptions import BaseError

        def ask_once(client_s: float) -> Result:
            try:
                return request(client(self._root, client_s, in_parts), self._key)
            except (BaseError, FileNotFoundError) as exc:
                if kind_of(exc) == DOUBT:
                    client.cache_clear()  # the next one reads the credentials anew
                raise

        what = f"{self}: cannot {verb} it"
        return ask(self._root, ask_once, what, lambda reason: without_secrets(reason)[:400], self._patience_s)


class _Reader(io.RawIOBase):
    """An object as a file; whoever reads it in small parts puts a buffer of RANGE_BYTES before it."""

    def __init__(self, place: ObjectStore, size: int) -> None:
        self._place, self._size, self._at = place, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        content = self._place.read_range(self._at, stop)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class _Objects:
    """Objects that are written again as they grow, named by the time of their first event."""

    def __init__(self, place: ObjectStore) -> None:
        self._folder = place.parent
        self._stem, self._suffix = posixpath.splitext(place.name)
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._num_written = 0
        self._name = ""

    def append(self, line: bytes) -> None:
        with self._lock:
            self._name = self._name or self._new_name()
            self._lines.append(line)

    def flush(self) -> None:
        with self._lock:
            name, lines = self._name, list(self._lines)
        if len(lines) == self._num_written:
            return
        contents = b"".join(lines)
        with contextlib.suppress(StorageError, OSError):
            (self._folder / name).write(contents)
            self._num_written = len(lines)
            if len(contents) >= LOG_BYTES:
                with self._lock:
                    self._lines, self._num_written = self._lines[len(lines) :], 0
                    self._name = self._new_name()

    def close(self) -> None:
        pass

    def _new_name(self) -> str:
        return f"{self._stem}.{time.time_ns() // 1_000_000}{self._suffix}"


def _obstore() -> Any:
    import obstore

    return obstore


def _version(answer: Any) -> Version:
    return Version(json.dumps({name: answer[name] for name in ("e_tag", "version") if answer[name] is not None}))


def _download_in_a_process(path: ObjectStore, target: Path, num_bytes: int) -> None:
    """What `download` does, by a new process; what that says while it waits goes to our standard error."""
    command = [sys.executable, "-P", "-m", "pipeline.stores.object_store", str(path), str(target), str(num_bytes)]
    parent = {PARENT: f"{os.getpid()} {signal.SIGKILL.value}"}  # it does not wait for a store after we have ended
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | parent)
    if done.returncode:
        if done.returncode > OS_ERROR:
            raise OSError(done.returncode - OS_ERROR, os.strerror(done.returncode - OS_ERROR))
        kinds = {StorageSilentError.exit_code: StorageSilentError, NOT_FOUND: FileNotFoundError, OTHER_SIZE: ValueError}
        raise kinds.get(done.returncode, StorageError)(done.stdout.strip() or f"{path}: no copy could be made.")


NOT_FOUND, OTHER_SIZE, OS_ERROR = 3, 4, 100
"""Exit codes of that process; above the last, by the number of the system's error."""


def main(url: str, target: str, num_bytes: str) -> int:
    """Download an object; what a forked process starts. An error goes to standard output."""
    follow_parent()
    try:
        ObjectStore(url).download(Path(target), int(num_bytes))
    except (StorageError, ValueError, OSError) as error:
        print(error)
        if isinstance(error, StorageError):
            return error.exit_code
        if isinstance(error, ValueError):
            return OTHER_SIZE
        return NOT_FOUND if error.errno is None else OS_ERROR + error.errno
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
