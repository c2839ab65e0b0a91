"""What `cache-logits --top-p` keeps of a real teacher's distributions, and what that costs, beside a fixed k.

    python -m benchmarks.top_p [--work data/real] [--scale small]

The teacher and the training text of the fidelity study (benchmarks/fidelity), k=64, T=1 and 2, the mass counted at T=1,
one shard with the default bound on rounding, its sequences joined to 1,024 tokens. Below each mass stands the fixed k
of about as many entries. Bytes are everything in the file, a target; "outside" is the teacher's mean mass that no entry
holds. Reading is the speed by CPU time of one thread, a sequence at a time in random order with all checks, in stored
entries: as a share of the fixed k's, and of that of k=64; the rounds of all are interleaved and the fastest counts.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.fidelity.cells import SCALES
from benchmarks.fidelity.study import Study
from benchmarks.fidelity.teacher import StoredEngine, StoredTeacher
from pipeline.corpus import TokenSequence
from pipeline.formats.containers import CONTAINERS, Shard
from pipeline.formats.layout import ShardCounts, ShardLayout, decode, encode
from pipeline.progress import Reporter
from pipeline.targets import SparseTargets, TargetSpec, concatenate, cut, kept
from stages.cache_logits.scoring import ScoredRow, score_rows
from stages.cache_logits.settings import TeacherConfig

TOP_K, MASSES, SEQUENCE = 64, (0.9, 0.95, 0.99), 1024
ROW = "| {:16} | {:>7} | {:>6} | {:>6} | {:>11} | {:>11} | {:>13} | {:>13} |"
HEADINGS = ("kept", "entries", "zarr", "arrow", "outside T=1", "outside T=2", "reading zarr", "reading arrow")

Captured = list[tuple[TokenSequence, SparseTargets]]


@dataclass
class Written:
    """One way to keep the targets, in one container."""

    spec: TargetSpec
    num_entries: int
    bytes: int
    shard: Shard
    layout: ShardLayout
    seconds: float = np.inf

    def read(self, order: list[int]) -> None:
        """Every sequence, timed; the fastest pass counts."""
        started = time.process_time()
        for row in order:
            decode(self.shard.columns(row, row + 1), self.layout, "")
        self.seconds = min(self.seconds, time.process_time() - started)

    @property
    def entry_seconds(self) -> float:
        """CPU time of a stored entry."""
        return self.seconds / self.num_entries


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("data/real"), help="Folder of the fidelity study.")
    parser.add_argument("--scale", default="small", choices=SCALES)
    parser.add_argument("--rounds", type=int, default=15, help="Passes over each shard; the fastest counts.")
    options = parser.parse_args()
    captured = _captured(Study(options.work, SCALES[options.scale], Reporter()).train)
    whole = TeacherConfig(teacher=options.work, top_k=TOP_K).spec
    rows = [(f"k = {TOP_K}", whole, captured)]
    for mass in MASSES:
        spec = replace(whole, top_p=mass, top_p_temperature=1.0, min_k=1)
        some = [(sequence, kept(targets, spec)) for sequence, targets in captured]
        mean = np.concatenate([targets.counts for _, targets in some]).mean()
        rows += [(f"top_p = {mass:g}", spec, some), _fixed(captured, whole, max(1, round(float(mean))))]
    with tempfile.TemporaryDirectory() as folder:
        written = {
            name: [_write(Path(folder) / f"{number}-{name}", name, *row[1:]) for number, row in enumerate(rows)]
            for name in CONTAINERS
        }
        order = np.random.default_rng(0).permutation(len(captured)).tolist()
        for _ in range(options.rounds):
            for each in (one for ways in written.values() for one in ways):
                each.read(order)
        _print(rows, written)


def _captured(teacher: StoredTeacher) -> Captured:
    config = TeacherConfig(teacher=teacher.folder, top_k=TOP_K)
    found: Captured = []
    rows = map(ScoredRow, teacher.corpus.rows())
    score_rows(StoredEngine(teacher, config), rows, lambda row: found.append((row.sequence, row.scored())))
    step = max(1, SEQUENCE // teacher.corpus.manifest.sequence_length)
    return [_joined(found[start : start + step]) for start in range(0, len(found), step)]


def _joined(captured: Captured) -> tuple[TokenSequence, SparseTargets]:
    """One sequence of several."""
    masks = [sequence.loss_mask & (np.arange(len(sequence.loss_mask)) > 0) for sequence, _ in captured]
    sequence = TokenSequence(
        token_ids=np.concatenate([sequence.token_ids for sequence, _ in captured]),
        loss_mask=np.concatenate(masks),
        document_lengths=np.concatenate([sequence.document_lengths for sequence, _ in captured]),
    )
    return sequence, concatenate([targets for _, targets in captured])


def _fixed(captured: Captured, whole: TargetSpec, top_k: int) -> tuple[str, TargetSpec, Captured]:
    """As if `top_k` had been captured."""
    narrow = []
    for sequence, targets in captured:
        some = cut(targets, np.full(len(targets), top_k))
        narrow.append((sequence, replace(some, ids=some.ids[:, :top_k], logits=some.logits[:, :top_k])))
    return f"k = {top_k}", replace(whole, top_k=top_k), narrow


def _write(path: Path, container: str, spec: TargetSpec, captured: Captured) -> Written:
    layout = ShardLayout(counts=ShardCounts.of([sequence for sequence, _ in captured]), spec=spec)
    writer = CONTAINERS[container].create(path, layout)
    for row in captured:
        writer.append(encode(layout, *row))
    writer.close()
    num_entries = sum(int(targets.counts.sum()) for _, targets in captured)
    return Written(spec, num_entries, path.stat().st_size, CONTAINERS[container].open(path, layout), layout)


def _print(rows: list[tuple[str, TargetSpec, Captured]], written: dict[str, list[Written]]) -> None:
    num_targets = written["zarr"][0].layout.counts.num_targets
    print(f"{num_targets:,} targets in {len(rows[0][2])} sequences")
    print(ROW.format(*HEADINGS))
    print(ROW.format(*("-" * 5 for _ in HEADINGS)))
    for number, (name, spec, captured) in enumerate(rows):
        outside = [np.concatenate([targets.tail_mass(T) for _, targets in captured]).mean() for T in spec.temperatures]
        reading = []
        for ways in (written[container] for container in ("zarr", "arrow")):
            fixed, whole = ways[number + 1 if spec.is_ragged else number], ways[0]
            shares = [other.entry_seconds / ways[number].entry_seconds for other in (fixed, whole)]
            reading.append(", ".join(f"{share:.2f}" for share in shares) if spec.is_ragged else "")
        print(
            ROW.format(
                name,
                f"{written['zarr'][number].num_entries / num_targets:.1f}",
                *(f"{written[container][number].bytes / num_targets:.1f}" for container in ("zarr", "arrow")),
                *(f"{mass:.3f}" for mass in outside),
                *reading,
            )
        )


if __name__ == "__main__":
    main()
