"""Folders of this machine, or of a file system that it has mounted."""

import contextlib
import errno
import io
import math
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath

from pipeline.files import (
    hash_file,
    naming,
    partial_path,
    publish,
    publish_first,
    remove_partials,
    remove_tree,
    replacing,
    sync_folder,
)
from pipeline.stores.store import Log, Store, Version


class LocalStore(PosixPath, Store):
    """A path that fulfils the contract of a store; the time of a file is that of the server of its file system."""

    @property
    def path(self) -> Path:
        """The path itself."""
        return self

    def hasty(self, seconds: float) -> "LocalStore":
        """The same: a file system is waited for by the kernel."""
        return self

    def names(self) -> list[str]:
        """Names of what lies directly below, in rising order; none if there is no folder."""
        try:
            return sorted(os.listdir(self))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def changed_at(self) -> float:
        """The time of the file's last change."""
        return self.stat().st_mtime

    def size_and_time(self) -> tuple[int, int]:
        """Bytes of the file, and its last change in nanoseconds."""
        status = self.stat()
        return status.st_size, status.st_mtime_ns

    def reader(self) -> io.RawIOBase:
        """The file itself."""
        return self.open("rb", buffering=0)

    def read_dated(self, at_most: float = math.inf) -> tuple[bytes | None, float]:
        """The whole file, None if it is larger or no plain file (a pipe would be waited for), and its time."""
        status = self.stat()
        fits = stat.S_ISREG(status.st_mode) and status.st_size <= at_most
        return self.read_bytes() if fits else None, status.st_mtime

    def read_end(self, num_bytes: int) -> bytes:
        """The last bytes of a file, nothing where there is none."""
        if not self.is_file():
            return b""
        with self.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - num_bytes, 0))
            return file.read(num_bytes)

    def write(self, contents: bytes, *, lasting: bool = True) -> None:
        """Write the file under another name, and rename it."""
        with self._partial(contents) as partial:
            publish(partial, self) if lasting else os.replace(partial, self)

    def create(self, contents: bytes, *, lasting: bool = True) -> Version | None:
        """Write the file if there is none."""
        if lasting:
            with self._partial(contents) as partial:
                won = publish_first(partial, self)
        else:
            won = self._open_new(contents)
        return Version("the only one") if won else None

    def renew(self, contents: bytes, version: Version) -> Version | None:
        """Set the time of the file to now: nobody but who has made it changes it."""
        try:
            os.utime(self)
        except FileNotFoundError:
            return None
        return version

    def publish(self, partial: Path) -> None:
        """Rename a finished file, which lies in the same folder."""
        publish(partial, self)

    def build(self, fill: Callable[[Store], None]) -> None:
        """Make the folder under another name, and rename it."""
        self.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(self.parent, self.name)
        try:
            with replacing(self) as partial:
                remove_tree(partial)
                partial.mkdir()
                fill(LocalStore(partial))
        except OSError:
            if not self.names():  # no other process has made it meanwhile
                raise

    def remove_tree(self) -> None:
        """Delete the folder and the files in it, or what has its name, if it is there."""
        remove_tree(self)

    def sync(self) -> None:
        """Flush the folder to the disk, if it is there."""
        if self.is_dir():
            sync_folder(self)

    def as_file(self, checksum: str, num_bytes: int, *, check: bool) -> Path:
        """The file itself; raises FileNotFoundError, ValueError."""
        if not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self))
        if (size := self.stat().st_size) != num_bytes:
            raise ValueError(f"{self}: {size} bytes; {num_bytes} were committed: the file is truncated or foreign")
        if check and hash_file(self) != checksum:
            raise ValueError(f"{self}: its checksum is not the committed one; bytes of the file have changed")
        return self

    def as_folder(self, scratch: Path) -> Path:
        """The folder itself."""
        return self

    def workshop(self) -> Path:
        """The folder itself: what is finished need only be renamed."""
        return self

    def free_bytes(self) -> int:
        """Room on the disk."""
        return shutil.disk_usage(self).free

    def log(self) -> Log:
        """The file itself, to which lines are appended."""
        return _File(self)

    @contextlib.contextmanager
    def _partial(self, contents: bytes) -> Iterator[Path]:
        """The contents under another name, which is gone at the end."""
        partial = partial_path(self)
        try:
            with naming(self):
                partial.write_bytes(contents)
                yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _open_new(self, contents: bytes) -> bool:
        try:
            descriptor = os.open(self, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with naming(self):
                os.write(descriptor, contents)
        finally:
            os.close(descriptor)
        return True


class _File:
    """One write a line, at the end of the file wherever that is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._torn = False

    def append(self, line: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                self._torn = os.fstat(self._descriptor).st_size > 0  # perhaps, by an earlier life of that name
            line = b"\n" + line if self._torn else line
            self._torn = True
            self._torn = os.write(self._descriptor, line) < len(line)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
