"""The command `pipeline prepare`: a plan, workers that do its tasks, a finished corpus.

The same inputs, settings and tokenizer give the same files, whatever the number of workers, and however often they were
killed: a task is done as a whole or not at all.
"""

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from pipeline.cache.commits import list_commits
from pipeline.corpus import MANIFEST, PARTITIONS, TOKENIZER, CorpusManifest
from pipeline.cpu import available_cores
from pipeline.documents import entry_of, printable
from pipeline.errors import ConfigError, CorpusError
from pipeline.files import held, remove_partials
from pipeline.hub import located
from pipeline.parallel import crew
from pipeline.progress import Reporter
from pipeline.runs.failures import forget_failures
from pipeline.runs.outline import UNITS
from pipeline.runs.rank import Rank, rank_from_environment
from pipeline.runs.terms import RunTerms
from pipeline.settings import resolved
from pipeline.stores.store import Store
from pipeline.tokenizer import TokenizerIdentity, identify, load_tokenizer
from stages.prepare.inputs import UNIT_BYTES, InputFiles, find_inputs, same_files
from stages.prepare.near_duplicates import require_datasketch
from stages.prepare.plan import LOCK, Plan, begin, check_folder, check_same, remove_run
from stages.prepare.quality import rules_of
from stages.prepare.settings import PrepareConfig
from stages.prepare.staging import STAGED
from stages.prepare.tasks import Speed, Tasks, counts_of
from stages.prepare.worker import Manners, work

OF_THE_RUN = ("workers", "worker_from_env", "lease_s", "max_failures", "retry_failed")
"""Settings that have no say in what the corpus is."""
LOCAL_POLL_S = 0.2
"""Seconds between two looks of a process that waits for others of its machine."""


def prepare(config: PrepareConfig, reporter: Reporter | None = None, *, unit_bytes: int = UNIT_BYTES) -> CorpusManifest:
    """Write the corpus that `config` describes and return its manifest; a finished one is returned as it is.

    Raises ConfigError or CorpusError. After a crash or an error, the same call goes on.
    """
    reporter = reporter or Reporter()
    config = located(config, "tokenizer", reporter, with_weights=False)
    plan, tokenizer = _begun(config, reporter, unit_bytes)
    if isinstance(plan, CorpusManifest):
        return plan
    if config.retry_failed:
        forget_failures(config.out / UNITS)
    if (local := config.out.path) is not None:
        for name in ("", PARTITIONS, TOKENIZER, UNITS):
            remove_partials(local / name)
    if tokenizer.eos_token_id is None:
        reporter.note(f"{config.tokenizer}: has no end-of-sequence token; what does not end with one stays without.")
    with _alone(config):
        if not (config.out / MANIFEST).is_file():  # another may have finished it since
            _do(config, plan, tokenizer, reporter)
        manifest = CorpusManifest.read(config.out)
        _tidy(config)
    reporter.log(f"{config.out}: {_summary(manifest)}")
    return manifest


def plan_corpus(config: PrepareConfig, reporter: Reporter | None = None) -> None:
    """Check everything that can be checked and write the plan, for workers that are started then."""
    reporter = reporter or Reporter()
    _begun(located(config, "tokenizer", reporter, with_weights=False), reporter, UNIT_BYTES)


def _begun(config: PrepareConfig, reporter: Reporter, unit_bytes: int) -> tuple[Plan | CorpusManifest, Any]:
    """The plan, written if need be, or the manifest of a corpus that is finished; and the tokenizer."""
    if config.near_duplicates is not None:
        require_datasketch()
    check_folder(config.out)
    plan = _plan_there(config.out) if config.worker_from_env else None
    inputs = find_inputs(config.inputs, config.out) if plan is None else None
    if inputs is not None and inputs.note:
        reporter.note(f"{', '.join(map(str, config.inputs))}: not read: {inputs.note}")
    tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code, note=reporter.note)
    settings = _compared_settings(config, tokenizer, identify(tokenizer))
    if plan is not None:
        check_same(config.out, plan.settings, settings)
        is_finished = (config.out / MANIFEST).is_file()
        return CorpusManifest.read(config.out) if is_finished else plan, tokenizer
    assert inputs is not None
    return _planned(config, settings, tokenizer, inputs, reporter, unit_bytes), tokenizer


def _planned(
    config: PrepareConfig,
    settings: dict[str, Any],
    tokenizer: Any,
    inputs: InputFiles,
    reporter: Reporter,
    unit_bytes: int,
) -> Plan | CorpusManifest:
    """The plan for these inputs, written if need be, or the manifest of their finished corpus."""
    if manifest := _finished(config, settings, inputs, reporter):
        return manifest
    with _alone(config):
        if manifest := _finished(config, settings, inputs, reporter):  # by the process that held the lock
            return manifest
        about = {name: value for name, value in resolved(config).items() if name not in OF_THE_RUN}
        plan = Plan.of(inputs.files, unit_bytes, settings, about, config.skip_bad_lines, dict(inputs.counts))
        return begin(config.out, plan, tokenizer, trust_remote_code=config.trust_remote_code)


def _plan_there(out: Store) -> Plan | None:
    try:
        return Plan.read(out)
    except FileNotFoundError:
        return None


@contextmanager
def _alone(config: PrepareConfig) -> Iterator[None]:
    """Hold a corpus on this machine against others that a person has started: a launcher's workers share it."""
    local = config.out.path
    if local is None or config.worker_from_env:
        yield
        return
    path = local / UNITS / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path, ConfigError(f"{local}: another `pipeline prepare` writes there; wait, or choose another.")):
        yield


@dataclass(frozen=True)
class _Member:
    """A process that shares the work."""

    config: PrepareConfig
    rank: Rank
    manners: Manners


