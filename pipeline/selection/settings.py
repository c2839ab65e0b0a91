"""The settings of `pipeline select`, and what its rules mean."""

import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.settings import VIEW_SUFFIX
from pipeline.errors import ConfigError
from pipeline.settings import Settings, required, setting
from pipeline.stores.store import Store

MEASURES = {
    "perplexity": "exp of the teacher's mean surprise at the labels",
    "label-logprob": "mean log-probability of the labels, nats",
    "entropy": "mean entropy of the teacher, nats",
    "tail-mass": "mean probability outside the stored entries",
    "sure": "share of positions whose most probable id has --sure or more",
    "learnability": "mean cross-entropy of --student less that of the teacher, nats, at T = 1",
    "targets": "number of targets",
}
"""What is known of a sequence or a document, as means over its targets."""
RANDOM = "random"
ENDS = ("largest", "smallest")


@dataclass(frozen=True)
class Band:
    """A range of a measure, both ends in it; or of its quantiles."""

    measure: str
    low: float
    high: float
    is_share: bool
    """Whether the ends are shares of the units in rising order of the measure."""

    @classmethod
    def parse(cls, text: str) -> "Band":
        """The range in 'MEASURE=LOW:HIGH'; raises ConfigError."""
        measure, _, ends = text.partition("=")
        low, colon, high = ends.partition(":")
        is_share = "%" in ends
        bounds = (0.0, 1.0) if is_share else (-math.inf, math.inf)
        band = cls(measure, _end(low, bounds[0], is_share), _end(high, bounds[1], is_share), is_share)
        sound = bounds[0] <= band.low <= band.high <= bounds[1]  # not of nan
        if not colon or measure not in MEASURES or not sound:
            raise ConfigError(
                f"where is {text!r}; expected MEASURE=LOW:HIGH such as perplexity=2:50, entropy=1.5: or "
                f"entropy=10%:90%, with one of: {', '.join(MEASURES)}."
            )
        return band


def _end(text: str, default: float, is_share: bool) -> float:
    """An end of a range; nan of what is none."""
    if not text.strip():
        return default
    if is_share != text.strip().endswith("%"):
        return math.nan
    try:
        return float(text.strip().removesuffix("%")) / (100 if is_share else 1)
    except ValueError:
        return math.nan


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Settings):
    """Settings of `pipeline select`."""

    cache: Store = required("Folder or URL of a finished cache, or a view to select from.", argument=True)
    out: Store = required("File to write the view to; its name ends in .json.")
    by: str = setting(
        "sequence",
        "What is selected: whole sequences, or documents: the labels of the others in their sequences are off.",
        choices=("sequence", "document"),
    )
    where: tuple[str, ...] = setting(
        (),
        "Keep what has a measure in a range, MEASURE=LOW:HIGH, either end may be left out; in per cent, quantiles "
        f"(entropy=10%:90%). Measures: {', '.join(MEASURES)}.",
    )
    keep: float | None = setting(None, "Of these, keep so many; below 1, that share.")
    order: str = setting(
        RANDOM, "Which ones --keep takes: 'random' (by --seed), 'largest:MEASURE' or 'smallest:MEASURE'."
    )
    temperature: float | None = setting(
        None, "Temperature T of what the teacher said; none takes 1, or the lowest that the cache has."
    )
    sure: float = setting(0.9, "Probability from which on the teacher is sure of its most probable id.")
    student: Path | None = setting(
        None, "Folder or hub name of the student that learnability is measured against: read in one pass."
    )
    batch_size: int = setting(8, "Sequences that the student reads at a time.")
    seed: int = setting(0, "Of a random order.")
    workers: int | None = setting(None, "Shards that are read at the same time; none takes one a core.")
    trust_remote_code: bool = setting(False, "Run the code that the student's folder brings along.")

    def check(self) -> None:
        self.at_least("batch_size", 1)
        self.at_least("workers", 1)
        self.seed_fits()
        if self.temperature is not None:
            self.positive("temperature", (self.temperature,))
        if not str(self.out).endswith(VIEW_SUFFIX):
            raise ConfigError(f"out is {self.out}; the name of a view ends in {VIEW_SUFFIX}.")
        if not 0 < self.sure <= 1:
            raise ConfigError(f"sure is {self.sure}; it must be a probability above 0.")
        keep = self.keep
        if keep is not None and not (0 < keep < 1 or (keep >= 1 and float(keep).is_integer())):
            raise ConfigError(f"keep is {keep:g}; expected a share below 1 or a whole number.")
        if keep is None and not self.where:
            raise ConfigError("neither --where nor --keep is given: everything would be selected.")
        if keep is None and self.order != RANDOM:
            raise ConfigError(f"order is {self.order!r} without keep; give --keep, such as 0.2.")
        self.ranking()
        if "learnability" in self.measures() and self.student is None:
            raise ConfigError("learnability is measured against a student; give --student.")

    def bands(self) -> list[Band]:
        """The ranges that are asked for."""
        return [Band.parse(text) for text in self.where]

    def ranking(self) -> tuple[str, bool] | None:
        """The measure that --keep goes by, and whether it takes the largest; None for a random order."""
        if self.order == RANDOM:
            return None
        end, _, measure = self.order.partition(":")
        if end not in ENDS or measure not in MEASURES:
            raise ConfigError(
                f"order is {self.order!r}; expected random, largest:MEASURE or smallest:MEASURE with one of: "
                f"{', '.join(MEASURES)}."
            )
        return measure, end == ENDS[0]

    def measures(self) -> set[str]:
        """All that have to be known."""
        ranking = self.ranking()
        return {band.measure for band in self.bands()} | ({ranking[0]} if ranking else set())
