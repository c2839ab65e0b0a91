"""The page of `pipeline inspect --html`: figures of a sample and sequences token by token, without a script."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from pipeline.cache.measures import MASSES, Histogram, Largest
from pipeline.cache.reader import ReadableCache
from pipeline.documents import printable
from pipeline.inspection.charts import COLOURS, Series, chart
from pipeline.inspection.figures import FEWEST, WAYS, Figures
from pipeline.inspection.lines import context, opening
from pipeline.inspection.sample import Sample
from pipeline.inspection.settings import InspectConfig
from pipeline.inspection.summary import Summary, exponential
from pipeline.inspection.template import BODY, STYLE
from pipeline.inspection.tokens import Token, document_means, tokens_of
from pipeline.pages import Table, write_page
from pipeline.spelling import Speller

SHADES = (0.5, 0.2, 0.05, 0.01, 0.001)
"""Probabilities of a label below which its token is darker by a shade."""
HISTOGRAMS = [
    ("Entropy of the teacher", "nats; share of the positions", "entropies"),
    ("Probability of the label", "probability; share of the positions", "label_probs"),
    ("Mass outside the entries", "probability; share of the positions", "tail_masses"),
]
"""Title, what x is, and the name among TemperatureFigures."""
LINE_END = "↵\n"


@dataclass(frozen=True)
class _Map:
    """A sequence of the page."""

    title: str
    tokens: list[Token]
    documents: list[str]
    left: int


def write_inspection(
    config: InspectConfig,
    summary: Summary,
    parts: Mapping[str, float],
    sample: Sample,
    figures: Figures,
    speller: Speller,
    wanted: int | None,
) -> None:
    """Write the page to `config.html`; the sequence that is wanted, if any, comes first of those that are shown."""
    assert config.html is not None
    cache = sample.cache
    shown = np.random.default_rng(config.seed).permutation(sample.numbers)[: config.maps].tolist()
    numbers = list(dict.fromkeys(([] if wanted is None else [wanted]) + sorted(shown)))
    name = str(cache.place)
    write_page(
        config.html,
        f"inspect: {name}",
        BODY,
        STYLE,
        name=name,
        verdict=_verdict(figures),
        facts=list(summary.rows()),
        parts=list(parts.items()),
        share=sample.described(),
        counts=f"{figures.num_targets:,} targets, {figures.num_documents:,} documents",
        colours=COLOURS,
        more_temperatures=len(figures.by_temperature) if len(figures.by_temperature) > COLOURS else 0,
        figures=_charts(figures),
        needed=_needed(figures),
        worst=list(_worst(cache, figures, speller)) if config.worst else [],
        maps=[_map(config, cache, number, figures.temperature, speller) for number in numbers],
        temperature=f"{figures.temperature:g}",
        shades=[f"p ≥ {SHADES[0]:g}", *(f"< {shade:g}" for shade in SHADES)],
        shade_of=lambda prob: sum(prob < shade for shade in SHADES),
        show=_shown,
        alone=lambda text: _shown(text if text.strip(" ") else "␣" * len(text)),
    )


def _shown(text: str) -> str:
    """A token as the page shows it: nothing in it turns or hides what stands beside it."""
    return printable(text, newline=LINE_END)


def _verdict(figures: Figures) -> str:
    """The sample in a sentence."""
    found = figures.by_temperature[figures.temperature]
    entropy = found.entropies.mean
    sentence = (
        f"At T = {figures.temperature:g} the teacher is as unsure as among {exponential(entropy)} equal choices "
        f"(entropy {entropy:.2f} nats); the tokens that follow surprise it by {found.cross_entropy:.2f} nats"
    )
    if found.coverage is None:
        return f"{sentence}. The cache holds draws alone."
    held = found.coverage.curve
    stored = f"stored entries, {len(held)} at most," if figures.is_ragged else f"{len(held)} stored entries"
    return f"{sentence}. Its first choice holds {held[0]:.2f} of the mass, the {stored} {held[-1]:.2f}."


def _charts(figures: Figures) -> list[Markup]:
    by_temperature = {f"T = {T:g}": found for T, found in figures.by_temperature.items()}
    charts = []
    histograms = HISTOGRAMS
    if any(found.coverage is None for found in by_temperature.values()):
        histograms = [one for one in HISTOGRAMS if one[-1] != "tail_masses"]
    else:
        curves = [
            Series(name=name, xs=range(1, len(found.coverage.curve) + 1), ys=found.coverage.curve.tolist())
            for name, found in by_temperature.items()
            if found.coverage is not None
        ]
        charts.append(
            chart("Captured mass, by the number of entries", "most probable entries", curves, log=True, top=1)
        )
    for title, x_label, name in histograms:
        charts.append(
            chart(title, x_label, [_shares(which, getattr(found, name)) for which, found in by_temperature.items()])
        )
    calibration = figures.by_temperature[figures.temperature].calibration
    if calibration is not None:
        there = np.flatnonzero(calibration.counts)
        points = Series(
            name=f"T = {figures.temperature:g}",
            xs=calibration.confidence[there].tolist(),
            ys=calibration.accuracy[there].tolist(),
            visible=True,
        )
        title = f"How often its first choice follows (calibration error {calibration.error:.3f})"
        charts.append(
            chart(title, f"probability of the first choice at T = {figures.temperature:g}", [points], square=True)
        )
    places = [(first, mean) for first, _, mean in figures.by_place()]
    if len(places) > 1:
        line = Series(
            name="mean surprise, nats", xs=[first for first, _ in places], ys=[mean for _, mean in places], visible=True
        )
        title = f"Surprise by the place in the document, nats at T = {figures.temperature:g}"
        charts.append(chart(title, "tokens before the label", [line], log=True))
    return charts


def _shares(name: str, histogram: Histogram) -> Series:
    shares = histogram.counts / max(histogram.num_values, 1)
    mean = f", mean {histogram.mean:.3g}" if histogram.num_values else ""
    return Series(name=f"{name}{mean}", xs=histogram.edges.tolist(), ys=shares.tolist())


def _needed(figures: Figures) -> Table:
    rows = []
    for temperature, found in figures.by_temperature.items():
        if found.coverage is None:
            return []
        cells = [[_entries(found.coverage.quantile(mass, share)) for share in (0.5, 0.95)] for mass in MASSES]
        rows.append([f"T = {temperature:g}", *(f"{half} / {most}" for half, most in cells)])
    return [["mass", *(f"{mass:g}" for mass in MASSES)], *rows]


def _entries(count: int | None) -> str:
    return "more" if count is None else str(count)


def _worst(cache: ReadableCache, figures: Figures, speller: Speller) -> Iterator[tuple[str, Table]]:
    """Tables with their titles."""
    for way, worst in figures.worst_positions.items():
        name, rows = WAYS[way], [["value", "sequence:token", "text", "label", "first choice"]]
        for value, (number, position) in _of(worst):
            texts = map(printable, context(cache[number], position, speller))
            rows.append([f"{value:.4f}", f"{number}:{position}", *texts])
        yield f"Positions: {name}", rows
        rows = [["mean", "sequence:token", "tokens", "begins"]]
        for value, (number, document) in _of(figures.worst_documents[way]):
            start, length, text = opening(cache[number], document, speller)
            rows.append([f"{value:.4f}", f"{number}:{start}", f"{length:,}", printable(text)])
        if len(rows) > 1:
            yield f"Documents of {FEWEST} targets or more: {name} in the mean", rows


def _of(worst: Largest) -> Iterator[tuple[float, list[int]]]:
    return zip(worst.values.tolist(), worst.places.tolist())


def _map(config: InspectConfig, cache: ReadableCache, number: int, temperature: float, speller: Speller) -> _Map:
    sequence = cache[number]
    documents = []
    for index, (num_tokens, num_targets, mean) in enumerate(document_means(sequence, temperature), start=1):
        said = "no targets" if math.isnan(mean) else f"{num_targets:,} targets, {mean:.2f} nats a label"
        documents.append(f"document {index}: {num_tokens:,} tokens, {said}")
    tokens = tokens_of(sequence, speller, temperature, config.entries, config.longest)
    title = f"Sequence {number} ({sequence.key.hex()[:12]})"
    return _Map(title, tokens, documents, len(sequence.token_ids) - len(tokens))
