"""What a student gains from a teacher's cache, per byte: cells that are trained once and kept.

    python -m benchmarks.fidelity [--scale small] [--student pruned] [--seed 0 --seed 1] [--alpha 1] [--only ghost-k8]
    python -m benchmarks.fidelity --gradients          # angles of the head's gradient at the start, no training
    python -m benchmarks.fidelity --report             # tables and plot of what is there, without torch

The teacher is SmolLM2-135M-Instruct (benchmarks/real). A cell whose file lies in `--results` is not trained again, so
that a killed run goes on and a later one adds cells. `--limit n` stops after n new cells.
"""

import argparse
import dataclasses
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.fidelity.cells import HARD, SCALES, STUDENTS, Cell, Scale, grid, read_results, result_path, write_result
from pipeline.progress import TerminalReporter
from pipeline.stores.sealed import write_json

RESULTS = Path(__file__).parents[1] / "results" / "fidelity"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/real"), help="teacher, corpora, caches")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--student", choices=STUDENTS, action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--alpha", type=float, action="append")
    parser.add_argument("--temperature", type=float, action="append", help="of the cells to train; all by default")
    parser.add_argument("--only", action="append", help="labels of recipes, such as ghost-k64 or live")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    if arguments.report:
        from benchmarks.fidelity.report import write_report

        print(write_report(read_results(arguments.results, scale), arguments.results / scale.name))
        return
    _run(arguments, scale)


def _run(arguments: argparse.Namespace, scale: Scale) -> None:
    from benchmarks.fidelity.study import Study, describe
    from benchmarks.fidelity.training import compare_gradients, measure_ends, run_cell

    reporter = TerminalReporter()
    study = Study(arguments.work, scale, reporter)
    students = tuple(arguments.student or ("pruned",))
    reporter.log(describe(study))
    parts = {"ends": measure_ends}
    if arguments.gradients:
        parts["gradients"] = partial(compare_gradients, only=arguments.only or ())
    for student in students:
        for name, measure in parts.items():
            path = arguments.results / scale.name / f"{name}-{student}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                made_of = {"scale": dataclasses.asdict(scale), "corpus": study.fingerprints, "machine": machine()}
                write_json(path, made_of | {name: measure(study, student)})
    if arguments.gradients:
        return
    read_results(arguments.results, scale, study.fingerprints)  # from other text than this machine's: refused
    todo = [cell for cell in _cells(arguments, students) if not result_path(arguments.results, scale, cell).is_file()]
    for cell in todo[: arguments.limit]:
        measured = run_cell(study, cell)
        write_result(arguments.results, scale, cell, measured | {"machine": machine()})
        held_out = ", ".join(f"{name} {value:.4f}" for name, value in measured["held_out"].items())
        reporter.log(f"{cell.name}: {held_out}; {measured['train_cpu_seconds']:.0f} CPU seconds")


def _cells(arguments: argparse.Namespace, students: tuple[str, ...]) -> list[Cell]:
    seeds, alphas = tuple(arguments.seed or (0, 1, 2)), tuple(arguments.alpha or (1.0,))
    return [
        cell
        for cell in grid(students, seeds, alphas)
        if (not arguments.only or cell.recipe.label in arguments.only)
        and (not arguments.temperature or cell.temperature in arguments.temperature or cell.recipe.name == HARD)
    ]


def machine() -> dict[str, Any]:
    """What a result was made on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {"processor": model, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
