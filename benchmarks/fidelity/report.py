"""Tables (Markdown) and plot (SVG) of a study's results. Loads no torch.

Differences are paired: a recipe's figure less that of live KD with the same student, alpha, temperature and seed, which
had the same start and the same data in the same order.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fidelity.cells import HARD, LIVE, Recipe
from benchmarks.fidelity.statistics import Interval, interval, paired, pareto
from pipeline.errors import PipelineError
from pipeline.stores.sealed import read_json

TABLE, PLOT = "table.md", "plot.svg"
METRICS = {
    "cross_entropy": "CE",
    "kl_1": "KL, T=1",
    "kl_2": "KL, T=2",
    "top1_agreement": "top-1",
    "acceptance": "acceptance",
    "calibration_error": "ECE",
}
"""Names in a result, and in tables."""


class Row(NamedTuple):
    """A recipe under one student, alpha and temperature, over its seeds."""

    label: str
    bytes_per_token: float
    """inf of live KD, 0 of labels alone."""
    values: dict[str, dict[int, float]]
    """By metric and seed."""

    def interval(self, metric: str) -> Interval:
        """Over all its seeds."""
        return interval(list(self.values[metric].values()))


class Group(NamedTuple):
    """What is compared: one student, alpha and temperature."""

    student: str
    alpha: float
    temperature: float
    rows: list[Row]

    @property
    def title(self) -> str:
        """As a heading."""
        return f"{self.student} student, T={self.temperature:g}, alpha {self.alpha:g}"

    @property
    def live(self) -> Row | None:
        """The reference."""
        return next((row for row in self.rows if row.label == LIVE), None)

    def front(self, metric: str) -> set[str]:
        """Labels of cached recipes (and labels alone, at 0 bytes) of which none has fewer bytes and less `metric`."""
        rows = [row for row in self.rows if row.label != LIVE]
        points = [(row.bytes_per_token, row.interval(metric).mean) for row in rows]
        return {rows[place].label for place in pareto(points)}


def groups_of(results: Iterable[dict[str, Any]]) -> list[Group]:
    """Results by what they are compared with; labels alone belong to every group of their student."""
    found: dict[tuple[str, float, float], dict[str, list[dict[str, Any]]]] = {}
    hard: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        cell = result["cell"]
        if cell["recipe"]["name"] == HARD:
            hard.setdefault(cell["student"], []).append(result)
        else:
            key = (cell["student"], cell["alpha"], cell["temperature"])
            label = Recipe(**cell["recipe"]).label
            found.setdefault(key, {}).setdefault(label, []).append(result)
    groups = []
    for key, by_label in sorted(found.items()):
        if key[0] in hard:
            by_label[HARD] = hard[key[0]]
        rows = [_row(label, cells) for label, cells in by_label.items()]
        groups.append(Group(*key, sorted(rows, key=lambda row: -row.bytes_per_token)))
    return groups


def _row(label: str, results: list[dict[str, Any]]) -> Row:
    without = {LIVE: math.inf, HARD: 0.0}
    num_bytes = without.get(label, results[0]["bytes_per_token"])
    values = {
        metric: {result["cell"]["seed"]: result["held_out"][metric] for result in results}
        for metric in results[0]["held_out"]
    }
    return Row(label, num_bytes, values)


def write_report(results: list[dict[str, Any]], folder: Path) -> str:
    """Write table.md and plot.svg into the folder, and return the table; raises PipelineError without results."""
    if not results:
        raise PipelineError(f"{folder}: no result there; train some cells first (python -m benchmarks.fidelity).")
    groups = groups_of(results)
    parts = [group_table(group) for group in groups]
    for name, table in (("ends", ends_table), ("gradients", gradient_table)):
        for path in sorted(folder.glob(f"{name}-*.json")):
            parts += [f"**{path.stem.partition('-')[2]} student**", "", table(read_json(path, PipelineError)[name])]
    text = "\n".join(parts)
    (folder / TABLE).write_text(text, encoding="utf-8")
    _plot(groups, folder / PLOT)
    return text


def group_table(group: Group) -> str:
    """All recipes, largest cache first; an asterisk marks the front of bytes and KL at the group's temperature."""
    front = group.front(f"kl_{group.temperature:g}")
    names = list(METRICS.values())
    header = ["recipe", "bytes", *names, "CE less live", "KL less live", "seeds"]
    lines = [f"**{group.title}**", "", _line(header), _line(["---"] * len(header))]
    for row in group.rows:
        label = f"{row.label} *" if row.label in front else row.label
        size = "all logits" if math.isinf(row.bytes_per_token) else f"{row.bytes_per_token:.1f}"
        figures = [_with_error(row.interval(metric)) for metric in METRICS]
        against = [_difference(row, group.live, metric) for metric in ("cross_entropy", f"kl_{group.temperature:g}")]
        lines.append(_line([label, size, *figures, *against, str(row.interval("cross_entropy").num_seeds)]))
    return "\n".join([*lines, ""])


