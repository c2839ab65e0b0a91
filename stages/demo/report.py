"""The demo's report: lines for a terminal, and one HTML page without anything to download."""

import os
import platform
from pathlib import Path

import numpy as np
from markupsafe import Markup

from pipeline.pages import Table, axes, svg, write_page
from pipeline.progress import duration
from stages.demo.results import DemoResults

BODY = """<h1>A student from cached targets</h1><p class=verdict>{{ verdict }}</p>
{{ table(students) }}{{ grid(figures) }}<h2>What it cost</h2>{{ table(stages) }}
<p>{{ exactness }}</p><p>{{ storage }}</p>
<p class=small>Measured on this machine: {{ machine }}. KL is that of the ghost tail, a lower bound on the full one.</p>
"""
COLOURS = {"distilled": "#0b6e4f", "hard-labels": "#c8553d", "teacher": "#44546a"}


def write_report(results: DemoResults, path: Path) -> list[str]:
    """Write the HTML page to `path` and return the report for a terminal."""
    students, stages = student_table(results), stage_table(results)
    write_page(
        path,
        "Distillation demo",
        BODY,
        verdict=verdict(results),
        students=students,
        figures=_figures(results),
        stages=stages,
        exactness=exactness(results),
        storage=storage(results),
        machine=_machine(),
    )
    return [
        "",
        verdict(results),
        "",
        *aligned(students),
        "",
        *aligned(stages),
        "",
        exactness(results),
        storage(results),
    ]


def verdict(results: DemoResults) -> str:
    """Which student is better on held-out text, by how much; never more than was measured."""
    ours, theirs = (results.students[name].cross_entropy for name in ("distilled", "hard-labels"))
    gap = (
        f"{ours:.4f} against {theirs:.4f} nats a token on held-out text "
        f"(perplexity {np.exp(ours):.2f} against {np.exp(theirs):.2f}), same steps, seed and data order."
    )
    if results.distilled_is_better:
        return f"The distilled student is better than the one trained from hard labels alone: {gap}"
    return f"The distilled student is NOT better than the one trained from hard labels alone: {gap}"


def student_table(results: DemoResults) -> Table:
    """Held-out metrics of both students and the teacher."""
    hot = f"{results.temperature:g}"
    rows = [["held out", "cross-entropy", "KL to teacher, T=1", f"KL to teacher, T={hot}"]]
    for name, student in results.students.items():
        kls = [f"{student.metrics[f'eval_kl_{T}']:.4f}" for T in ("1", hot)]
        rows.append([name, f"{student.cross_entropy:.4f}", *kls])
    return [*rows, ["teacher", f"{results.teacher_cross_entropy:.4f}", "0", "0"]]


def stage_table(results: DemoResults) -> Table:
    """Wall time of every step, and tokens a second while it was at work."""
    rows = [["step, both splits", "time with start-up", "tokens/s at work"]]
    for step in ("teacher", "prepare", "cache-logits", "verify", "train-distilled", "train-hard-labels"):
        seconds = sum(value for name, value in results.seconds.items() if name.startswith(step))
        rows.append([step, duration(seconds), f"{results.rates[step]:,.0f}" if step in results.rates else ""])
    return rows


def exactness(results: DemoResults) -> str:
    """The audit against float64."""
    errors = ", ".join(f"{error:.1e} at T={temperature:g}" for temperature, error in results.largest_error.items())
    return (
        f"Exactness: largest |p_T cached - p_T float64| over {results.num_audited:,} positions x "
        f"{results.top_k} entries: {errors} ({_rounding(results)})."
    )


def _rounding(results: DemoResults) -> str:
    bound = results.max_kl_error
    return f"rounded within {bound:g} nats of KL" if bound else "lossless"


def storage(results: DemoResults) -> str:
    """Bytes a target."""
    means = ", ".join(f"{mass.mean():.3f} at T={temperature:g}" for temperature, mass in results.tail_masses.items())
    return (
        f"Storage: {results.cache_bytes / results.num_targets:.1f} bytes a token at k={results.top_k} "
        f"({results.container}, {_rounding(results)}). Teacher's mean tail mass outside the top k: {means}."
    )


def aligned(table: Table) -> list[str]:
    """A table as lines of equal columns."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def _figures(results: DemoResults) -> list[Markup]:
    hot = f"{results.temperature:g}"
    return [
        _curves(results, "eval_cross_entropy", "Held-out cross-entropy", "nats a token", results.teacher_cross_entropy),
        _curves(results, "cross_entropy", "Training cross-entropy", "nats a token"),
        _curves(results, f"eval_kl_{hot}", f"Held-out KL to the teacher, T={hot}", "nats a token"),
        _curves(results, "loss", "Training loss, (1 - alpha) CE + alpha T² KL", "nats a token"),
        _histogram(results.entropies, "The teacher's entropy on held-out text", "nats"),
        _histogram(results.tail_masses, f"The teacher's mass outside its top {results.top_k}", "probability"),
    ]


def _curves(results: DemoResults, name: str, title: str, unit: str, teacher: float | None = None) -> Markup:
    figure, plot = axes(title, "optimizer step", unit)
    for student, result in results.students.items():
        points = np.array(result.curves[name])
        marker = "o" if len(points) < 20 else ""
        plot.plot(*points.T, label=student, color=COLOURS[student], marker=marker, markersize=4)
    if teacher is not None:
        plot.axhline(teacher, label="teacher", color=COLOURS["teacher"], linestyle="--", linewidth=1)
    plot.legend(frameon=False)
    return svg(figure)


def _histogram(values: dict[float, np.ndarray], title: str, unit: str) -> Markup:
    figure, plot = axes(title, unit, "share of positions")
    edges = np.linspace(0, max(float(column.max()) for column in values.values()), 41)
    for temperature, column in values.items():
        weights = np.full(len(column), 1 / len(column))
        plot.hist(column, bins=edges, weights=weights, alpha=0.55, label=f"T={temperature:g}, mean {column.mean():.2f}")
    plot.legend(frameon=False)
    return svg(figure)
