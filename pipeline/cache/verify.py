"""Checking a whole cache: every file against its checksum, every value against the schema."""

import functools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.cache.commits import SHARDS, ShardCommit, commit_path, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import COPY, MANIFEST, TOKENIZER
from pipeline.cache.shard import StoredShard
from pipeline.cpu import available_cores
from pipeline.errors import CacheCorruptError, CacheError
from pipeline.formats.layout import ShardLayout, rows_of, targets_of
from pipeline.parallel import in_threads
from pipeline.stores.sealed import read_small
from pipeline.stores.store import Store
from pipeline.targets import SparseTargets, TargetSpec

BLOCK_TARGETS = 4096
"""Targets that are read at a time: of more, the memory is new each time, which takes longer than the work."""
BLOCK_ROWS = 1024
"""Targets that are checked at a time, so that they stay in a core's cache."""


@dataclass
class VerifyReport:
    """What `verify_cache` found; the cache is sound if `problems` is empty."""

    num_partitions: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    """Partitions whose record or shard is not as it was written."""
    missing: list[int] = field(default_factory=list)
    """Partitions that are not captured yet."""
    tokenizer_damaged: bool = False


@dataclass
class _Outcome:
    partition: int
    commit: ShardCommit | None = None
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 16), np.uint8))
    problem: str = ""
    missing: bool = False


def verify_cache(
    folder: str | Path | Store, progress: Callable[[int], None] = lambda tokens: None, workers: int | None = None
) -> VerifyReport:
    """Check every partition of the cache; each problem names its file. Raises CacheError without a manifest.

    Shards are read once, by as many threads as there are cores: hashing, decoding and checking all
    let the others run.
    """
    cache = CacheFolder(folder)
    folder, manifest = cache.folder, cache.manifest
    report = VerifyReport(num_partitions=manifest.num_partitions)
    verify = functools.partial(_verify_partition, cache)
    outcomes: dict[int, _Outcome] = {}
    for outcome in in_threads(verify, range(manifest.num_partitions), workers or available_cores()):
        outcomes[outcome.partition] = outcome
        progress(outcome.commit.num_tokens if outcome.commit is not None else 0)
    for partition in range(manifest.num_partitions):
        _add(report, outcomes[partition])
    for partition, problem in _duplicates(folder, [outcomes[part] for part in sorted(outcomes)]):
        report.problems.append(problem)
        report.damaged.append(partition)
    hashes = (folder / TOKENIZER).hashes() if manifest.tokenizer_files else {}
    for name, wanted in manifest.tokenizer_files.items():
        if hashes.get(name) != wanted:
            report.problems.append(f"{folder / TOKENIZER / name}: missing, or its checksum is not the manifest's.")
            report.tokenizer_damaged = True
    try:
        cache.fitted_sketch()
    except CacheCorruptError as exc:
        report.problems.append(f"{exc} Nothing makes it again: take it from a copy of the cache.")
    if not _equals_manifest(folder / COPY, folder / MANIFEST):
        report.problems.append(
            f"{folder / COPY}: is not the manifest's copy; `pipeline verify --repair` makes it again."
        )
    if not report.problems and report.num_targets != manifest.num_targets:
        report.problems.append(f"{folder}: {report.num_targets} targets; the manifest says {manifest.num_targets}.")
    return report


def _equals_manifest(copy: Store, manifest: Store) -> bool:
    try:
        return read_small(copy, CacheCorruptError) == read_small(manifest, CacheCorruptError)
    except FileNotFoundError:
        return True  # its writer was killed before it made the copy
    except CacheCorruptError:
        return False


def _add(report: VerifyReport, outcome: _Outcome) -> None:
    if outcome.problem:
        report.problems.append(outcome.problem)
        (report.missing if outcome.missing else report.damaged).append(outcome.partition)
    if outcome.commit is not None:
        report.num_sequences += outcome.commit.num_sequences
        report.num_tokens += outcome.commit.num_tokens
        report.num_targets += outcome.commit.num_targets
        report.bytes += outcome.commit.bytes


def _verify_partition(cache: CacheFolder, partition: int) -> _Outcome:
    record, manifest = commit_path(cache.folder, partition), cache.manifest
    try:
        commit = read_commit(cache.folder, partition)
        if commit is None:
            problem = f"{record}: missing; partition {partition} is not captured yet."
            return _Outcome(partition, problem=problem, missing=True)
        expected = manifest.partitions[partition + 1] - manifest.partitions[partition]
        if commit.num_sequences != expected:
            raise CacheCorruptError(f"{record}: {commit.num_sequences} sequences of {expected}.")
        stored = StoredShard.of(cache.folder, manifest, commit)
        return _Outcome(partition, commit, _verify_shard(stored, manifest.vocab_size))
    except CacheError as problem:
        return _Outcome(partition, problem=str(problem))


