"""Object stores: a cache at s3://bucket/folder (or gs://, az://) instead of in a folder.

`ObjectPath` has the few methods of pathlib.Path that reading and writing a cache takes, so that the
code above knows no difference but this: a shard is read through a copy on this machine (pipeline/stores/copies.py),
and a file comes into being whole, by one PUT, instead of by a rename.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), as the
store's own tools read them. What fails is tried again as pipeline/stores/patience.py says.
"""

import contextlib
import math
import os
import posixpath
import re
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from pipeline.errors import ConfigError, StorageError, StorageSilentError
from pipeline.stores.client import client, head, is_forked, of_a_store
from pipeline.stores.patience import DOUBT, ask, is_bucket_missing, kind_of

RANGE_BYTES, RANGES = 8 << 20, 8
"""Bytes of a file that are asked for at a time, and how many such requests are under way."""
PARTS = 4
"""Parts of an upload, of 5 MiB, that are under way at a time."""
SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")

Version = dict[str, str]
"""What tells the states of an object apart, as the store calls it."""
Result = TypeVar("Result")


class ObjectPath:
    """An object, or the common prefix of several, used like a pathlib.Path."""

    def __init__(self, url: str, patience_s: float | None = None) -> None:
        """`patience_s` makes all requests for this path and those below it hasty: so long is tried at most."""
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme not in SCHEMES or not bucket:
            shown = without_secrets(url)
            raise ConfigError(f"{shown}: not the URL of an object store; expected {'://..., '.join(SCHEMES)}://...")
        self._root, self._key = f"{scheme}://{bucket}", posixpath.normpath(key).strip("/") if key else ""
        self._patience_s = patience_s

    def __str__(self) -> str:
        return f"{self._root}/{self._key}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "ObjectPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(f"{self}/{name}", self._patience_s)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return posixpath.basename(self._key)

    @property
    def suffix(self) -> str:
        """The name from its last dot on."""
        return posixpath.splitext(self._key)[1]

    @property
    def parent(self) -> "ObjectPath":
        """The URL without its last part."""
        return ObjectPath(f"{self._root}/{posixpath.dirname(self._key)}", self._patience_s)

    def is_file(self) -> bool:
        """Whether there is an object of this very name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return next(self.iterdir(), None) is not None

    def exists(self) -> bool:
        """Whether there is anything of this name."""
        return self.is_file() or self.is_dir()

    def stat(self) -> Any:
        """An object with `st_size` and `st_mtime`; raises FileNotFoundError."""
        found = self._call("read", head)
        return SimpleNamespace(st_size=int(found["size"]), st_mtime=found["last_modified"].timestamp())

    def iterdir(self) -> "Iterator[ObjectPath]":
        """What lies directly below, by name."""
        from obstore.exceptions import PermissionDeniedError

        def names(store: Any, key: str) -> list[str]:
            found = _obstore().list_with_delimiter(store, f"{key}/" if key else None)
            listed = [entry["path"] for entry in found["objects"]] + list(found["common_prefixes"])
            if not listed:  # so reads a proxy's page, too
                with contextlib.suppress(FileNotFoundError, PermissionDeniedError):
                    of_a_store(_obstore().get(store, f"{key}/.nothing".strip("/")).meta)
            return listed

        return iter(sorted(ObjectPath(f"{self._root}/{name}", self._patience_s) for name in self._call("list", names)))

    def read_bytes(self, at_most: float = math.inf) -> bytes | None:
        """The whole object, None if it is larger than that; raises FileNotFoundError."""
        return self.read_dated(at_most)[0]

    def read_dated(self, at_most: float = math.inf) -> tuple[bytes | None, float]:
        """The whole object, and the store's time of its last change; raises FileNotFoundError."""

        def get(store: Any, key: str) -> tuple[bytes | None, float]:
            found = _obstore().get(store, key)
            meta = of_a_store(found.meta)
            contents = bytes(found.bytes()) if meta["size"] <= at_most else None
            return contents, meta["last_modified"].timestamp()

        return self._call("read", get)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`."""
        return self._call("read", lambda store, key: bytes(_obstore().get_range(store, key, start=start, end=stop)))

    def write_bytes(self, contents: bytes, *, first_wins: bool = False) -> bool:
        """Write the object; False if `first_wins` and another has been first."""
        if first_wins:
            return self.swap(contents, None) is not None
        self._call("write", lambda store, key: _obstore().put(store, key, contents))
        return True

    def swap(self, contents: bytes, version: Version | None) -> Version | None:
        """Write the object if it is of that version, or, without one, if it is not there.

        Returns its new version, or None if another was first. A PUT whose answer was lost is tried again and
        then meets its own object: equal contents are ours.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put(store: Any, key: str) -> Version | None:
            try:
                return _version(_obstore().put(store, key, contents, mode=version or "create"))
            except (AlreadyExistsError, PreconditionError):
                try:
                    found = _obstore().get(store, key)
                    meta = of_a_store(found.meta)
                    return _version(meta) if bytes(found.bytes()) == contents else None
                except FileNotFoundError as gone:
                    if is_bucket_missing(gone):
                        raise
                    if version is not None:
                        return None
            raise AlreadyExistsError("status code: 409: a conflict with a request that came to nothing")

        return self._call("write", put)

    def upload(self, source: Path) -> None:
        """Write the object from a file, in parts, of which memory holds a few."""
        with source.open("rb") as file:

            def put(store: Any, key: str) -> None:
                file.seek(0)
                _obstore().put(store, key, file, max_concurrency=PARTS)

            self._call("write", put, in_parts=True)

    def download(self, target: Path, num_bytes: int) -> None:
        """Write the object into a file, several ranges at a time; ValueError if it is of another size.

        Also in a process that was forked.
        """
        if is_forked():
            return _download_in_a_process(self, target, num_bytes)
        from pipeline.parallel import in_threads

        size = self.stat().st_size
        if size != num_bytes:
            raise ValueError(f"{self}: {size} bytes; {num_bytes} are expected")
        with target.open("wb") as file:

            def copy(start: int) -> None:
                os.pwrite(file.fileno(), self.read_range(start, min(start + RANGE_BYTES, size)), start)

            for _ in in_threads(copy, range(0, size, RANGE_BYTES), RANGES):
                pass

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object, if it is there."""
        with contextlib.suppress(FileNotFoundError):  # Azure says so, S3 does not
            self._call("delete", lambda store, key: _obstore().delete(store, key))

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


Location = Path | ObjectPath


def location(value: str | Path) -> Location:
    """A folder of this machine, or the URL of an object store; ConfigError if it carries credentials.

    URLs are written into manifests, scripts, logs and messages.
    """
    url = str(value)
    if "://" not in url:
        return at_home(Path(value))
    if (bare := _without_credentials(url)) != url:
        raise ConfigError(
            f"{bare}: carries credentials or a query; give them in the environment, as the store's own tools read them."
        )
    return ObjectPath(url)


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


def without_secrets(text: str) -> str:
    """The text with *** for what its URLs carry of user, password and query, and for secrets of the environment."""
    text = _without_credentials(text)
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= LEAST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***").replace(urllib.parse.quote(secret, safe=""), "***")
    return text


def _without_credentials(text: str) -> str:
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))


_USER = re.compile(r"\b((?!abfss?:)[a-z0-9+]+://|abfss?://[^/@\s]*:)[^/@\s]*@")
"""User and password before the host; in abfs://container@account the first is none."""
_QUERY = re.compile(r"(\b[a-z0-9+]+://[^\s?\"']*)\?[^\s\"')]*")
_SECRET_NAME = re.compile("SECRET|TOKEN|PASSWORD|CREDENTIAL|SIGNATURE|_SAS|_KEY")
LEAST_SECRET = 8
"""Characters; a shorter value might be a word of the message."""


def _obstore() -> Any:
    import obstore

    return obstore


def _version(answer: Any) -> Version:
    return {name: answer[name] for name in ("e_tag", "version") if answer[name] is not None}


def _download_in_a_process(path: ObjectPath, target: Path, num_bytes: int) -> None:
    """What `download` does, by a new process; what that says while it waits goes to our standard error."""
    from pipeline.processes import PARENT

    command = [sys.executable, "-P", "-m", "pipeline.stores.objects", str(path), str(target), str(num_bytes)]
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
    from pipeline.processes import follow_parent

    follow_parent()
    try:
        ObjectPath(url).download(Path(target), int(num_bytes))
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
