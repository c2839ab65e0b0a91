"""What a run was told: how long a lease lasts, and how many failures set a partition aside.

run.json in the folder of the cache. Workers may be told otherwise than those before them: what the last one was told
holds for who reads it. A worker itself goes by its own settings.
"""

import contextlib
import typing
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from msgspec import Meta

from pipeline.cache.manifest import MANIFEST
from pipeline.documents import entry_of
from pipeline.errors import CacheCorruptError
from pipeline.runs.events import EVENTS
from pipeline.runs.failures import FAILURES
from pipeline.runs.heartbeat import WORKERS
from pipeline.runs.leases import LEASES
from pipeline.stores.sealed import read_document, write_json
from pipeline.stores.store import Store

RUN = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunTerms:
    """What the workers of a run go by."""

    max_failures: Annotated[int, Meta(ge=1, le=2**53)] = 3
    """Failures of a partition after which it is set aside."""
    lease_s: Annotated[float, Meta(gt=0, le=1e300)] = 180.0
    """Seconds without a heartbeat after which others take a worker's partitions."""


def begin_run(folder: Store, terms: RunTerms) -> None:
    """Make the folders of a run, and write down what its workers go by."""
    for name in (LEASES, FAILURES, WORKERS, EVENTS):
        (folder / name).mkdir(exist_ok=True)
    told = None
    with contextlib.suppress(FileNotFoundError, CacheCorruptError):  # a damaged one is written anew
        told = read_document(folder / RUN, RunTerms, CacheCorruptError)
    if told != terms:
        write_json(folder / RUN, asdict(terms))


def read_terms(folder: Store, settings: dict[str, Any]) -> RunTerms:
    """What the workers of the run in `folder` go by; raises CacheCorruptError.

    Runs that an earlier version has begun have no record: they go by the settings in the manifest.
    """
    if (folder / RUN).is_file():
        return read_document(folder / RUN, RunTerms, CacheCorruptError)
    defaults, where = RunTerms(), f"{folder / MANIFEST}: settings"
    hints = typing.get_type_hints(RunTerms, include_extras=True)
    return RunTerms(
        **{
            name: entry_of(settings, name, hints[name], default, where, CacheCorruptError)
            for name, default in asdict(defaults).items()
        }
    )
