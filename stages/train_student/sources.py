"""The caches and views of a training, and the share of the stream that each of them gets. Loads no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.cache.settings import VIEW_SUFFIX
from pipeline.errors import ConfigError
from pipeline.stores.places import store_of
from pipeline.stores.store import Store

SOURCES = "sources"
"""Of every target of a mixture, the number of its source, by their name in a batch."""
SUMMED = ("targets", "loss", "cross_entropy", "kl")
"""What is summed up by source."""


@dataclass(frozen=True)
class Source:
    """A cache or a view."""

    place: Store
    share: Fraction | None
    """As it was given; None where it goes by size."""
    name: str
    """What the log and the report call it."""


def sources_of(places: Sequence[Store]) -> list[Source]:
    """The sources that `--cache` names as PLACE or PLACE=SHARE; raises ConfigError."""
    found = []
    for place in places:
        text, equals, share = str(place).rpartition("=")
        number = _number(share) if equals else None
        if number is not None and number <= 0:
            raise ConfigError(f"cache is {place}; the share after = must be above 0.")
        found.append((place, None) if number is None else (store_of(text), number))
    given = [number for _, number in found if number is not None]
    if 0 < len(given) < len(found) and sum(given) >= 1:
        raise ConfigError(
            f"cache: the shares add up to {float(sum(given)):g}, which leaves nothing for those without one; give "
            "every cache a share, or less than 1 in all."
        )
    seen: Counter[str] = Counter()
    sources = []
    for place, number in found:
        name = place.name.removesuffix(VIEW_SUFFIX)
        seen[name] += 1
        sources.append(Source(place, number, name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return sources


def shares_of(sources: Sequence[Source], sizes: Sequence[int]) -> list[Fraction]:
    """The shares of the stream, exact, 1 in all: what was given, and by their sizes what is left for the others."""
    given = sum((source.share for source in sources if source.share is not None), Fraction(0))
    free = sum(size for source, size in zip(sources, sizes) if source.share is None)
    if not free:
        return [(source.share or Fraction(0)) / given for source in sources]
    left = 1 - given
    return [left * size / free if source.share is None else source.share for source, size in zip(sources, sizes)]


def _number(text: str) -> Fraction | None:
    """An exact number, None if it is none."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