def gradient_table(gradients: dict[str, Any]) -> str:
    """The length of live KD's gradient; of others, angle to it and length of the error, by target tokens of a batch."""
    lines = []
    for temperature, by_recipe in gradients.items():
        sizes = list(next(iter(by_recipe.values())))
        header = [f"gradient of the head, {temperature[0]}={temperature[1:]}", *(f"{size} tokens" for size in sizes)]
        lines += [_line(header), _line(["---"] * len(header))]
        norms = [found["norm"] for found in next(iter(by_recipe.values())).values()]
        lines.append(_line(["live, length", *(f"{norm:.2f}" for norm in norms)]))
        for label, by_size in by_recipe.items():
            cells = [f"{found['degrees']:.1f}°, {found['error']:.2f}" for found in by_size.values()]
            lines.append(_line([label, *cells]))
        lines.append("")
    return "\n".join(lines)


def ends_table(ends: dict[str, dict[str, float]]) -> str:
    """Where a student starts, and the teacher."""
    header = ["", *METRICS.values()]
    rows = [[name, *(f"{found[metric]:.4f}" for metric in METRICS)] for name, found in ends.items()]
    return "\n".join([_line(header), _line(["---"] * len(header)), *map(_line, rows), ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _with_error(value: Interval) -> str:
    return f"{value.mean:.4f}" + ("" if math.isnan(value.half_width) else f" ± {value.half_width:.4f}")


def _difference(row: Row, live: Row | None, metric: str) -> str:
    """In per cent of live KD for the cross-entropy, else as it is."""
    if live is None or row.label == LIVE:
        return ""
    difference = paired(row.values[metric], live.values[metric])
    if difference is None:
        return ""
    if metric != "cross_entropy":
        return f"{difference.mean:+.4f}" + _plus_minus(difference.half_width, 4)
    share = 100 / live.interval(metric).mean
    return f"{share * difference.mean:+.2f}%" + _plus_minus(share * difference.half_width, 2)


def _plus_minus(half_width: float, digits: int) -> str:
    return "" if math.isnan(half_width) else f" ± {half_width:.{digits}f}"


def _plot(groups: list[Group], path: Path) -> None:
    """Held-out cross-entropy and KL over bytes a token, a row of panels a group; live KD as a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fidelity"  # the same results give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(groups), 2, figsize=(10, 3.6 * len(groups)), squeeze=False)
    for group, pair in zip(groups, axes):
        for metric, panel in zip(("cross_entropy", f"kl_{group.temperature:g}"), pair):
            _panel(panel, group, metric)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel: Any, group: Group, metric: str) -> None:
    for row in group.rows:
        found = row.interval(metric)
        if row.label in (LIVE, HARD):
            style = "-" if row.label == LIVE else ":"
            panel.axhline(found.mean, color="grey", linestyle=style, linewidth=1, label=row.label)
            continue
        error = 0 if math.isnan(found.half_width) else found.half_width
        panel.errorbar(row.bytes_per_token, found.mean, yerr=error, fmt="o", capsize=3)
        panel.annotate(
            row.label, (row.bytes_per_token, found.mean), fontsize=7, xytext=(4, 4), textcoords="offset points"
        )
    front = [row for row in group.rows if row.label in group.front(metric) and row.label != HARD]
    points = sorted((row.bytes_per_token, row.interval(metric).mean) for row in front)
    panel.step(*zip(*points), where="post", color="tab:blue", linewidth=0.8) if points else None
    panel.set_xlabel("bytes a token")
    panel.set_title(f"{METRICS[metric]}: {group.title}", fontsize=9)
    panel.legend(fontsize=7)
