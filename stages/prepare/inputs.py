"""Which files are read, in which order, and how they are divided into units of work."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from pipeline.errors import ConfigError, CorpusError
from pipeline.parallel import map_in_threads
from pipeline.stores.places import store_of
from pipeline.stores.store import Store

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".json", ".md")
NO_TEXT = (
    "requirements*.txt",
    "constraints*.txt",
    "CMakeLists.txt",
    "robots.txt",
    "dataset_info*.json",
    "dataset_dict.json",
    "state.json",
    "package*.json",
    "cache-*.arrow",
    "indices*.arrow",
)
"""Names of files that lie in folders of text and are none; read only if they are given themselves."""
UNIT_BYTES = 64 << 20
"""Input that one worker takes at a time, and that a crash can make us read again."""
DIVISIBLE = (".jsonl", ".parquet")
"""Types of which a part can be read without what stands before it; other files are read as a whole."""


REQUESTS = 16
"""Files of a store that are asked for at the same time."""
SHOWN = 8
"""Kinds of ignored files that are named."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read. Its contents are known by path, size and time of change, as by `make` and rsync:
    hashing the contents would read terabytes once more to learn that nothing has changed."""

    path: Store
    name: str
    """Path below the folder that was given, with that folder's name: free of where the folder lies."""
    size: int
    mtime_ns: int

    @property
    def identity(self) -> tuple[str, int, int]:
        """JSON values that change with the file."""
        return self.name, self.size, self.mtime_ns

    @property
    def is_divisible(self) -> bool:
        """Whether several workers may each read a part of it."""
        return suffix_of(self.path) in DIVISIBLE

    def is_known_as(self, identity: Sequence[str | int]) -> bool:
        """Whether that is this file's identity, but for the name of the folder that was given, which may change."""
        below = [str(name).partition("/")[2] or name for name in (self.name, identity[0])]
        return below[0] == below[1] and [self.size, self.mtime_ns] == list(identity[1:])


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """All files of a run, in the order in which they are read."""

    files: tuple[InputFile, ...]
    counts: Counter[str]
    """ignored_files (of other types), hidden_names, dangling_links and repeated_files in the given folders."""
    note: str
    """What was left out of folders, by suffix and name; empty if nothing was."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def same_files(files: Sequence[InputFile], identities: Sequence[Sequence[str | int]]) -> bool:
    """Whether files are those of the identities, in this order."""
    return len(files) == len(identities) and all(
        file.is_known_as(identity) for file, identity in zip(files, identities, strict=True)
    )


def suffix_of(path: Path | Store) -> str:
    """The input suffix that `path` ends with; empty if it is of another type."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def find_inputs(paths: Sequence[Path | Store], out: Store | None) -> InputFiles:
    """The input files at `paths`, folders searched in sorted order; raises ConfigError or CorpusError."""
    found: dict[object, InputFile] = {}
    left = _LeftOut()
    for place in map(store_of, paths):
        given = place.path
        if given is None:
            if out is not None and f"{out}/".startswith(f"{place}/"):
                raise ConfigError(f"{out}: --out lies inside the input {place}; choose another place.")
            files = _in_a_store(place, left)
            left.repeated += sum(str(file.path) in found for file in files)
            found |= {str(file.path): file for file in files if str(file.path) not in found}
            continue
        if not given.exists():
            raise ConfigError(f"{given}: no such file or folder; check the path of this input.")
        if out is not None and out.path is not None and out.path.resolve().is_relative_to(given.resolve()):
            raise ConfigError(f"{out}: --out lies inside the input {given}; choose a folder outside of it.")
        if not given.is_dir() and not suffix_of(given):
            raise ConfigError(f"{given}: not a type of input; expected one of: {', '.join(SUFFIXES)}.")
        for path in sorted(_files_in(given, left)) if given.is_dir() else [given]:
            real = path.resolve()
            left.repeated += real in found
            found.setdefault(real, describe(path, _name(path, given)))
    if not found:
        raise CorpusError(
            f"{', '.join(map(str, paths))}: no input file ({left.note or 'empty'}); expected {', '.join(SUFFIXES)}."
        )
    return InputFiles(files=tuple(found.values()), counts=left.counts, note=left.note)


