"""Checking a whole cache: every file against its checksum, every sequence against the schema."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import CacheCorruptError, CacheError
from pipeline.manifest import CacheManifest
from pipeline.runs.commits import SHARDS, ShardCommit, commit_path, read_commit
from pipeline.shards.containers import CONTAINERS
from pipeline.shards.layout import ShardLayout, targets_of
from pipeline.shards.reader import check_shard_file, layout_of_commit
from pipeline.targets import SparseTargets


@dataclass
class VerifyReport:
    """What `verify_cache` found; the cache is sound if `problems` is empty."""

    num_partitions: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify_cache(folder: Path, progress: Callable[[int], None] = lambda tokens: None) -> VerifyReport:
    """Check every partition of the cache; each problem names its file. Raises CacheError without a manifest."""
    manifest = CacheManifest.read(folder)
    report = VerifyReport(num_partitions=manifest.num_partitions)
    keys: dict[bytes, int] = {}
    for partition in range(manifest.num_partitions):
        try:
            commit = _verify_partition(folder, manifest, partition, keys)
        except CacheError as problem:
            report.problems.append(str(problem))
            continue
        report.num_sequences += commit.num_sequences
        report.num_tokens += commit.num_tokens
        report.num_targets += commit.num_targets
        report.bytes += commit.bytes
        progress(commit.num_tokens)
    if not report.problems and report.num_targets != manifest.num_targets:
        report.problems.append(f"{folder}: {report.num_targets} targets; the manifest says {manifest.num_targets}.")
    return report


def _verify_partition(folder: Path, manifest: CacheManifest, partition: int, keys: dict[bytes, int]) -> ShardCommit:
    commit = read_commit(folder, partition)
    if commit is None:
        raise CacheCorruptError(
            f"{commit_path(folder, partition)}: missing; partition {partition} is not captured yet."
        )
    expected = manifest.partitions[partition + 1] - manifest.partitions[partition]
    if commit.num_sequences != expected:
        raise CacheCorruptError(f"{commit_path(folder, partition)}: {commit.num_sequences} sequences of {expected}.")
    path = folder / SHARDS / commit.file
    check_shard_file(path, commit)
    layout = layout_of_commit(manifest, commit)
    with closing(CONTAINERS[manifest.container].open(path, layout)) as shard:
        columns = shard.columns(0, commit.num_sequences)
    for problem in _contradictions(columns, manifest, layout):
        raise CacheCorruptError(f"{path}: {problem}; delete its commit record and capture again.")
    for key in map(bytes, columns["key"]):
        if keys.setdefault(key, partition) != partition:
            raise CacheCorruptError(f"{path}: sequence {key.hex()} is in partition {keys[key]} too.")
    return commit


def _contradictions(columns: dict[str, np.ndarray], manifest: CacheManifest, layout: ShardLayout) -> list[str]:
    targets = targets_of(columns, layout)
    ids, draws, logits = targets.ids, targets.draws, targets.logits
    ordered = np.sort(ids, axis=1)
    rules = {
        "token ids outside the vocabulary": _within(columns["token_ids"], manifest.vocab_size),
        "target ids outside the vocabulary": _within(ids, manifest.vocab_size),
        "target ids that repeat in a row": bool((ordered[:, 1:] != ordered[:, :-1]).all()),
        "logits that are not in falling order from 0": bool(
            (logits[:, :1] == 0).all() and (np.diff(logits) <= 0).all()
        ),
        "a logsumexp that is not finite": bool(np.isfinite(targets.logsumexps).all()),
        "a tail mass above 1": bool((targets.tail_logprobs <= 1e-3).all()),
        "an entropy that is not finite": bool(np.isfinite(targets.entropies).all()),
        "probabilities that do not sum to 1": _sums_to_one(targets),
        "draws outside the vocabulary": _within(draws[(draws != -1).all(1)], manifest.vocab_size),
        "draws from the stored ids": not any((ids == column[:, None]).any() for column in draws.T),
    }
    return [problem for problem, holds in rules.items() if not holds]


def _within(ids: np.ndarray, vocab_size: int) -> bool:
    return ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size)


def _sums_to_one(targets: SparseTargets) -> bool:
    totals = [targets.probs(T).sum(axis=1) + targets.tail_mass(T) for T in targets.temperatures]
    return all(np.allclose(total, 1.0, atol=1e-3) for total in totals)
