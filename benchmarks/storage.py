"""Bytes a token, KL error and speed of caches: ours, other layouts, and what an entropy coder could do.

    python -m benchmarks.storage [--work data/bench] [--sequences 128] [--teacher pretrained]

One shard of text at k=64, T=1 and T=2, from three teachers (see benchmarks/storage_teacher.py), the first two also
with other ids (benchmarks/storage_controls.py). "All" is every byte of the file; "targets" the ids and values alone,
which is all that the other layouts are charged for (they are given the exact normalisers of both temperatures for
nothing). Speeds are tokens a CPU second of one thread: from captured targets to a finished file; from it to checked
arrays, a sequence at a time in random order; and BLOCK sequences at a time in order, as conversion and verification
read. Then where the bytes go, by k and by the size of the shard.
"""

import argparse
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.storage_controls import CONTROLS
from benchmarks.storage_peers import PEERS, Peer, floors, with_blosc
from benchmarks.storage_teacher import SEQUENCE, TEACHERS, TEMPERATURES, TOP_K, load_targets
from pipeline.corpus import TokenSequence
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts, ShardLayout, decode, encode, targets_of
from pipeline.targets import SparseTargets, TargetSpec, concatenate, reconstruction_errors

DEFAULT = "ours: zarr, 1e-4"
Captured = Sequence[tuple[TokenSequence, SparseTargets]]
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
TARGET_ARRAYS = ("codes", "topics", "steps", "levels", "logits/", "vocabulary", "table_")
WIDTHS = (8, 16, 32, 64)
PARTS = {
    "codes": ("codes",),
    "topics": ("topics",),
    "tables": ("vocabulary", "table_sizes", "table_entries"),
    "steps": ("steps", "levels"),
    "tails": ("tails",),
    "nats": ("nats",),
    "labels": ("label_steps",),
    "tokens": ("token_ids",),
}
"""Arrays of a Zarr shard by the columns of a table; what is left are keys, counts, checksums, masks and directories."""
PARTS_ROW = "| {:>9} | {:>3} |" + " {:>7} |" * (1 + len(PARTS))
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
    parser.add_argument("--teacher", choices=TEACHERS, action="append", help="Of these teachers alone.")
    options = parser.parse_args()
    for teacher in options.teacher or TEACHERS:
        data = load_targets(options.work, teacher, options.sequences)
        _print_table(teacher, *data, OURS, PEERS, options.rounds)
        for name, control in CONTROLS.items() if teacher != "pretrained" else ():
            _print_table(f"{teacher}, {name}", *control(*data), {DEFAULT: OURS[DEFAULT]}, {}, options.rounds)
        _print_parts(*data)


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


def _print_parts(tokens: np.ndarray, targets: SparseTargets) -> None:
    """Bytes a target of a Zarr shard with the default bound: by k, and at k = TOP_K by how many targets it has."""
    whole = len(tokens) // SEQUENCE
    sizes = [whole >> halvings for halvings in range(5) if whole >> halvings]
    print("\n" + PARTS_ROW.format("targets", "k", "all", *PARTS))
    for top_k, count in [(top_k, whole) for top_k in WIDTHS] + [(TOP_K, size) for size in sizes[1:]]:
        captured = sequences_of(tokens[: count * SEQUENCE], _first(targets[: count * SEQUENCE], top_k))
        with _written("zarr", captured, 1e-4) as (path, layout):
            shard = CONTAINERS["zarr"].open(path, layout)
            parts = shard.parts()
            shard.close()
            named = {name: sum(parts.get(array, 0) for array in arrays) for name, arrays in PARTS.items()}
            num_targets, everything = layout.counts.num_targets, path.stat().st_size
            found = [size / num_targets for size in (everything, *named.values())]
            print(PARTS_ROW.format(f"{num_targets:,}", top_k, *(f"{size:.2f}" for size in found)), flush=True)


def _first(targets: SparseTargets, top_k: int) -> SparseTargets:
    """The targets with `top_k` entries; what is cut adds to the tails."""
    scaled = targets.logits[:, top_k:, None] / np.array(targets.temperatures) - targets.logsumexps[:, None]
    tails = np.log(np.exp(targets.tail_logprobs, dtype=np.float64) + np.exp(scaled, dtype=np.float64).sum(axis=1))
    kept = {name: np.ascontiguousarray(getattr(targets, name)[:, :top_k]) for name in ("ids", "logits")}
    return replace(targets, tail_logprobs=tails.astype(np.float32), **kept)


def _print_row(scheme: str, found: Measured) -> None:
    sizes = [f"{value:.1f}" if value else "" for value in (found.everything, found.targets)]
    errors = [f"{error:.1e}" for error in found.errors] or ["", ""]
    speeds = [f"{speed / 1e3:,.0f}k" for speed in found.speeds] or ["", "", ""]
    print(ROW.format(scheme, *sizes, *errors, *speeds), flush=True)


def _measure_ours(
    tokens: np.ndarray, targets: SparseTargets, container: str, max_kl_error: float, rounds: int
) -> Measured:
    captured = sequences_of(tokens, targets)
    count, kind = len(captured), CONTAINERS[container]
    with _written(container, captured, max_kl_error) as (path, layout):
        seconds = [_fastest(lambda: _write(path, layout, captured), rounds)]
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


@contextmanager
def _written(container: str, captured: Captured, max_kl_error: float) -> Iterator[tuple[Path, ShardLayout]]:
    """A shard of these sequences, for a while, and its layout."""
    first = captured[0][1]
    spec = TargetSpec(top_k=first.top_k, temperatures=first.temperatures, max_kl_error=max_kl_error)
    layout = ShardLayout(counts=ShardCounts.of([sequence for sequence, _ in captured]), spec=spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"shard{CONTAINERS[container].suffix}"
        _write(path, layout, captured)
        yield path, layout


def _write(path: Path, layout: ShardLayout, captured: Captured) -> None:
    path.unlink(missing_ok=True)
    (kind,) = (kind for kind in CONTAINERS.values() if path.name.endswith(kind.suffix))
    writer = kind.create(path, layout)
    for sequence, part in captured:
        writer.append(encode(layout, sequence, part))
    writer.close()


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
