"""Whose a folder is: one command made it, by certain settings, and goes on with nothing else."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.documents import short
from pipeline.errors import ConfigError, PipelineError
from pipeline.files import is_vacant
from pipeline.stores.sealed import read_json, write_json

Differences = dict[str, tuple[Any, Any]]
"""What there is of an entry, and what is asked for, by the entry's name."""


def claim(out: Path, mark: str, record: dict[str, Any], what: str) -> dict[str, Any]:
    """Make the folder, or find it made before; returns what stands in the file `mark`: `record` if it is new.

    Any number of processes may call it. Raises ConfigError if something else than `what` is there.
    """
    path = out / mark
    if not path.is_file():
        if not is_vacant(out) and not path.is_file():  # another process may just begin
            raise ConfigError(f"{out}: exists and holds no {what}; choose another --out or empty it.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, record, first_wins=True)
    return read_json(path, PipelineError)


def entries_that_differ(found: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str]) -> Differences:
    """The entries of these names that are not what is asked for."""
    return {name: (found.get(name), wanted.get(name)) for name in names if found.get(name) != wanted.get(name)}


def told(different: Differences, verb: str = "was", *, quoted: bool = True) -> str:
    """What differs, for a message."""
    return "; ".join(
        f"{name} {verb} {short(old, quoted=quoted)}, now {short(new, quoted=quoted)}"
        for name, (old, new) in different.items()
    )
