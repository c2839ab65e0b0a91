"""report.html: the curves of a run, in one page without anything to download."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from markupsafe import Markup

from pipeline.pages import Table, axes, svg, write_page
from pipeline.progress import Reporter
from pipeline.settings import resolved
from stages.train_student.guards import BAD_STEPS
from stages.train_student.settings import TrainConfig

REPORT = "report.html"
BODY = """<h1>{{ name }}</h1><p class=verdict>{{ summary }}</p>
{% if bad_steps %}<h2>Bad steps</h2>{{ table(bad_steps) }}{% endif %}{{ grid(figures) }}
<h2>Results</h2>{{ table(results) }}{% for rows in by_source %}{{ table(rows) }}{% endfor %}
<h2>Settings</h2>{{ table(settings) }}
"""
NATS = "nats a token"
CURVES = (
    ("loss", "Loss, (1 - alpha) CE + alpha T² D", NATS),
    ("loss/", "Loss by source", NATS),
    ("cross_entropy", "Cross-entropy, training", NATS),
    ("cross_entropy/", "Cross-entropy by source, training", NATS),
    ("kl", "Divergence of teacher and student at T, training", NATS),
    ("kl/", "Divergence by source, training", NATS),
    ("router_loss", "Balancing loss of the routers, not weighted", ""),
    ("eval_cross_entropy", "Cross-entropy, held out", NATS),
    ("eval_cross_entropy/", "Cross-entropy by held-out cache", NATS),
    ("eval_kl_", "KL to the teacher, held out (ghost tail; with a sketch, the whole vocabulary)", NATS),
    ("eval_top1_agreement", "Top-1 agreement with the teacher, held out", "share of tokens"),
    ("eval_acceptance_", "Speculative acceptance: lower and upper bound", "rate"),
    ("eval_calibration_error", "Expected calibration error, held out", "probability"),
    ("learning_rate", "Learning rate", ""),
    ("alpha", "alpha", ""),
    ("grad_norm", "Norm of the gradient before clipping", ""),
    ("tokens_per_second", "Speed", "tokens/s"),
    ("data_wait_share", "Time spent waiting for data", "share"),
)
"""Key of the log, or what several keys begin with; title; unit."""


def write_report(config: TrainConfig, log: list[dict[str, Any]], metrics: dict[str, Any], reporter: Reporter) -> None:
    """Write OUT/report.html from the log's entries; says so where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        reporter.note(f"{config.out}: no {REPORT}: matplotlib is not installed.")
        return
    figures = [_curve(log, *curve) for curve in CURVES]
    write_page(
        config.out / REPORT,
        f"train-student: {config.out.name}",
        BODY,
        name=config.out.name,
        summary=_summary(metrics),
        bad_steps=_bad_steps(config.out),
        figures=[figure for figure in figures if figure is not None],
        results=_results({name: value for name, value in metrics.items() if "/" not in name}),
        by_source=_by_source(metrics),
        settings=[["setting", "value"], *([key, str(value)] for key, value in resolved(config).items())],
    )


def _curve(log: list[dict[str, Any]], key: str, title: str, unit: str) -> Markup | None:
    names = sorted(
        {name for entry in log for name in entry if name == key or (key[-1] in "_/" and name.startswith(key))}
    )
    if not names:
        return None
    figure, plot = axes(title, "optimizer step", unit)
    for name in names:
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        plot.plot(*zip(*points), label=name, marker="o" if len(points) < 20 else "", markersize=4)
    if len(names) > 1:
        plot.legend(frameon=False)
    return svg(figure)


def _summary(metrics: dict[str, Any]) -> str:
    steps = f"{metrics['steps']:,} steps, about {metrics['tokens_seen']:,} tokens."
    if "approximate_temperature" in metrics:
        steps += f" Targets at T = {metrics['approximate_temperature']:g} are approximate: it was not captured."
    if "eval_cross_entropy" not in metrics:
        return f"{steps} No held-out cache was given."
    teacher = metrics.get("eval_teacher_cross_entropy")
    beside = "" if teacher is None else f"; the teacher's is {teacher:.4f}"
    return f"{steps} Held-out cross-entropy {metrics['eval_cross_entropy']:.4f} nats a token{beside}."


def _results(metrics: dict[str, Any]) -> Table:
    return [["metric", "value"]] + [
        [name, f"{value:,.4f}" if isinstance(value, float) else str(value)] for name, value in metrics.items()
    ]


def _by_source(metrics: dict[str, Any]) -> list[Table]:
    """A table of what the training took from its sources, and one of held-out caches, if there are several."""
    tables = []
    for is_held_out in (False, True):
        names = [name for name in metrics if "/" in name and name.startswith("eval_") == is_held_out]
        sources = list(dict.fromkeys(name.partition("/")[2] for name in names))
        if not sources:
            continue
        rows = list(dict.fromkeys(name.partition("/")[0] for name in names))
        cells = [[row, *(_cell(metrics.get(f"{row}/{source}")) for source in sources)] for row in rows]
        tables.append([["held out" if is_held_out else "trained on", *sources], *cells])
    return tables


def _cell(value: float | int | None) -> str:
    return "" if value is None else f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _bad_steps(folder: Path) -> Table:
    path = folder / BAD_STEPS
    if not path.is_file():
        return []
    found = (_bad_step(line) for line in path.read_bytes().splitlines())
    rows = [[str(step.step), step.problem, step.action, str(len(step.keys))] for step in found if step is not None]
    return [["step", "problem", "action", "sequences"], *rows]


@dataclass
class _BadStep:
    """A line that `guards.record_bad_step` has written."""

    step: int
    problem: str
    action: str
    keys: list[str]


def _bad_step(line: bytes) -> _BadStep | None:
    """The step of a line; None if the line is torn."""
    try:
        return msgspec.json.decode(line, type=_BadStep)
    except (ValueError, RecursionError):
        return None
