"""Small files that come and go while a run goes on: leases and heartbeats, in a folder or in an object store.

They are advice. A folder does not flush them to the disk; a store is not asked again for long to renew, replace or
delete one. Their times are those of the file server or of the store: a difference of two is an age, whatever the
clocks of the workers say.
"""

import contextlib
import time
from dataclasses import dataclass

from pipeline.errors import CacheCorruptError, StorageError
from pipeline.processes import owner_name
from pipeline.stores.numbered import list_names
from pipeline.stores.store import Store, Version

PATIENCE_S = 15.0
"""Seconds for which a store is asked to renew, to replace or to delete a file."""
LARGEST_FILE = 1 << 20
"""Bytes."""
NOT_WRITTEN = (OSError, StorageError)
"""What `renew` and `replace` raise."""


def server_time(folder: Store) -> float:
    """The clock of the file server or the store; where nothing can be written, this machine's."""
    files, probe = EphemeralFiles(folder), f".clock-{owner_name()}"
    try:
        files.replace(probe, "")
        now = files.read(probe)
        files.remove(probe)
    except NOT_WRITTEN:
        return time.time()
    return now.time if now is not None else time.time()


@dataclass(frozen=True)
class EphemeralFile:
    """A file as it was read."""

    name: str
    text: str
    time: float
    """Of its last change, by the server's clock."""


class EphemeralFiles:
    """Those in a folder, which must be there. Those that this process has made, it can renew."""

    def __init__(self, folder: Store) -> None:
        self._folder, self._hasty = folder, folder.hasty(PATIENCE_S)
        self._mine: dict[str, tuple[bytes, Version]] = {}

    def names(self) -> list[str]:
        """Names of all files, from one listing; those that do not begin with a digit are left out."""
        return list_names(self._folder)

    def create(self, name: str, text: str) -> bool:
        """Make a file; False if there is one of that name."""
        contents = text.encode()
        version = (self._folder / name).create(contents, lasting=False)
        if version is not None:
            self._mine[name] = contents, version
        return version is not None

    def renew(self, name: str) -> bool:
        """Set the time of a file that `create` has made to now; False if it is gone. It never makes one anew."""
        mine = self._mine.get(name)  # another thread may just have given it back
        version = (self._hasty / name).renew(*mine) if mine is not None else None
        if mine is not None and version is not None and name in self._mine:
            self._mine[name] = mine[0], version
        return version is not None

    def replace(self, name: str, text: str, *, patient: bool = False) -> None:
        """Write a file, whether there is one or not; readers see the old one or the new one."""
        ((self._folder if patient else self._hasty) / name).write(text.encode(), lasting=False)

    def read(self, name: str) -> EphemeralFile | None:
        """A file; None if it is not there."""
        try:
            contents, time = (self._folder / name).read_dated(at_most=LARGEST_FILE)
        except FileNotFoundError:
            return None
        if contents is None:
            raise CacheCorruptError(f"{self._folder / name}: more than {LARGEST_FILE:,} bytes; not a file of a run.")
        return EphemeralFile(name, contents.decode(errors="replace"), time)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        self._mine.pop(name, None)
        with contextlib.suppress(StorageError):  # a lease that stays there expires
            (self._hasty / name).unlink(missing_ok=True)
