"""One HTML page with tables and curves, and nothing to download or to run; the plots by matplotlib."""

import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline.files import replacing

PAGE = """<!doctype html><html lang=en><meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name=viewport content="width=device-width, initial-scale=1"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
td, th { padding: .25rem .9rem .25rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #99a; font-weight: 600; }
.verdict { font-size: 1.15rem; padding: .8rem 1rem; background: #eef3f1; border-left: 4px solid #0b6e4f; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } .small { color: #5a6675; font-size: .9rem; }
{{ style }}</style>{{ body }}</html>
"""
"""Asks nothing of a network and runs nothing, whatever got into it."""
MACROS = """
{%- macro table(rows) -%}
<table><tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{%- for row in rows[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{%- endmacro -%}
{%- macro grid(figures) -%}
<div class=grid>{% for figure in figures %}<div>{{ figure }}</div>{% endfor %}</div>
{%- endmacro -%}
"""
"""What the body of a page may call: a table whose first row is its head, and figures side by side if there is room."""

Table = list[list[str]]


def write_page(path: Path, title: str, body: str, style: str = "", **values: Any) -> None:
    """Publish a page whose body is a template of `values`; they are text, and escaped, unless they are Markup.

    `style` is CSS of our own, after that of all pages.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    macros: Any = environment.from_string(MACROS).module
    filled = environment.from_string(body).render(values, table=macros.table, grid=macros.grid)
    page = environment.from_string(PAGE).render(title=title, body=Markup(filled), style=Markup(style))
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """An empty plot: matplotlib's figure and axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    plot = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(alpha=0.25)
    return figure, plot


def svg(figure: Any) -> Markup:
    """A figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