def _do(config: PrepareConfig, plan: Plan, tokenizer: Any, reporter: Reporter) -> None:
    """Finish the corpus, by this process or by several."""
    first = rank_from_environment() if config.worker_from_env else Rank(0, 1)
    wanted = config.workers or (1 if config.worker_from_env else available_cores())
    count = min(wanted, len(plan.pieces))
    manners = Manners(
        RunTerms(max_failures=config.max_failures, lease_s=config.lease_s),
        launched=config.worker_from_env,
        poll_s=None if config.worker_from_env else LOCAL_POLL_S,
    )
    done = list_commits(config.out / UNITS) & set(plan.tokenising)
    speed = Speed()
    with reporter.progress("prepare", plan.num_bytes, "bytes") as progress:
        progress.recall(sum(piece.size for unit in done for piece in plan.units[unit]))

        def advance(num_bytes: int, documents: int, tokens: int) -> None:
            progress.advance(num_bytes, speed.note(documents, tokens))

        if count == 1:
            rank = Rank(first.worker, first.workers)
            work(functools.partial(Tasks, config, plan, tokenizer, reporter), plan, rank, manners, reporter, advance)
            return
        members = [
            _Member(config, Rank(first.worker * count + index, first.workers * count), manners)
            for index in range(count)
        ]
        _share(members, reporter, advance)


def _share(members: list[_Member], reporter: Reporter, advance: Callable[[int, int, int], None]) -> None:
    """Several processes; the first failure of one is raised here."""

    def hear(message: tuple[Any, ...]) -> None:
        if isinstance(message[0], str):
            reporter.write(*message)
        else:
            advance(*message)

    def lost(member: _Member, code: int) -> None:
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        reporter.note(f"worker {member.rank.worker} ended with {name}; others take what it had in hand")

    with _environment(TOKENIZERS_PARALLELISM="false"):  # each has a core
        num_done = crew(_work, members, hear, lost)
    if not num_done:
        raise CorpusError(
            f"{members[0].config.out}: all {len(members)} workers were killed, perhaps for want of memory; run the "
            "same command again to continue, with fewer --workers."
        )


def _work(member: _Member, tell: Callable[[Any], None]) -> None:
    """What a process of several does."""
    config, reporter = member.config, _Telling(tell)
    tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    plan = Plan.read(config.out)
    make_tasks = functools.partial(Tasks, config, plan, tokenizer, reporter)
    work(make_tasks, plan, member.rank, member.manners, reporter, lambda *done: tell(done))


class _Telling(Reporter):
    """Hands lines to the process that has started this one."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell

    def write(self, line: str, level: int) -> None:
        """Hand a line over."""
        self._tell((line, level))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that processes started inside inherit, unless they are set already."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def _tidy(config: PrepareConfig) -> None:
    """Remove what a finished corpus needs no more; where a launcher's workers may still look, their records stay."""
    if config.worker_from_env:
        (config.out / UNITS / STAGED).remove_tree()
    else:
        remove_run(config.out)


def _compared_settings(config: PrepareConfig, tokenizer: Any, identity: TokenizerIdentity) -> dict[str, Any]:
    """What decides the tokens, other than the inputs; `skip_bad_lines` does so only where a record was skipped."""
    template = tokenizer.chat_template
    return {
        "sequence_length": config.sequence_length,
        "text_field": config.text_field,
        "packing": config.packing,
        "overlong": config.overlong,
        "last_turn_only": config.last_turn_only,
        "partition_tokens": config.partition_tokens,
        "source_field": config.source_field,
        "source_weights": list(config.source_weights) or None,
        "quality": list(rules_of(config.quality)) or None,  # none in what earlier versions made
        "near_duplicates": config.near_duplicates,
        **{f"tokenizer_{name}": value for name, value in identity.to_dict().items()},
        "tokenizer_special_ids": list(tokenizer("", verbose=False)["input_ids"]),
        "tokenizer_eos_id": tokenizer.eos_token_id,
        "chat_template": None if template is None else xxhash.xxh3_128_hexdigest(repr(template).encode()),
    }


def _finished(
    config: PrepareConfig, settings: dict[str, Any], inputs: InputFiles, reporter: Reporter
) -> CorpusManifest | None:
    """The manifest in `out`, if there is one; raises ConfigError if it is not of this run."""
    if not (config.out / MANIFEST).is_file():
        return None
    manifest = CorpusManifest.read(config.out)
    check_same(config.out, manifest.settings, settings)
    if manifest.statistics.get("bad_lines") and not config.skip_bad_lines:
        check_same(config.out, manifest.settings, {"skip_bad_lines": False})
    where, kind = f"{config.out / MANIFEST}: settings", list[tuple[str, int, int]]
    found = entry_of(manifest.settings, "input_files", kind, [], where, CorpusError)
    wanted = [file.identity for file in inputs.files]
    if not same_files(inputs.files, found):
        changed = [identity for identity in [*wanted, *found] if identity not in found or identity not in wanted]
        name = printable(changed[0][0]) if changed else "their order"
        raise ConfigError(
            f"{config.out}: was made from {len(found)} input files, this run has {len(wanted)}, and {name} differs "
            "(path, size or time of change); choose another --out, or delete this folder."
        )
    _tidy(config)
    if config.rejected is not None and not config.rejected.is_file():
        reporter.note(f"{config.rejected}: cannot be listed again for a finished corpus; delete {config.out} to do so.")
    reporter.log(f"{config.out}: already finished by the same settings and inputs; {_summary(manifest)}")
    return manifest


def _summary(manifest: CorpusManifest) -> str:
    return (
        f"{manifest.num_sequences:,} sequences, {manifest.num_tokens:,} tokens, {manifest.num_targets:,} targets "
        f"from {counts_of(manifest)}."
    )
