"""Object stores: a cache at s3://bucket/folder (or gs://, az://) instead of in a folder.

`ObjectPath` has the few methods of pathlib.Path that reading and writing a cache takes, so that the
code above knows no difference but this: a shard is read through a copy on this machine (pipeline/copies.py),
and a file comes into being whole, by one PUT, instead of by a rename.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), as the
store's own tools read them. Dropped connections, server errors and throttling are retried for RETRY_S.
"""

import contextlib
import functools
import itertools
import math
import os
import posixpath
import re
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from pipeline.errors import ConfigError, StorageError

RETRY_S = 120.0
"""Seconds for which a request that fails by no fault of ours is tried again."""
ATTEMPTS = 4
"""Times that a request is made whose answer broke off."""
RANGE_BYTES = 16 << 20
"""Bytes of a file that are asked for at a time."""
SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")

Version = dict[str, str]
"""What tells the states of an object apart, as the store calls it."""
Result = TypeVar("Result")


class ObjectPath:
    """An object, or the common prefix of several, used like a pathlib.Path."""

    def __init__(self, url: str, patience_s: float | None = None) -> None:
        """`patience_s` takes the place of RETRY_S, for this path and those below it."""
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
        return ObjectPath(f"{self._root}/{posixpath.dirname(self._key)}")

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
        head = self._call("read", lambda store, key: _obstore().head(store, key))
        return SimpleNamespace(st_size=int(head["size"]), st_mtime=head["last_modified"].timestamp())

    def iterdir(self) -> "Iterator[ObjectPath]":
        """What lies directly below, by name."""
        found = self._call("list", lambda store, key: _obstore().list_with_delimiter(store, f"{key}/" if key else None))
        names = [entry["path"] for entry in found["objects"]] + list(found["common_prefixes"])
        return iter(sorted(ObjectPath(f"{self._root}/{name}") for name in names))

    def read_bytes(self, at_most: float = math.inf) -> bytes | None:
        """The whole object, None if it is larger than that; raises FileNotFoundError."""
        return self.read_dated(at_most)[0]

    def read_dated(self, at_most: float = math.inf) -> tuple[bytes | None, float]:
        """The whole object, and the store's time of its last change; raises FileNotFoundError."""

        def get(store: Any, key: str) -> tuple[bytes | None, float]:
            found = _obstore().get(store, key)
            contents = bytes(found.bytes()) if found.meta["size"] <= at_most else None
            return contents, found.meta["last_modified"].timestamp()

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
                    return _version(found.meta) if bytes(found.bytes()) == contents else None
                except FileNotFoundError:
                    return None

        return self._call("write", put)

    def upload(self, source: Path) -> None:
        """Write the object from a file."""

        def put(store: Any, key: str) -> None:
            with source.open("rb") as file:
                _obstore().put(store, key, file)

        self._call("write", put)

    def download(self, target: Path, num_bytes: int) -> None:
        """Write the object into a file, several ranges at a time; ValueError if it is of another size.

        Also in a process that was forked.
        """
        if _is_forked():
            command = [sys.executable, "-P", "-m", "pipeline.storage", str(self), str(target), str(num_bytes)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise StorageError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{self}: no copy.")
            return
        from pipeline.parallel import in_threads

        size = self.stat().st_size
        if size != num_bytes:
            raise ValueError(f"{self}: {size} bytes; {num_bytes} are expected")
        with target.open("wb") as file:

            def copy(start: int) -> None:
                os.pwrite(file.fileno(), self.read_range(start, min(start + RANGE_BYTES, size)), start)

            for _ in in_threads(copy, range(0, size, RANGE_BYTES), 8):
                pass

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object, if it is there."""
        with contextlib.suppress(FileNotFoundError):  # Azure says so, S3 does not
            self._call("delete", lambda store, key: _obstore().delete(store, key))

    def _call(self, verb: str, request: Callable[[Any, str], Result]) -> Result:
        """The answer to a request; what the store's client raises becomes a StorageError of one line."""
        from obstore.exceptions import BaseError, GenericError

        if _is_forked():
            raise RuntimeError(f"{self}: asked for in a forked process; the client's threads do not live there")
        retry_s = RETRY_S if self._patience_s is None else min(self._patience_s, RETRY_S)
        deadline = time.monotonic() + retry_s
        for attempt in itertools.count(1):
            try:
                return request(_store(self._root, retry_s), self._key)
            except BaseError as exc:  # the client has tried again itself, but not where a body broke off
                if not isinstance(exc, GenericError) or attempt == ATTEMPTS or time.monotonic() > deadline:
                    reason = without_secrets(" ".join(str(exc).split("\n\nDebug source")[0].split()))
                    raise StorageError(f"{self}: cannot {verb} it: {reason[:400]}") from exc
            time.sleep(0.1 * 2**attempt)
        raise AssertionError


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


@functools.lru_cache
def _store(root: str, retry_s: float) -> Any:
    from obstore.store import from_url

    global _first_user
    _first_user = os.getpid()
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    retry = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_s), "backoff": backoff}
    return from_url(root, retry_config=retry)


_first_user: int | None = None
"""The process in which the client's threads live; a fork has none, and would wait for ever."""


def _is_forked() -> bool:
    return _first_user not in (None, os.getpid())


def main(url: str, target: str, num_bytes: str) -> None:
    """Download an object; what a forked process starts."""
    try:
        ObjectPath(url).download(Path(target), int(num_bytes))
    except (StorageError, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
