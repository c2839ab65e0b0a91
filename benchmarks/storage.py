"""Bytes a token, KL error and speed of caches: ours, other layouts, and what an entropy coder could do.

    python -m benchmarks.storage [--work data/bench] [--sequences 128]

One shard of held-out text at k=64, T=1 and T=2, from two teachers (see benchmarks/storage_teacher.py), each also with
other ids (benchmarks/storage_controls.py). "All" is every byte of the file; "targets" the ids and values alone, which
is all that the other layouts are charged for (they are given the exact normalisers of both temperatures for nothing).
Speeds are tokens a CPU second of one thread: from captured targets to a finished file; from it to checked arrays, a
sequence at a time in random order; and BLOCK sequences at a time in order, as conversion and verification read.
"""

import argparse
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.storage_controls import CONTROLS
from benchmarks.storage_peers import PEERS, Peer, floors, with_blosc
from benchmarks.storage_teacher import SEQUENCE, TEACHERS, TEMPERATURES, load_targets
from pipeline.corpus import TokenSequence
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts, ShardLayout, decode, encode, targets_of
from pipeline.targets import SparseTargets, TargetSpec, concatenate, reconstruction_errors

DEFAULT = "ours: zarr, 1e-4"
Schemes = dict[str, tuple[str, float, Callable[[], AbstractContextManager[None]]]]
"""Container, bound on the KL error, and what is changed while it is measured."""
OURS: Schemes = {
    DEFAULT: ("zarr", 1e-4, nullcontext),
    "ours: zarr, 1e-3": ("zarr", 1e-3, nullcontext),
    "ours: zarr, 1e-5": ("zarr", 1e-5, nullcontext),
    "ours: zarr, lossless": ("zarr", 0.0, nullcontext),
    "ours: arrow, 1e-4": ("arrow", 1e-4, nullcontext),
    "zarr, 1e-4, blosc, zstd 9": ("zarr", 1e-4, partial(with_blosc, 5)),
    "zarr, 1e-4, blosc, zstd 22": ("zarr", 1e-4, partial(with_blosc, 9)),
}
BLOCK = 4
"""Sequences that are read at a time in order."""
TARGET_ARRAYS = ("codes", "modes", "steps", "logits", "vocabulary", "table_")
ROW = "| {:28} | {:>7} | {:>7} | {:>8} | {:>8} | {:>8} | {:>8} | {:>8} |"
HEADINGS = ("scheme", "all", "targets", "KL T=1", "KL T=2", "encode/s", "random/s", "in order")


