"""Charts as SVG that take their colours from the page, so that they are read in the light and in the dark.

matplotlib's have the colours of paper in them, and it is no requirement of a command.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
COLOURS = 4
"""Series that a chart tells apart."""
TICKS = 5

CHART = """<figure><figcaption>{{ title }}</figcaption>
{%- if series|length > 1 %}<p class=legend>{% for one in series %}<span><i class=k{{ loop.index0 }}></i>{{ one.name -}}
</span>{% endfor %}</p>{% endif %}
<svg viewBox="0 0 {{ width }} {{ height }}" role=img aria-label="{{ title }}">
{%- for at, label in y_ticks %}<path class=rule d="M{{ left }} {{ at }}H{{ right }}"/>
<text x={{ left - 6 }} y={{ at + 4 }} text-anchor=end>{{ label }}</text>{% endfor %}
{%- for at, label in x_ticks %}<text x={{ at }} y={{ bottom + 16 }} text-anchor=middle>{{ label }}</text>{% endfor %}
<path class=axis d="M{{ left }} {{ bottom }}H{{ right }}"/>
<text x={{ (left + right) / 2 }} y={{ height - 6 }} text-anchor=middle>{{ x_label }}</text>
{%- if diagonal %}<path class=diagonal d="{{ diagonal }}"/>{% endif %}
{%- for one in series %}<path class="line k{{ loop.index0 }}" d="{{ one.path }}"/>{% endfor %}
{%- for one in series %}{% set number = loop.index0 %}{% for x, y, label in one.dots -%}
<circle class="dot k{{ number }}" cx={{ x }} cy={{ y }} r={{ one.radius }}><title>{{ label }}</title></circle>
{%- endfor %}{% endfor %}</svg></figure>
"""
_TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined).from_string(CHART)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart: points, or a step between every two edges."""

    name: str
    xs: Sequence[float]
    """Of points; of steps the edges, one more than `ys`."""
    ys: Sequence[float]
    visible: bool = False
    """Whether the points are drawn as dots."""


@dataclass(frozen=True)
class _Drawn:
    name: str
    path: str
    dots: list[tuple[float, float, str]]
    radius: float


def chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    square: bool = False,
    top: float | None = None,
) -> Markup:
    """A chart of up to COLOURS series; y begins at 0 and ends at `top`, or above the largest value.

    `log` doubles x from tick to tick; `square` has both axes from 0 to 1 and their diagonal.
    """
    series = series[:COLOURS]
    xs = [0.0, 1.0] if square else [x for one in series for x in one.xs]
    highest = 1.0 if square else top or max((y for one in series for y in one.ys), default=0.0) or 1.0
    y_ticks = ticks(highest)
    place_x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, math.log2 if log else float)
    place_y = _scale(0, max(highest, y_ticks[-1]), HEIGHT - BOTTOM, TOP, float)
    x_ticks = _doublings(min(xs), max(xs)) if log else [value for value in ticks(max(xs)) if value <= max(xs)]
    filled = _TEMPLATE.render(
        title=title,
        x_label=x_label,
        series=[_drawn(one, place_x, place_y) for one in series],
        x_ticks=[(place_x(value), f"{value:g}") for value in x_ticks],
        y_ticks=[(place_y(value), f"{value:g}") for value in y_ticks],
        diagonal=_path([(place_x(0), place_y(0)), (place_x(1), place_y(1))]) if square else "",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
    )
    return Markup(filled)


def ticks(highest: float) -> list[float]:
    """From 0 to `highest` or just above it in round steps."""
    rough = highest / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [round(index * step, 12) for index in range(math.ceil(highest / step - 1e-9) + 1)]


def _doublings(lowest: float, highest: float) -> list[float]:
    powers = range(math.ceil(math.log2(lowest)), math.floor(math.log2(highest)) + 1)
    every = max(1, len(powers) // 8)
    return [2.0**power for power in powers[::every]]


def _scale(
    lowest: float, highest: float, begin: float, end: float, of: Callable[[float], float]
) -> Callable[[float], float]:
    first, width = of(lowest), (of(highest) - of(lowest)) or 1.0
    return lambda value: round(begin + (of(value) - first) / width * (end - begin), 1)


def _drawn(one: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> _Drawn:
    is_steps = len(one.xs) == len(one.ys) + 1
    points = list(zip(one.xs, one.ys))
    corners = points
    if is_steps:
        corners = [(x, y) for left, right, y in zip(one.xs, one.xs[1:], one.ys) for x in (left, right)]
        points = [((left + right) / 2, y) for left, right, y in zip(one.xs, one.xs[1:], one.ys)]
    dots = [(place_x(x), place_y(y), f"{one.name}: {y:.4g} at {x:.4g}") for x, y in points]
    path = _path([(place_x(x), place_y(y)) for x, y in corners])
    return _Drawn(one.name, path, dots, 4.5 if one.visible else 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""
