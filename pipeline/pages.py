"""One HTML page with tables and curves, and nothing to download; the plots by matplotlib."""

import html
import io
from pathlib import Path
from typing import Any

from pipeline.files import replacing

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin-bottom: 1.5rem; } td, th { padding: .25rem .9rem .25rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #99a; font-weight: 600; }
.verdict { font-size: 1.15rem; padding: .8rem 1rem; background: #eef3f1; border-left: 4px solid #0b6e4f; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; } svg { width: 100%; height: auto; }
.small { color: #5a6675; font-size: .9rem; }
"""

Table = list[list[str]]


def write_page(path: Path, title: str, body: str) -> None:
    """Publish a page whose body is given as HTML."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    with replacing(path) as partial:
        partial.write_text(f"{head}{body}</html>\n", encoding="utf-8")


def html_table(table: Table) -> str:
    """A table whose first row is its head."""
    rows = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in table[0])}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table[1:]]
    return f"<table>{''.join(rows)}</table>"


def grid(figures: list[str]) -> str:
    """Figures side by side where the window is wide enough."""
    return f"<div class=grid>{''.join(f'<div>{figure}</div>' for figure in figures)}</div>"


def axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """An empty plot: matplotlib's figure and axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    plot = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(alpha=0.25)
    return figure, plot


def svg(figure: Any) -> str:
    """A figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
