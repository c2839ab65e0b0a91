"""The plan of a preparation: which files are read, by which settings, and into which units they are divided.

Written once; any number of workers go by it. The plan does not depend on the workers.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.cache.commits import COMMITS, list_commits
from pipeline.corpus import MANIFEST, TOKENIZER
from pipeline.documents import Count, Text, short
from pipeline.errors import ConfigError, CorpusError
from pipeline.files import PARTIAL
from pipeline.processes import owner_is_dead
from pipeline.runs.ephemeral import server_time
from pipeline.runs.failures import FAILURES
from pipeline.runs.leases import LEASES, list_leases, read_lease
from pipeline.runs.outline import UNITS, WrittenOutline
from pipeline.runs.terms import read_terms
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_document, write_json
from pipeline.stores.store import Store
from pipeline.tokenizer import save_tokenizer
from stages.prepare.duplicates import num_buckets
from stages.prepare.inputs import InputFile, Piece, divide
from stages.prepare.staging import STAGED, FinishedTask

PLAN = "plan.json"
LOCK = "lock"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be read, and by which settings."""

    settings: dict[str, Any]
    """What decides the tokens, other than the inputs."""
    resolved: dict[str, Any]
    """All settings, for the manifest."""
    skip_bad_lines: bool
    files: list[tuple[Text, Text, int, int]]
    """Path or URL, name, size and time of change of every input, in the order of the input."""
    pieces: list[list[tuple[Count, int, int]]]
    """Of every unit: the number of a file, and its first byte and the one behind its last."""
    counts: dict[str, Count]
    """What was left out of the inputs."""

    @classmethod
    def of(
        cls,
        files: Sequence[InputFile],
        unit_bytes: int,
        settings: dict[str, Any],
        resolved: dict[str, Any],
        skip_bad_lines: bool,
        counts: dict[str, int],
    ) -> "Plan":
        """The plan for these inputs."""
        numbers = {id(file): number for number, file in enumerate(files)}
        units = divide(files, unit_bytes)
        return cls(
            settings=settings,
            resolved=resolved,
            skip_bad_lines=skip_bad_lines,
            files=[(str(file.path), *file.identity) for file in files],
            pieces=[[(numbers[id(piece.file)], piece.start, piece.stop) for piece in unit] for unit in units],
            counts=counts,
        )

    @classmethod
    def read(cls, out: Store) -> "Plan":
        """The plan of the corpus in `out`; raises FileNotFoundError, CorpusError."""
        return read_document(out / UNITS / PLAN, cls, CorpusError)

    @cached_property
    def units(self) -> list[tuple[Piece, ...]]:
        """The pieces of every unit, in the order of the input."""
        files = [
            InputFile(path=store_of(path), name=name, size=size, mtime_ns=mtime_ns)
            for path, name, size, mtime_ns in self.files
        ]
        return [tuple(Piece(files[number], start, stop) for number, start, stop in unit) for unit in self.pieces]

    @property
    def num_bytes(self) -> int:
        """Of all inputs."""
        return sum(size for _, _, size, _ in self.files)

    @property
    def num_buckets(self) -> int:
        return num_buckets(self.num_bytes, len(self.pieces))

    # Numbers of the tasks, one stretch a phase: a phase is begun when those before it are finished.

    @property
    def tokenising(self) -> range:
        """A task a unit: its documents as tokens, and their keys."""
        return range(len(self.pieces))

    @property
    def comparing_documents(self) -> range:
        """A task a bucket: which documents are duplicates."""
        return range(self.tokenising.stop, self.tokenising.stop + self.num_buckets)

    @property
    def packing(self) -> range:
        """A task a unit: its rows in files of the corpus, and their keys."""
        return range(self.comparing_documents.stop, self.comparing_documents.stop + len(self.pieces))

    @property
    def comparing_rows(self) -> range:
        """A task a bucket: which rows are duplicates."""
        return range(self.packing.stop, self.packing.stop + self.num_buckets)

    @property
    def dropping(self) -> range:
        """A task a unit that has duplicates of rows of others: its files without them. The other numbers stay free."""
        return range(self.comparing_rows.stop, self.comparing_rows.stop + len(self.pieces))

    @property
    def finishing(self) -> range:
        """One task: the manifest."""
        return range(self.dropping.stop, self.dropping.stop + 1)

    @property
    def near_duplicates(self) -> range:
        """One task, before all others, if they are to be dropped: which texts are nearly like one before them."""
        return range(self.finishing.stop, self.finishing.stop + (self.settings.get("near_duplicates") is not None))

    @property
    def outline(self) -> WrittenOutline:
        """For `pipeline status`. What is dropped is not counted: that depends on what is found."""
        phases = {
            **({"near duplicates found": self.near_duplicates} if self.near_duplicates else {}),
            "tokenised": self.tokenising,
            "documents compared": self.comparing_documents,
            "packed": self.packing,
            "rows compared": self.comparing_rows,
            "finished": self.finishing,
        }
        spans = {name: (tasks.start, tasks.stop) for name, tasks in phases.items()}
        return WrittenOutline(total=self.num_bytes, unit="bytes of text", phases=spans)


