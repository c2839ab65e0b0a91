"""`pipeline select`: the part of a cache that a student is to be trained on, by what the teacher said of it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.cache.measures import documents_of
from pipeline.cache.pieces import Piece
from pipeline.cache.reader import Cache, CacheView, open_cache
from pipeline.cache.view import ViewFile, encoded, fingerprint, write_view
from pipeline.cpu import available_cores
from pipeline.errors import ConfigError
from pipeline.formats.layout import CachedSequence
from pipeline.hashes import seeded
from pipeline.parallel import in_processes
from pipeline.progress import Reporter
from pipeline.selection.settings import Band, SelectConfig
from pipeline.selection.units import STUDENT, SUMMED, Units, together, units_of
from pipeline.settings import resolved
from pipeline.targets import column_of

FEW_TARGETS = 1_000_000
"""Up to so many no other process is started: that takes a second, too."""
StudentLosses = Callable[[SelectConfig, Cache, Reporter], Iterator[tuple[CachedSequence, np.ndarray]]]
"""Every sequence of a cache with the student's cross-entropies, nats, at its targets [N]."""


def select(
    config: SelectConfig, reporter: Reporter | None = None, student_losses: StudentLosses | None = None
) -> ViewFile:
    """Write the view that `config` asks for, and return it; raises ConfigError if nothing is selected.

    `student_losses` is what learnability is measured by: reading a student is another stage's work.
    """
    reporter = reporter or Reporter()
    cache = open_cache(config.cache)
    temperature = _temperature(config, cache)
    units = _measured(config, cache, temperature, reporter, student_losses)
    chosen_U = choose(units, config)
    view = _view(config, cache, units, chosen_U, temperature)
    write_view(config.out, cache.folder, view)
    documents, total = f"{int(chosen_U.sum()):,} documents in ", cache.manifest.num_targets
    reporter.log(
        f"{config.out}: {documents if config.by == 'document' else ''}{view.num_sequences:,} of {len(cache):,} "
        f"sequences, {view.num_targets:,} of {total:,} targets ({view.num_targets / total:.1%}), of {config.cache}"
    )
    return view


def choose(units: Units, config: SelectConfig) -> np.ndarray:
    """bool [U]: the units that are selected: those in all ranges, and of these as many as are to be kept."""
    has_targets_U = units.num_targets > 0
    chosen_U = has_targets_U.copy()
    for band in config.bands():
        chosen_U &= _inside(units.measure(band.measure), has_targets_U, band)
    if config.keep is not None:
        candidates = np.flatnonzero(chosen_U)
        count = int(config.keep) if config.keep >= 1 else max(1, round(config.keep * len(candidates)))
        if count > len(candidates):
            raise ConfigError(f"keep is {count:,}; only {len(candidates):,} {config.by}s fit.")
        chosen_U = np.zeros_like(chosen_U)
        chosen_U[candidates[_order(units, config)[candidates].argsort(kind="stable")[:count]]] = True
    if not chosen_U.any():
        raise ConfigError(f"no {config.by} of {config.cache} fits {' and '.join(config.where)}; nothing is selected.")
    return chosen_U


def _inside(values_U: np.ndarray, has_targets_U: np.ndarray, band: Band) -> np.ndarray:
    if not band.is_share:
        with np.errstate(invalid="ignore"):
            return (values_U >= band.low) & (values_U <= band.high)
    rising = np.flatnonzero(has_targets_U)
    rising = rising[values_U[rising].argsort(kind="stable")]
    inside_U = np.zeros(len(values_U), bool)
    inside_U[rising[round(band.low * len(rising)) : round(band.high * len(rising))]] = True
    return inside_U


def _order(units: Units, config: SelectConfig) -> np.ndarray:
    """[U]: what is kept first has the smallest value. A random one goes by what a unit is, not by where it lies."""
    ranking = config.ranking()
    if ranking is not None:
        measure, largest = ranking
        return -units.measure(measure) if largest else units.measure(measure)
    names = units.keys[:, :8].copy().view("<u8").ravel().astype(np.uint64)
    if config.by == "document":
        firsts = np.cumsum(units.num_documents) - units.num_documents
        places = np.arange(units.num_documents.sum()) - np.repeat(firsts, units.num_documents)
        names = seeded(np.repeat(names, units.num_documents)) ^ places.astype(np.uint64)
    return seeded(names, config.seed)


