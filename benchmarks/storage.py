"""Bytes a token, KL error and speed of caches: ours, other layouts, and what an entropy coder could do.

    python -m benchmarks.storage [--work data/bench] [--sequences 128]

One shard of held-out text at k=64, T=1 and T=2, from two teachers (see benchmarks/storage_teacher.py), each also with
its ids renamed at random. "All" is every byte of the file; "targets" the ids and values alone, which is all that the
other layouts are charged for (they are given the exact normalisers of both temperatures for nothing). Speeds are
tokens a CPU second of one thread, from captured targets to a finished file and from it, in random order, to arrays.
"""

import argparse
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.storage_peers import PEERS, floors
from benchmarks.storage_teacher import SEQUENCE, TEACHERS, TEMPERATURES, load_targets, permuted
from pipeline.corpus import TokenSequence
from pipeline.shards.containers import CONTAINERS
from pipeline.shards.layout import ShardLayout, decode, encode, targets_of
from pipeline.targets import SparseTargets, concatenate, reconstruction_errors

OURS = {
    "ours: zarr, 1e-4": ("zarr", 1e-4),
    "ours: zarr, 1e-3": ("zarr", 1e-3),
    "ours: zarr, 1e-5": ("zarr", 1e-5),
    "ours: zarr, lossless": ("zarr", 0.0),
    "ours: arrow, 1e-4": ("arrow", 1e-4),
}
TARGET_ARRAYS = ("codes", "modes", "steps", "logits", "vocabulary", "table_")
ROW = "| {:28} | {:>7} | {:>7} | {:>8} | {:>8} | {:>8} | {:>8} |"
HEADINGS = ("scheme", "all", "targets", "KL T=1", "KL T=2", "encode/s", "decode/s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("data/bench"), help="Folder of the teachers' targets.")
    parser.add_argument("--sequences", type=int, default=128, help=f"Sequences of {SEQUENCE} tokens in the shard.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each measurement; the fastest counts.")
    options = parser.parse_args()
    for teacher in TEACHERS:
        tokens, targets = load_targets(options.work, teacher, options.sequences)
        for name, data in ((teacher, (tokens, targets)), (f"{teacher}, ids permuted", permuted(tokens, targets))):
            _print_table(name, *data, options.rounds)


def _print_table(name: str, tokens: np.ndarray, targets: SparseTargets, rounds: int) -> None:
    tails = [targets.tail_mass(temperature).mean() for temperature in TEMPERATURES]
    entropies = [targets.entropy(temperature).mean() for temperature in TEMPERATURES]
    print(
        f"\n{name}: {len(tokens):,} tokens, {len(np.unique(targets.ids)):,} distinct ids; at T=1, T=2: entropy", end=" "
    )
    print(", ".join(f"{value:.2f}" for value in entropies) + "; tail mass", ", ".join(f"{tail:.3f}" for tail in tails))
    print(ROW.format(*HEADINGS))
    print(ROW.format(*("-" * 5 for _ in HEADINGS)))
    rows = [(scheme, _measure_ours(tokens, targets, *settings, rounds)) for scheme, settings in OURS.items()]
    rows += [(scheme, _measure_peer(peer, targets)) for scheme, peer in PEERS.items()]
    rows += [(floor, (None, size, None, None, None)) for floor, size in floors(targets).items()]
    for scheme, (everything, size, errors, encoding, decoding) in rows:
        kl = [f"{error:.1e}" for error in errors] if errors is not None else ["", ""]
        speeds = [f"{speed / 1e3:,.0f}k" if speed else "" for speed in (encoding, decoding)]
        sizes = [f"{value:.1f}" if value else "" for value in (everything, size)]
        print(ROW.format(scheme, *sizes, *kl, *speeds), flush=True)


def _measure_ours(
    tokens: np.ndarray, targets: SparseTargets, container: str, max_kl_error: float, rounds: int
) -> tuple[float, float, np.ndarray, float, float]:
    """Bytes a target of the file and of its targets, mean KL errors, encoding and decoding speed."""
    captured = _sequences(tokens, targets)
    layout = ShardLayout(
        num_sequences=len(captured),
        num_tokens=len(captured) * SEQUENCE,
        num_documents=len(captured),
        num_targets=sum(len(part) for _, part in captured),
        top_k=targets.top_k,
        num_draws=0,
        temperatures=targets.temperatures,
        max_kl_error=max_kl_error,
    )
    kind = CONTAINERS[container]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"shard{kind.suffix}"

        def write() -> None:
            path.unlink(missing_ok=True)
            writer = kind.create(path, layout)
            for sequence, part in captured:
                writer.append(encode(layout, sequence, part))
            writer.close()

        encoding = _fastest(write, rounds)
        shard = kind.open(path, layout)
        order = np.random.default_rng(0).permutation(len(captured)).tolist()
        decoding = _fastest(lambda: [decode(shard.columns(row, row + 1), layout, "") for row in order], rounds)
        stored = [targets_of(shard.columns(row, row + 1), layout) for row in range(len(captured))]
        shard.close()
        size, all_bytes = _target_bytes(path, layout), path.stat().st_size
    exact = concatenate([part for _, part in captured])
    errors, _ = reconstruction_errors(exact, concatenate(stored))
    num_targets = layout.num_targets
    return (
        all_bytes / num_targets,
        size / num_targets,
        errors.mean(axis=0),
        num_targets / encoding,
        num_targets / decoding,
    )


def _sequences(tokens: np.ndarray, targets: SparseTargets) -> list[tuple[TokenSequence, SparseTargets]]:
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
        return layout.num_targets * layout.top_k * 8
    with zipfile.ZipFile(path) as archive:
        return sum(info.file_size for info in archive.infolist() if info.filename.startswith(TARGET_ARRAYS))


def _measure_peer(
    peer: Callable[[SparseTargets], tuple[float, SparseTargets | None]], targets: SparseTargets
) -> tuple[None, float, np.ndarray | None, None, None]:
    size, stored = peer(targets)
    errors = None if stored is None else reconstruction_errors(targets, stored)[0].mean(axis=0)
    return None, size, errors, None, None


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