def begin(out: Store, plan: Plan, tokenizer: Any, *, trust_remote_code: bool) -> Plan:
    """The plan in `out`: this one, or one for the same inputs that is there.

    One for other inputs gives way, and the units that both have stay finished. Raises ConfigError if the settings
    differ and something is finished, or if somebody works by the other plan.
    """
    folder = out / UNITS
    try:
        found = Plan.read(out)
    except FileNotFoundError:
        found = None
    if found is not None:
        if list_commits(folder):
            check_same(out, found.settings, plan.settings)
        if _is_same(found, plan) and (out / TOKENIZER).is_dir():
            return found
        if workers := _at_work(folder):
            raise ConfigError(f"{out}: {workers[0]} works there by another plan; wait, or choose another --out.")
    for name in ("", UNITS, f"{UNITS}/{STAGED}", f"{UNITS}/{COMMITS}"):
        (out / name if name else out).mkdir(exist_ok=True)
    if found is None:
        write_json(folder / PLAN, asdict(plan), first_wins=True)
        plan = Plan.read(out)
    else:
        _replace(out, plan)
    plan.outline.write(folder)
    if not (out / TOKENIZER).is_dir():
        _save_tokenizer(out, tokenizer, trust_remote_code)
    return plan


def check_folder(out: Store) -> None:
    """Raise ConfigError if `out` holds anything that is not a corpus of ours."""
    if (out / MANIFEST).is_file() or (out / UNITS / PLAN).is_file():
        return
    if out.is_file():
        raise ConfigError(f"{out}: is a file; --out must name a new or empty folder.")
    if (local := out.path) is not None:
        unlike = (path for path in local.rglob("*") if not path.is_dir() and not _is_ours(path, local))
        foreign = next((path.name for path in unlike), None)
    else:
        foreign = next((name for name in out.names() if name not in (UNITS, TOKENIZER)), None)
    if foreign is not None:
        raise ConfigError(f"{out}: holds other files, such as {foreign}; --out must name a new or empty folder.")


def check_same(out: Store, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError naming the first of `wanted` that `found` has otherwise."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ConfigError(
                f"{out}: was made with {name} {short(found.get(name))}, this run has {short(value)}; "
                "choose another --out, or delete this folder."
            )


def _is_ours(path: Path, out: Path) -> bool:
    """What a process leaves that is killed before it has a plan."""
    return path.parent == out / UNITS and (path.name == LOCK or path.suffix == PARTIAL)


def _is_same(found: Plan, plan: Plan) -> bool:
    """Whether nothing of what is there would be done otherwise."""
    same_settings = (found.settings, found.skip_bad_lines) == (plan.settings, plan.skip_bad_lines)
    return same_settings and (found.files, found.pieces) == (plan.files, plan.pieces)


def _replace(out: Store, plan: Plan) -> None:
    """Put the plan into the place of another; cut short, it leaves the work of one of the two."""
    folder = out / UNITS
    kept = _kept(folder, plan)
    for name in (COMMITS, FAILURES, LEASES):
        for file in (folder / name).names():
            (folder / name / file).unlink(missing_ok=True)
    (out / TOKENIZER).remove_tree()
    write_json(folder / PLAN, asdict(plan))
    for unit, task in kept.items():
        task.commit(folder, unit)


def _kept(folder: Store, plan: Plan) -> dict[int, FinishedTask]:
    """What is finished by another plan, by the numbers of this plan's units."""
    if plan.near_duplicates:
        return {}  # what a unit has dropped depends on the other inputs
    wanted = {_known([piece.identity for piece in unit]): number for number, unit in enumerate(plan.units)}
    kept: dict[int, FinishedTask] = {}
    for number in sorted(list_commits(folder)):
        task = FinishedTask.read(folder, number)
        unit = wanted.get(_known(task.pieces))
        if unit is not None and (plan.skip_bad_lines or not task.statistics.get("bad_lines")):
            kept[unit] = task
    return kept


def _known(pieces: Sequence[tuple[str, int, int, int, int]]) -> tuple[Any, ...]:
    """What a unit is known by: not by the name of the folder that was given, which may change."""
    return tuple((name.partition("/")[2] or name, *rest) for name, *rest in pieces)


def _at_work(folder: Store) -> list[str]:
    """Owners of leases that seem to be alive."""
    now, lease_s = server_time(folder / LEASES), read_terms(folder, {}).lease_s
    leases = [read_lease(folder, *lease) for lease in list_leases(folder).items()]
    alive = [lease for lease in leases if lease is not None and now - lease.time <= lease_s]
    return [lease.text for lease in alive if not owner_is_dead(lease.text)]


def _save_tokenizer(out: Store, tokenizer: Any, trust_remote_code: bool) -> None:
    place = out / TOKENIZER
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / TOKENIZER
        save_tokenizer(tokenizer, saved, trust_remote_code=trust_remote_code)

        def fill(new: Store) -> None:
            for path in sorted(path for path in saved.rglob("*") if path.is_file()):
                target = new
                for part in path.relative_to(saved).parts[:-1]:
                    target = target / part
                    target.mkdir(exist_ok=True)
                (target / path.name).write(path.read_bytes())

        place.build(fill)


def remove_run(out: Store) -> None:
    """Remove the records of a finished corpus."""
    local = out.path
    if local is not None:
        shutil.rmtree(local / UNITS, ignore_errors=True)
        return
    for name in (out / UNITS).names():
        (out / UNITS / name).remove_tree()
    (out / UNITS).remove_tree()
