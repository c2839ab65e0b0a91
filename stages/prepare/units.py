"""What `prepare` has finished, on disk: a unit is a group of input files that is redone as a whole or not at all.

    CORPUS/units/
      settings.json    marks the folder as ours, and says how the unfinished corpus is made
      00000.keys       the 16-byte keys of the unit's documents, against duplicates in later units
      00000.rejected   what of it quality rules and nearness to other texts have dropped, if they are on
      00000.json       written last: a unit without it is not finished
      lock             held by the process that writes

The folder is removed when the corpus is finished.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from pipeline.corpus import MANIFEST, PARTITIONS, CorpusPartition
from pipeline.documents import Count, Hash, short
from pipeline.errors import ConfigError, CorpusError
from pipeline.files import PARTIAL, held, replacing
from pipeline.stores.numbered import numbers_in
from pipeline.stores.sealed import read_document, read_json, write_json
from stages.prepare.inputs import InputFile, same_files

UNITS = "units"
SETTINGS = "settings.json"
LOCK = "lock"
KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class FinishedUnit:
    """The record of one unit."""

    files: list[tuple[str, int, int]]
    """Identities of its input files."""
    partitions: tuple[CorpusPartition, ...]
    statistics: dict[str, Count]
    document_keys: Hash
    """xxh3-128 of the file of keys."""

    def __post_init__(self) -> None:
        """Raise ValueError without the counts that are asked for by name."""
        if not {"bad_lines", "input_bytes"} <= self.statistics.keys():
            raise ValueError("statistics must have bad_lines and input_bytes")


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold the corpus in `out` against other processes; the system frees it even after a kill -9."""
    path = out / UNITS / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path, ConfigError(f"{out}: another `pipeline prepare` writes there; wait, or choose another.")):
        yield


def check_folder(out: Path) -> None:
    """Raise ConfigError if `out` holds anything that is not a corpus of ours."""
    if (out / MANIFEST).is_file() or (out / UNITS / SETTINGS).is_file():
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; --out must name a new or empty folder.")
    for path in out.rglob("*"):
        ours = path.parent == out / UNITS and (path.name == LOCK or path.suffix == PARTIAL)
        if not path.is_dir() and not ours:
            raise ConfigError(f"{out}: holds other files, such as {path.name}; --out must name a new or empty folder.")


def start(out: Path, settings: dict[str, Any]) -> None:
    """Begin a corpus in `out`, or go on with one made by equal settings.

    Raises ConfigError if they differ, unless no unit is finished: then nothing is lost.
    """
    path = out / UNITS / SETTINGS
    if path.is_file() and any((out / UNITS).glob("[0-9]*.json")):
        check_same(out, read_json(path, CorpusError), settings)
    else:
        write_json(path, settings)
    for partial in [*out.glob(f"*{PARTIAL}"), *out.glob(f"*/*{PARTIAL}")]:  # of a run that was killed: we hold the lock
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError naming the first of `wanted` that `found` has otherwise."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{out}: was made with {name} {short(found.get(name))}, this run has {short(value)}; "
                "choose another --out, or delete this folder."
            )


def write_rejected(out: Path, index: int, rejected: Sequence[dict[str, str]]) -> None:
    """What unit `index` has dropped, before it is declared finished."""
    with replacing(_rejected_path(out, index)) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in rejected), encoding="utf-8")


def collect_rejected(out: Path, num_units: int, file: Path) -> None:
    """One list of what all units have dropped, in the order of the inputs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial, partial.open("wb") as target:
        for index in range(num_units):
            target.write(_rejected_path(out, index).read_bytes())


def _rejected_path(out: Path, index: int) -> Path:
    return out / UNITS / f"{index:05d}.rejected"


def commit(
    out: Path,
    index: int,
    files: Sequence[InputFile],
    partitions: Sequence[CorpusPartition],
    statistics: dict[str, int],
    document_keys: bytes,
) -> FinishedUnit:
    """Declare unit `index` finished."""
    path = _keys_path(out, index)
    with replacing(path) as partial:
        partial.write_bytes(document_keys)
    unit = FinishedUnit(
        files=[file.identity for file in files],
        partitions=tuple(partitions),
        statistics=statistics,
        document_keys=xxhash.xxh3_128_hexdigest(document_keys),
    )
    write_json(_record_path(out, index), asdict(unit))
    return unit


def resume(out: Path, units: Sequence[Sequence[InputFile]], skip_bad_lines: bool) -> list[FinishedUnit]:
    """The leading units that are finished and still hold for this run; what follows them is removed.

    An input that was changed, added or mended since costs its own unit and those after it, whose
    duplicates depend on it.
    """
    finished: list[FinishedUnit] = []
    for index, files in enumerate(units):
        path = _record_path(out, index)
        if not path.is_file():
            break
        unit = read_document(path, FinishedUnit, CorpusError)
        if not same_files(files, unit.files) or (unit.statistics["bad_lines"] and not skip_bad_lines):
            break
        finished.append(unit)
    _discard_after(out, finished)
    return finished


def document_keys_of(out: Path, index: int, unit: FinishedUnit) -> list[bytes]:
    """The keys of a finished unit's documents."""
    path = _keys_path(out, index)
    content = path.read_bytes() if path.is_file() else b""
    if xxhash.xxh3_128_hexdigest(content) != unit.document_keys:
        raise CorpusError(f"{path}: missing or not the file that was written; delete {out} and prepare it again.")
    return [content[start : start + KEY_BYTES] for start in range(0, len(content), KEY_BYTES)]


def remove_units(out: Path) -> None:
    """Remove the records of a finished corpus."""
    shutil.rmtree(out / UNITS, ignore_errors=True)


def _discard_after(out: Path, finished: Sequence[FinishedUnit]) -> None:
    names = [path.name for path in (out / UNITS).glob("[0-9]*.json")]
    for (index,) in sorted(numbers_in(names, r"(\d{5,15})\.json"), reverse=True):
        if index >= len(finished):
            _record_path(out, index).unlink(missing_ok=True)
    kept = {partition.file for unit in finished for partition in unit.partitions}
    for path in (out / PARTITIONS).glob("[0-9]*.arrow"):
        if path.name not in kept:
            path.unlink()


def _record_path(out: Path, index: int) -> Path:
    return out / UNITS / f"{index:05d}.json"


def _keys_path(out: Path, index: int) -> Path:
    return out / UNITS / f"{index:05d}.keys"
