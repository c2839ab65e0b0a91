"""Which files are read, in which order, and how they are divided into units of work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, CorpusError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
UNIT_BYTES = 64 << 20
"""Input that a crash can make us read again; a larger file is a unit of its own."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read. Its contents are known by path, size and time of change, as by `make` and rsync:
    hashing the contents would read terabytes once more to learn that nothing has changed."""

    path: Path
    name: str
    """Path below the folder that was given, with that folder's name: free of where the folder lies."""
    size: int
    mtime_ns: int

    @property
    def identity(self) -> list[str | int]:
        """JSON values that change with the file."""
        return [self.name, self.size, self.mtime_ns]

    def is_known_as(self, identity: Sequence[str | int]) -> bool:
        """Whether that is this file's identity, but for the name of the folder that was given, which may change."""
        below = [str(name).partition("/")[2] or name for name in (self.name, identity[0])]
        return below[0] == below[1] and [self.size, self.mtime_ns] == list(identity[1:])


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """All files of a run, in the order in which they are read."""

    files: tuple[InputFile, ...]
    ignored: int
    """Files of other types in the folders that were given."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def same_files(files: Sequence[InputFile], identities: Sequence[Sequence[str | int]]) -> bool:
    """Whether files are those of the identities, in this order."""
    return len(files) == len(identities) and all(
        file.is_known_as(identity) for file, identity in zip(files, identities, strict=True)
    )


def suffix_of(path: Path) -> str:
    """The input suffix that `path` ends with; empty if it is of another type."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def find_inputs(paths: Sequence[Path], out: Path | None) -> InputFiles:
    """The input files at `paths`, folders searched in sorted order; raises ConfigError or CorpusError."""
    found: dict[Path, InputFile] = {}
    ignored = 0
    for given in paths:
        if not given.exists():
            raise ConfigError(f"{given}: no such file or folder; check the path of this input.")
        if out is not None and out.resolve().is_relative_to(given.resolve()):
            raise ConfigError(f"{out}: --out lies inside the input {given}; choose a folder outside of it.")
        if not given.is_dir() and not suffix_of(given):
            raise ConfigError(f"{given}: not a type of input; expected one of: {', '.join(SUFFIXES)}.")
        inside = sorted(path for path in given.rglob("*") if path.is_file()) if given.is_dir() else [given]
        for path in inside:
            if suffix_of(path):
                found.setdefault(path.resolve(), describe(path, _name(path, given)))
            else:
                ignored += 1
    if not found:
        raise CorpusError(
            f"{', '.join(map(str, paths))}: no input file ({ignored} of other types); expected {', '.join(SUFFIXES)}."
        )
    return InputFiles(files=tuple(found.values()), ignored=ignored)


def describe(path: Path, name: str) -> InputFile:
    """The file at `path` as it is now."""
    status = path.stat()
    return InputFile(path=path, name=name, size=status.st_size, mtime_ns=status.st_mtime_ns)


def divide(files: Sequence[InputFile], unit_bytes: int) -> list[tuple[InputFile, ...]]:
    """Consecutive groups of files, each of at most `unit_bytes` or one larger file."""
    units: list[list[InputFile]] = []
    used = 0
    for file in files:
        if not units or used + file.size > unit_bytes:
            units.append([])
            used = 0
        units[-1].append(file)
        used += file.size
    return [tuple(unit) for unit in units]


def _name(path: Path, given: Path) -> str:
    return (Path(given.resolve().name) / path.relative_to(given)).as_posix() if path != given else path.name
