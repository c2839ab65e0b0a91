"""The contract of a store: where a cache lies, be it a folder of this machine or a prefix of an object store.

A Store names a place, as a pathlib.Path does: a folder, or a file below it. Those that are folders of this machine are
paths at the same time. What the code above relies on stands here, and nothing else; tests/test_stores.py holds every
store to it.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NewType, Protocol

import xxhash

Version = NewType("Version", str)
"""What tells the states of a file apart, as its store calls it."""


class Log(Protocol):
    """Lines that grow: what one process tells of itself."""

    def append(self, line: bytes) -> None:
        """Add a line, with its end; one that cannot be written is left out."""

    def flush(self) -> None:
        """Write what is only kept so far."""

    def close(self) -> None:
        """Let go of it; the last call."""


class Store(ABC):
    """A folder or a file in a store. Raises OSError, and StorageError where a store refuses or is silent."""

    # A place and its neighbours

    @abstractmethod
    def __truediv__(self, name: str) -> "Store":
        """What lies below under this name."""

    @property
    @abstractmethod
    def parent(self) -> "Store":
        """The folder around it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the place."""

    @property
    @abstractmethod
    def path(self) -> Path | None:
        """The place as a path of this machine; None if it is elsewhere."""

    @abstractmethod
    def absolute(self) -> "Store":
        """The same place, whatever the working directory."""

    @abstractmethod
    def hasty(self, seconds: float) -> "Store":
        """The same place, for requests that a silent store is not asked for longer than that."""

    # What is there

    @abstractmethod
    def is_file(self) -> bool:
        """Whether there is a file of this very name."""

    @abstractmethod
    def is_dir(self) -> bool:
        """Whether there is a folder."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of what lies directly below, in rising order; none if there is no folder."""

    @abstractmethod
    def changed_at(self) -> float:
        """The store's time of the file's last change; raises FileNotFoundError."""

    @abstractmethod
    def size_and_time(self) -> tuple[int, int]:
        """Bytes of the file, and its last change in nanoseconds; raises FileNotFoundError."""

    @abstractmethod
    def reader(self) -> io.RawIOBase:
        """The file's bytes, unbuffered, from any place on; raises FileNotFoundError."""

    @abstractmethod
    def read_dated(self, at_most: float = math.inf) -> tuple[bytes | None, float]:
        """The whole file, None if it is larger than that or no plain file, and the store's time of its last change.

        Raises FileNotFoundError.
        """

    @abstractmethod
    def read_end(self, num_bytes: int) -> bytes:
        """The last bytes of a file, nothing where there is none."""

    # Writing, each in one step: what exists under its final name is whole

    @abstractmethod
    def write(self, contents: bytes, *, lasting: bool = True) -> None:
        """Write the file, whether there is one or not; readers see the old one or the new one.

        What need not be `lasting` may be lost in a power cut.
        """

    @abstractmethod
    def create(self, contents: bytes, *, lasting: bool = True) -> Version | None:
        """Write the file if there is none; None if another was first."""

    @abstractmethod
    def renew(self, contents: bytes, version: Version) -> Version | None:
        """Set the time of the file to now if it is as `create` or `renew` has left it; None if it is not, or gone.

        `contents` are what was written then.
        """

    @abstractmethod
    def publish(self, partial: Path) -> None:
        """Give a finished file of this machine its final name, replacing another; `partial` is gone then."""

    @abstractmethod
    def build(self, fill: "Callable[[Store], None]") -> None:
        """Make this folder: `fill` writes into the one that it is given, what declares it whole at last.

        Nothing is raised if another process was first. What is there then must be checked.
        """

    @abstractmethod
    def mkdir(self, *, exist_ok: bool = False) -> None:
        """Make an empty folder where a store knows such a thing."""

    @abstractmethod
    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file."""

    @abstractmethod
    def remove_tree(self) -> None:
        """Delete the folder and the files in it, or what has its name, if it is there."""

    @abstractmethod
    def sync(self) -> None:
        """Make what was deleted in this folder so far stay deleted after a power cut."""

    # Files of this machine

    @abstractmethod
    def as_file(self, checksum: str, num_bytes: int, *, check: bool) -> Path:
        """The file on this machine, itself or a copy, of that size and, with `check`, of that xxh3-128.

        Raises FileNotFoundError, and ValueError if it is another file.
        """

    @abstractmethod
    def as_folder(self, scratch: Path) -> Path:
        """The folder on this machine: itself, or a copy of its files in `scratch`."""

    @abstractmethod
    def workshop(self) -> Path:
        """Where on this machine files are written that are to be published in this folder."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room that is left; None where a store does not say."""

    @abstractmethod
    def log(self) -> Log:
        """Lines that are appended to this file, or to several whose names begin with its stem."""

    # What follows from it

    def read(self, at_most: float = math.inf) -> bytes | None:
        """The whole file; None if it is larger than that, or no plain file; FileNotFoundError."""
        return self.read_dated(at_most)[0]

    def hashes(self) -> dict[str, str]:
        """xxh3-128 of every plain file directly below, by name."""
        found = {}
        for name in self.names():
            try:
                contents = (self / name).read()
            except FileNotFoundError:  # the prefix of others
                continue
            if contents is not None:
                found[name] = xxhash.xxh3_128_hexdigest(contents)
        return found
