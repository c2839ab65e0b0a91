"""What a tail sketch of the pretrained teacher is worth, on held-out text: its error, bytes, and noise that it saves.

    python -m benchmarks.sketching [--work data/real] [--rows 512] [--sketch k8-r16 --sketch k64-r32]

For every sketch (exact entries k, rank r; fitted to 8,192 of the study's training targets, benchmarks/fidelity) and T:

KL         of the teacher from what is rebuilt beside k exact entries, nats
ghost      the same where the tail is spread as the pruned student of the study has it before its training: what a ghost
           tail leaves it at
bytes      of the stored coefficients a target, in the study's cache
variance   of a target estimated by one draw from the tail, over that of a draw from |p - p-hat| added to p-hat (a
           control variate): how many times as many plain draws would be as good
"""

import argparse
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fidelity.cells import SCALES, Cell, Recipe
from benchmarks.fidelity.study import INPUTS, Study
from benchmarks.fidelity.training import start_model, states_of
from pipeline.cache.reader import Cache
from pipeline.progress import TerminalReporter
from stages.cache_logits.sketching import RowSketch, tail_errors

SKETCHES = ("k8-r8", "k8-r16", "k16-r16", "k64-r16", "k64-r32")
BLOCK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/real"))
    parser.add_argument("--rows", type=int, default=512, help="held-out targets")
    parser.add_argument("--sketch", action="append", help="kK-rR")
    arguments = parser.parse_args()
    study = Study(arguments.work, SCALES["small"], TerminalReporter())
    order = torch.randperm(len(study.held_out.hidden_NH), generator=torch.Generator().manual_seed(0))[: arguments.rows]
    hidden_NH, student_NV = study.held_out.hidden_NH[order], _student_logits(study)
    print("| entries, rank | T | KL | ghost | bytes | file, bytes | variance |\n|---|---|---|---|---|---|---|")
    for name in arguments.sketch or SKETCHES:
        top_k, rank = (int(part[1:]) for part in name.split("-"))
        cache = study.cache(Recipe(name="sketch", top_k=top_k, rank=rank), 1.0)
        fitted = cache.fitted_sketch()
        assert fitted is not None, "the recipe has one"
        sketch = RowSketch.of(fitted, torch.device("cpu"))
        size = _bytes_of_coefficients(cache) / cache.manifest.num_targets
        for temperature in (1.0, 2.0):
            found = [
                _measured(study.held_out.logits(rows), sketch.logits(sketch.levels(rows)), own, top_k, temperature)
                for rows, own in zip(hidden_NH.split(BLOCK), student_NV(order).split(BLOCK))
            ]
            kl, ghost, plain, controlled = torch.cat(found).mean(0).tolist()
            print(
                f"| {top_k}, {rank} | {temperature:g} | {kl:.3f} | {ghost:.3f} | {size:.1f} "
                f"| {len(cache.sketch_contents() or b''):,} | {plain / controlled:.2f} |",
                flush=True,
            )


def _measured(logits_NV: Tensor, sketched_NV: Tensor, student_NV: Tensor, top_k: int, temperature: float) -> Tensor:
    """[N, 4]: KL of the sketch and of the student's own tail, and the variances of both draws, summed over the ids."""
    ids_NK = logits_NV.topk(top_k, 1).indices
    errors = [tail_errors(logits_NV, other, ids_NK, (temperature,))[:, 0] for other in (sketched_NV, student_NV)]
    tail_NV = torch.softmax(logits_NV / temperature, 1).scatter(1, ids_NK, 0.0)
    mass_N1 = tail_NV.sum(1, keepdim=True)
    shape_NV = torch.softmax((sketched_NV / temperature).scatter(1, ids_NK, -torch.inf), 1)
    apart_NV = tail_NV - mass_N1 * shape_NV
    plain = mass_N1[:, 0] ** 2 - tail_NV.square().sum(1)
    controlled = apart_NV.abs().sum(1) ** 2 - apart_NV.square().sum(1)
    return torch.stack([*errors, plain, controlled], 1)


def _student_logits(study: Study) -> Callable[[Tensor], Tensor]:
    """What gives float32 [N, V] of the pruned student at held-out targets, by their numbers."""
    model, _, _ = start_model(study, Cell(student="pruned", recipe=INPUTS, temperature=1.0, alpha=1.0, seed=0))
    hidden_NH, weight_VH = states_of(model, study.held_out)
    return lambda rows: hidden_NH[rows] @ weight_VH.T


def _bytes_of_coefficients(cache: Cache) -> int:
    total = 0
    for stored in cache.shards():
        with closing(stored.open()) as shard:
            total += shard.parts()["coefficients"]
    return total


if __name__ == "__main__":
    main()