@dataclass
class _LeftOut:
    """What is not read of folders."""

    ignored: Counter[str] = field(default_factory=Counter)
    """Files by suffix, or by name where the suffix is one of ours."""
    hidden: int = 0
    dangling: list[str] = field(default_factory=list)
    repeated: int = 0

    @property
    def counts(self) -> Counter[str]:
        return Counter(
            ignored_files=self.ignored.total(),
            hidden_names=self.hidden,
            dangling_links=len(self.dangling),
            repeated_files=self.repeated,
        )

    @property
    def note(self) -> str:
        most = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        kinds = [f"{count:,} {kind}" for kind, count in most[:SHOWN]]
        parts = [
            f"{self.ignored.total():,} of other types: {', '.join(kinds)}" if kinds else "",
            f"{self.hidden:,} hidden names" if self.hidden else "",
            f"{len(self.dangling):,} links to nothing, such as {self.dangling[0]}" if self.dangling else "",
            f"{self.repeated:,} files that were read by another name" if self.repeated else "",
        ]
        return "; ".join(filter(None, parts))


def _files_in(given: Path, left: _LeftOut) -> Iterator[Path]:
    """Input files below a folder but for hidden names; links to folders are followed last, and no folder twice."""
    folders, seen = [given], set[Path]()
    links: list[Path] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        if (real := folder.resolve()) in seen:
            left.repeated += 1
            continue
        seen.add(real)
        for path in sorted(folder.iterdir(), reverse=True):
            if path.name.startswith("."):
                left.hidden += 1
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif not path.exists():
                left.dangling.append(str(path))
            elif any(fnmatch(path.name.lower(), name.lower()) for name in NO_TEXT):
                left.ignored[path.name] += 1
            elif not suffix_of(path) or not path.is_file():
                left.ignored[path.suffix.lower() or "without a suffix"] += 1
            else:
                yield path


def _in_a_store(given: Store, left: _LeftOut) -> list[InputFile]:
    """The file of an object store, or those below a prefix but for hidden names; raises ConfigError."""
    if suffix_of(given) and given.is_file():
        return [describe(given, given.name)]
    names: list[tuple[Store, str]] = []
    folders = [(given, given.name)]
    while folders:
        folder, name = folders.pop()
        for part in sorted(folder.names(), reverse=True):
            place, below = folder / part, f"{name}/{part}" if name else part
            if part.startswith("."):
                left.hidden += 1
            elif any(fnmatch(part.lower(), pattern.lower()) for pattern in NO_TEXT):
                left.ignored[part] += 1
            elif suffix_of(place):
                names.append((place, below))
            elif "." in part and place.is_file():
                left.ignored[f".{part.rpartition('.')[2].lower()}"] += 1
            else:
                folders.append((place, below))
    if not names:
        raise ConfigError(f"{given}: no such file, and none of text below it; expected {', '.join(SUFFIXES)}.")
    return map_in_threads(lambda pair: describe(*pair), sorted(names, key=lambda pair: pair[1]), REQUESTS)


def describe(path: Path | Store, name: str) -> InputFile:
    """The file at `path` as it is now; raises FileNotFoundError."""
    place = store_of(path)
    size, mtime_ns = place.size_and_time()
    return InputFile(path=place, name=name, size=size, mtime_ns=mtime_ns)


@dataclass(frozen=True, slots=True)
class Piece:
    """The records of a file that begin in a range of its bytes."""

    file: InputFile
    start: int
    stop: int

    @classmethod
    def whole(cls, file: InputFile) -> "Piece":
        """All of a file."""
        return cls(file, 0, file.size)

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def identity(self) -> tuple[str, int, int, int, int]:
        """JSON values that change with the file or the range."""
        return *self.file.identity, self.start, self.stop


def divide(files: Sequence[InputFile], unit_bytes: int) -> list[tuple[Piece, ...]]:
    """Units of work: consecutive pieces, of at most `unit_bytes` or one larger file that is indivisible.

    What stands before a byte decides how it is divided, and nothing behind it: files that are added at the end, and
    bytes that a divisible file grows by, leave the units before them as they were.
    """
    units: list[list[Piece]] = []
    used = 0
    for file in files:
        step = unit_bytes if file.is_divisible else max(file.size, 1)
        for start in range(0, max(file.size, 1), step):
            piece = Piece(file, start, min(start + step, file.size))
            if not units or used + piece.size > unit_bytes:
                units.append([])
                used = 0
            units[-1].append(piece)
            used += piece.size
    return [tuple(unit) for unit in units]


def _name(path: Path, given: Path) -> str:
    return (Path(given.resolve().name) / path.relative_to(given)).as_posix() if path != given else path.name