class Measured(NamedTuple):
    """Of one scheme; None where there is nothing to measure."""

    everything: float | None = None
    """Bytes a target of the whole file."""
    targets: float | None = None
    """Bytes a target of ids and values."""
    errors: Sequence[float] = ()
    """Mean KL error at each temperature, nats."""
    speeds: Sequence[float] = ()
    """Targets a CPU second: encoding, decoding at random, decoding in order."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("data/bench"), help="Folder of the teachers' targets.")
    parser.add_argument("--sequences", type=int, default=128, help=f"Sequences of {SEQUENCE} tokens in the shard.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each measurement; the fastest counts.")
    options = parser.parse_args()
    for teacher in TEACHERS:
        data = load_targets(options.work, teacher, options.sequences)
        _print_table(teacher, *data, OURS, PEERS, options.rounds)
        for name, control in CONTROLS.items():
            _print_table(f"{teacher}, {name}", *control(*data), {DEFAULT: OURS[DEFAULT]}, {}, options.rounds)


def _print_table(
    name: str, tokens: np.ndarray, targets: SparseTargets, ours: Schemes, peers: dict[str, Peer], rounds: int
) -> None:
    tails = [targets.tail_mass(temperature).mean() for temperature in TEMPERATURES]
    entropies = [targets.entropy(temperature).mean() for temperature in TEMPERATURES]
    print(f"\n{name}: {len(tokens):,} tokens, {len(np.unique(targets.ids)):,} distinct ids; at T=1, T=2:", end=" ")
    print("entropy", ", ".join(f"{value:.2f}" for value in entropies), end="; ")
    print("tail mass", ", ".join(f"{tail:.3f}" for tail in tails))
    print(ROW.format(*HEADINGS))
    print(ROW.format(*("-" * 5 for _ in HEADINGS)))
    for scheme, (container, max_kl_error, changed) in ours.items():
        with changed():
            _print_row(scheme, _measure_ours(tokens, targets, container, max_kl_error, rounds))
    for scheme, peer in peers.items():
        _print_row(scheme, _measure_peer(peer, targets))
    for scheme, size in floors(targets).items():
        _print_row(scheme, Measured(targets=size))


def _print_row(scheme: str, found: Measured) -> None:
    sizes = [f"{value:.1f}" if value else "" for value in (found.everything, found.targets)]
    errors = [f"{error:.1e}" for error in found.errors] or ["", ""]
    speeds = [f"{speed / 1e3:,.0f}k" for speed in found.speeds] or ["", "", ""]
    print(ROW.format(scheme, *sizes, *errors, *speeds), flush=True)


def _measure_ours(
    tokens: np.ndarray, targets: SparseTargets, container: str, max_kl_error: float, rounds: int
) -> Measured:
    captured = sequences_of(tokens, targets)
    count = len(captured)
    spec = TargetSpec(top_k=targets.top_k, temperatures=targets.temperatures, max_kl_error=max_kl_error)
    layout = ShardLayout(counts=ShardCounts.of([sequence for sequence, _ in captured]), spec=spec)
    kind = CONTAINERS[container]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"shard{kind.suffix}"

        def write() -> None:
            path.unlink(missing_ok=True)
            writer = kind.create(path, layout)
            for sequence, part in captured:
                writer.append(encode(layout, sequence, part))
            writer.close()

        seconds = [_fastest(write, rounds)]
        shard = kind.open(path, layout)
        order = np.random.default_rng(0).permutation(count).tolist()
        rows = [range(count)[start : start + BLOCK] for start in range(0, count, BLOCK)]
        seconds += [
            _fastest(lambda: [decode(shard.columns(row, row + 1), layout, "") for row in order], rounds),
            _fastest(lambda: [targets_of(shard.columns(part[0], part[-1] + 1), layout) for part in rows], rounds),
        ]
        stored = [targets_of(shard.columns(row, row + 1), layout) for row in range(count)]
        shard.close()
        sizes = [size / layout.counts.num_targets for size in (path.stat().st_size, _target_bytes(path, layout))]
    errors, _ = reconstruction_errors(concatenate([part for _, part in captured]), concatenate(stored))
    return Measured(*sizes, errors.mean(axis=0), [layout.counts.num_targets / value for value in seconds])


def sequences_of(tokens: np.ndarray, targets: SparseTargets) -> list[tuple[TokenSequence, SparseTargets]]:
    """Sequences that carry loss on all tokens but the first, each with copies of its targets."""
    mask = np.arange(SEQUENCE) > 0
    lengths = np.array([SEQUENCE], np.int32)
    found = []
    for start in range(0, len(tokens), SEQUENCE):
        part = targets[start : start + SEQUENCE - 1]
        row = TokenSequence(token_ids=tokens[start : start + SEQUENCE], loss_mask=mask, document_lengths=lengths)
        found.append((row, replace(part, ids=part.ids.copy(), logits=part.logits.copy())))
    return found


def _target_bytes(path: Path, layout: ShardLayout) -> int:
    """Bytes of a shard's ids and values; of Arrow by their types."""
    if path.suffix == ".arrow":
        return layout.counts.num_targets * layout.spec.top_k * 8
    with zipfile.ZipFile(path) as archive:
        return sum(info.file_size for info in archive.infolist() if info.filename.startswith(TARGET_ARRAYS))


def _measure_peer(peer: Peer, targets: SparseTargets) -> Measured:
    size, stored = peer(targets)
    errors = () if stored is None else reconstruction_errors(targets, stored)[0].mean(axis=0)
    return Measured(targets=size, errors=list(errors))


def _fastest(run: Callable[[], object], rounds: int) -> float:
    """CPU seconds."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