def _verify_shard(stored: StoredShard, vocab_size: int) -> np.ndarray:
    """The keys of a sound shard; raises CacheCorruptError."""
    commit = stored.commit
    step = max(1, BLOCK_TARGETS * commit.num_sequences // max(commit.num_targets, 1))
    keys = []
    with closing(stored.open(check=True)) as shard:
        for start in range(0, commit.num_sequences, step):
            columns = shard.columns(start, min(start + step, commit.num_sequences))
            for problem in _contradictions(columns, stored.layout, vocab_size):
                raise CacheCorruptError(f"{stored.place}: {problem}; `pipeline verify --repair` drops the shard.")
            keys.append(np.array(columns["key"]))
    return np.concatenate(keys)


def _duplicates(folder: Store, outcomes: list[_Outcome]) -> Iterator[tuple[int, str]]:
    """Partitions that hold a sequence of an earlier one, each once."""
    keys = np.concatenate([outcome.keys for outcome in outcomes]).view(np.uint64)
    partitions = np.repeat([outcome.partition for outcome in outcomes], [len(outcome.keys) for outcome in outcomes])
    order = np.lexsort((partitions, keys[:, 1], keys[:, 0]))
    same = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]).all(1))
    first, second = order[same], order[same + 1]
    for partition in sorted(set(partitions[second].tolist())):
        index = int(np.flatnonzero(partitions[second] == partition)[0])
        commit = outcomes[partition].commit
        assert commit is not None
        key, other = keys[second[index]].tobytes().hex(), partitions[first[index]]
        yield partition, f"{folder / SHARDS / commit.file}: sequence {key} is in partition {other} too."


def _contradictions(columns: dict[str, np.ndarray], layout: ShardLayout, vocab_size: int) -> list[str]:
    """What the values of some sequences cannot be."""
    found = [] if _within(columns["token_ids"], vocab_size) else ["token ids outside the vocabulary"]
    for start in range(0, len(columns["entropies"]), BLOCK_ROWS):
        rows = rows_of(columns, slice(start, start + BLOCK_ROWS), layout)
        with np.errstate(all="ignore"):  # of impossible values comes what is found to be so
            targets = targets_of(rows, layout)
            found += _contradictions_of_rows(targets, vocab_size)
            if layout.spec.is_ragged:
                found += _contradictions_of_counts(targets, rows["counts"], layout.spec)
    return list(dict.fromkeys(found))


def _contradictions_of_counts(targets: SparseTargets, counts_N: np.ndarray, spec: TargetSpec) -> list[str]:
    """What numbers of entries cannot be."""
    rules = {
        "logits that are not finite": np.array_equal(targets.counts, counts_N),
        f"targets of fewer than {spec.min_k} entries": int(counts_N.min(initial=spec.top_k)) >= (spec.min_k or 1),
    }
    return [problem for problem, holds in rules.items() if not holds]


def _contradictions_of_rows(targets: SparseTargets, vocab_size: int) -> list[str]:
    ids, draws, logits = targets.ids, targets.draws, targets.logits
    own = ids
    if targets.is_ragged:  # places without entry get an id each that no entry has
        own = np.where(logits > -np.inf, ids, vocab_size + np.arange(ids.shape[1], dtype=np.int32))
    ordered = np.sort(own, axis=1)
    ends = ids if targets.is_ragged or not ids.size else ordered[:, [0, -1]]
    rules = {
        "target ids outside the vocabulary": _within(ends, vocab_size),
        "target ids that repeat in a row": bool((ordered[:, 1:] != ordered[:, :-1]).all()),
        "logits that are not in falling order from 0": bool(
            (logits[:, :1] == 0).all() and (logits[:, 1:] <= logits[:, :-1]).all()
        ),
        "a logsumexp that is not finite": bool(np.isfinite(targets.logsumexps).all()),
        "a tail mass above 1": bool((targets.tail_logprobs <= 1e-3).all()),
        "an entropy that is not finite": bool(np.isfinite(targets.entropies).all()),
        "probabilities that do not sum to 1": _sums_to_one(targets),
        "draws outside the vocabulary": _within(draws[(draws != -1).all(1)], vocab_size),
        "draws from the stored ids": not any((ids == column[:, None]).any() for column in draws.T),
    }
    return [problem for problem, holds in rules.items() if not holds]


def _within(ids: np.ndarray, vocab_size: int) -> bool:
    return ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size)


def _sums_to_one(targets: SparseTargets) -> bool:
    totals = [targets.probs(T).sum(axis=1) + targets.tail_mass(T) for T in targets.temperatures]
    return all(np.allclose(total, 1.0, atol=1e-3) for total in totals)
