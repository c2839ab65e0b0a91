"""Small files that come and go while a run goes on: leases and heartbeats, in a folder or in an object store.

They are advice. A folder does not flush them to the disk; a store is not asked again for long to renew, replace or
delete one. Their times are those of the file server or of the store: a difference of two is an age, whatever the
clocks of the workers say.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import CacheCorruptError, StorageError
from pipeline.files import PARTIAL, list_names, naming, read_small
from pipeline.stores.objects import Location, ObjectPath, Version

PATIENCE_S = 15.0
"""Seconds for which a store is asked to renew, to replace or to delete a note."""
LARGEST_NOTE = 1 << 20
"""Bytes."""
NOT_WRITTEN = (OSError, StorageError)
"""What `renew` and `replace` raise."""


@dataclass(frozen=True)
class Note:
    """A note as it was read."""

    name: str
    text: str
    time: float
    """Of its last change, by the server's clock."""


class Notes(Protocol):
    """The notes of one folder. Those that this process has made, it can renew."""

    def names(self) -> list[str]:
        """Names of all notes, from one listing; those that do not begin with a digit are left out."""

    def create(self, name: str, text: str) -> bool:
        """Make a note; False if there is one of that name."""

    def renew(self, name: str) -> bool:
        """Set the time of a note that `create` has made to now; False if it is gone. It never makes one anew."""

    def replace(self, name: str, text: str, *, patient: bool = False) -> None:
        """Write a note, whether there is one or not; readers see the old one or the new one."""

    def read(self, name: str) -> Note | None:
        """A note; None if it is not there."""

    def remove(self, name: str) -> None:
        """Delete a note, if it is there."""


def notes_in(folder: Location) -> Notes:
    """The notes in a folder, which must be there, or below a prefix of an object store."""
    return ObjectNotes(folder) if isinstance(folder, ObjectPath) else FolderNotes(folder)


class FolderNotes:
    """Notes as files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        return list_names(self._folder)

    def create(self, name: str, text: str) -> bool:
        try:
            descriptor = os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with naming(self._folder / name):
                os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
        return True

    def renew(self, name: str) -> bool:
        try:
            os.utime(self._folder / name)
        except FileNotFoundError:
            return False
        return True

    def replace(self, name: str, text: str, *, patient: bool = False) -> None:
        partial = self._folder / (name + PARTIAL)
        try:
            with naming(self._folder / name):
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, self._folder / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> Note | None:
        path = self._folder / name
        try:
            contents, time = read_small(path, CacheCorruptError, LARGEST_NOTE), path.stat().st_mtime
        except FileNotFoundError:
            return None
        return Note(name, contents.decode(errors="replace"), time)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)


class ObjectNotes:
    """Notes as objects. To renew one is to write it again, on condition that it is as it was."""

    def __init__(self, folder: ObjectPath) -> None:
        self._folder = folder
        self._hasty = ObjectPath(str(folder), PATIENCE_S)
        self._mine: dict[str, tuple[bytes, Version]] = {}

    def names(self) -> list[str]:
        return list_names(self._folder)

    def create(self, name: str, text: str) -> bool:
        contents = text.encode()
        version = (self._folder / name).swap(contents, None)
        if version is not None:
            self._mine[name] = contents, version
        return version is not None

    def renew(self, name: str) -> bool:
        mine = self._mine.get(name)  # another thread may just have given it back
        version = (self._hasty / name).swap(*mine) if mine is not None else None
        if mine is not None and version is not None and name in self._mine:
            self._mine[name] = mine[0], version
        return version is not None

    def replace(self, name: str, text: str, *, patient: bool = False) -> None:
        ((self._folder if patient else self._hasty) / name).write_bytes(text.encode())

    def read(self, name: str) -> Note | None:
        try:
            contents, time = (self._folder / name).read_dated(at_most=LARGEST_NOTE)
        except FileNotFoundError:
            return None
        if contents is None:
            raise CacheCorruptError(f"{self._folder / name}: more than {LARGEST_NOTE:,} bytes; not a note of a run.")
        return Note(name, contents.decode(errors="replace"), time)

    def remove(self, name: str) -> None:
        self._mine.pop(name, None)
        with contextlib.suppress(StorageError):  # a lease that stays there expires
            (self._hasty / name).unlink(missing_ok=True)