def _temperature(config: SelectConfig, cache: Cache) -> float:
    captured = cache.manifest.temperatures
    if "learnability" in config.measures():
        column_of(captured, 1.0)
    if config.temperature is None:
        return 1.0 if 1.0 in captured else min(captured)
    column_of(captured, config.temperature)
    return float(config.temperature)


def _measured(
    config: SelectConfig, cache: Cache, temperature: float, reporter: Reporter, student_losses: StudentLosses | None
) -> Units:
    sums = sorted({name for measure in config.measures() for name in SUMMED[measure]} - {STUDENT})
    measure = functools.partial(_numbered, by=config.by, sums=sums, temperature=temperature, sure=config.sure)
    pieces = list(enumerate(cache.pieces()))
    workers = 1 if cache.manifest.num_targets <= FEW_TARGETS else config.workers or available_cores()
    parts: dict[int, Units] = {}
    with reporter.progress("read", cache.manifest.num_targets, "targets") as progress:
        for number, part in in_processes(measure, pieces, workers):
            parts[number] = part
            progress.advance(int(part.num_targets.sum()))
    units = together(parts[number] for number in range(len(pieces)))
    if "learnability" in config.measures():
        assert student_losses is not None
        units.sums[STUDENT] = _student_sums(config, student_losses(config, cache, reporter))
    return units


def _numbered(piece: tuple[int, Piece], **how: Any) -> tuple[int, Units]:
    return piece[0], units_of(piece[1], **how)


def _student_sums(config: SelectConfig, found: Iterator[tuple[CachedSequence, np.ndarray]]) -> np.ndarray:
    """float64 [U]: the student's cross-entropies, summed."""
    sums = []
    for sequence, losses_N in found:
        groups_N = documents_of(sequence) if config.by == "document" else np.zeros(len(losses_N), np.int64)
        size = len(sequence.document_lengths) if config.by == "document" else 1
        sums.append(np.bincount(groups_N, weights=losses_N, minlength=size))
    return np.concatenate(sums)


def _view(config: SelectConfig, cache: Cache, units: Units, chosen_U: np.ndarray, temperature: float) -> ViewFile:
    before = cache.selected if isinstance(cache, CacheView) else None
    base = cache.base if isinstance(cache, CacheView) else cache
    starts = np.concatenate([[0], np.cumsum(units.num_documents)])
    kept_S, documents_D = chosen_U, None if before is None else before.documents
    if config.by == "document":
        kept_S = np.logical_or.reduceat(chosen_U, starts[:-1])
        is_left_out = np.repeat(kept_S, units.num_documents) & ~chosen_U & (units.num_targets > 0)
        documents_D = chosen_U if is_left_out.any() or documents_D is not None else None
    rows = np.flatnonzero(kept_S) if before is None else before.rows[kept_S]
    of_kept_D = np.repeat(kept_S, units.num_documents)
    return ViewFile(
        cache="",
        fingerprint=fingerprint(base.manifest),
        rule=_rule(config, temperature) | ({"of": cache.view.rule} if isinstance(cache, CacheView) else {}),
        num_sequences=int(kept_S.sum()),
        num_tokens=int(units.num_tokens[kept_S].sum()),
        num_documents=int(of_kept_D.sum()),
        num_targets=int(units.num_targets[chosen_U].sum()),
        rows=encoded(rows, "<u4"),
        keys=encoded(units.keys[kept_S], np.uint8),
        document_counts=None if documents_D is None else encoded(units.num_documents[kept_S], "<u4"),
        documents=None if documents_D is None else encoded(np.packbits(documents_D[of_kept_D]), np.uint8),
    )


def _rule(config: SelectConfig, temperature: float) -> dict[str, Any]:
    """The settings that decided."""
    measures = config.measures()
    used = {
        "keep": config.keep is not None,
        "order": config.keep is not None,
        "seed": config.keep is not None and config.ranking() is None,
        "sure": "sure" in measures,
        "student": "learnability" in measures,
    }
    settings = {name: value for name, value in resolved(config).items() if used.get(name, name in ("by", "where"))}
    return settings | {"temperature": temperature}
