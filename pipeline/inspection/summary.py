"""What a cache is, by whom, how much of it is there, and how sure the teacher was: from manifest and records alone."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.cache.commits import ShardCommit
from pipeline.cache.reader import CacheView, ReadableCache
from pipeline.cache.statistics import SKETCH_KL
from pipeline.cache.view import described
from pipeline.documents import short
from pipeline.formats.codec import is_lossless
from pipeline.sketch import sketch_name

PARTS = {
    "ids": (
        *("counts", "ids", "codes", "topics", "modes"),
        *("vocabulary", "table_tokens", "table_sizes", "table_entries"),
    ),
    "logits": ("logits", "steps", "levels"),
    "draws": ("draws",),
    "sketch": ("coefficients",),
    "tails, entropies, labels": (
        *("logsumexps", "tail_logprobs", "entropies", "label_logits"),
        *("tails", "nats", "label_steps"),
    ),
    "tokens and masks": (
        *("token_ids", "loss_mask", "document_lengths"),
        *("key", "checksum", "num_tokens", "num_documents", "num_targets", "num_entries"),
    ),
}
"""What a person calls the arrays of a shard of any container."""
REST = "directory"
SAID_OF_TEACHERS = ("architecture", "dtype", "head_dtype", "quantization", "engine", "weights")
"""Entries that say who a teacher is, as far as it has them; of hashes the beginning."""
HASH_SHOWN = 12


@dataclass(frozen=True)
class Certainty:
    """Means over all targets that are there, at one temperature."""

    entropy: float
    cross_entropy: float
    """Of the tokens that follow: mean surprise, nats."""
    tail_mass: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A cache in numbers."""

    cache: ReadableCache
    num_sequences: int
    num_tokens: int
    num_documents: int
    num_targets: int
    bytes: int
    certainty: dict[float, Certainty]
    """By temperature; empty if a record does not say it."""
    kl_error: float | None
    """What rounding has cost, nats, where it cost most; None if a record does not say it."""
    mean_entries: float | None
    """Entries of a target, where targets have different numbers of them; None if a record does not say it."""
    sketch_kl: tuple[float, ...]
    """KL(p_T || what the sketch makes of it) a temperature, nats; empty without, or if a record does not say it."""
    sketch_bytes: int | None
    """Of the tail sketch's file; None if there is none."""

    @classmethod
    def of(cls, cache: ReadableCache) -> "Summary":
        """Added up from the records; of a view, which has no sums of its own, what its file says."""
        if isinstance(cache, CacheView):
            view = cache.view
            counts = (view.num_sequences, view.num_tokens, view.num_documents, view.num_targets)
            names = ("num_sequences", "num_tokens", "num_documents", "num_targets")
            return cls(
                cache=cache,
                bytes=0,
                certainty={},
                kl_error=_kl_error(cache),
                mean_entries=None,
                sketch_kl=(),
                sketch_bytes=None,
                **dict(zip(names, counts)),
            )
        records = list(cache.records.values())
        totals = {
            name: sum(getattr(record, name) for record in records)
            for name in ("num_sequences", "num_tokens", "num_documents", "num_targets", "bytes")
        }
        return cls(
            cache=cache,
            certainty=_certainty(cache, totals["num_targets"]),
            kl_error=_kl_error(cache),
            mean_entries=_mean_entries(cache, totals["num_targets"]),
            sketch_kl=_sketch_kl(cache, totals["num_targets"]),
            sketch_bytes=_sketch_bytes(cache),
            **totals,
        )

    @property
    def is_whole(self) -> bool:
        """Whether all partitions are done."""
        return len(self.cache.records) == self.cache.manifest.num_partitions

    def rows(self) -> Iterator[tuple[str, str]]:
        """What is said of a cache, each with what it is about."""
        manifest = self.cache.manifest
        state = "complete" if self.is_whole else f"unfinished, {self.num_tokens / max(manifest.num_tokens, 1):.1%} done"
        yield (
            "holds",
            f"{self.num_targets:,} targets of {self.num_tokens:,} tokens: {self.num_sequences:,} sequences, "
            f"{self.num_documents:,} documents; {state} ({len(self.cache.records):,} of {manifest.num_partitions:,} "
            "shards)",
        )
        if isinstance(self.cache, CacheView):
            yield "selects", f"from {self.cache.folder}: {described(self.cache.view.rule)}"
        yield "teacher", self._teacher()
        yield (
            "corpus",
            f"{manifest.corpus[:HASH_SHOWN]}, packing {manifest.packing}, at most {manifest.sequence_length:,} tokens "
            f"a sequence, {manifest.vocab_size:,} ids",
        )
        yield "kept", self._kept()
        for temperature, mean in self.certainty.items():
            yield (
                f"T = {temperature:g}",
                f"entropy {mean.entropy:.3f} nats, as of {exponential(mean.entropy)} equal choices; label "
                f"{mean.cross_entropy:.3f} nats (perplexity {exponential(mean.cross_entropy)})"
                + (f"; outside the entries {mean.tail_mass:.3f}" if manifest.top_k else ""),
            )
        if manifest.sketch is not None and not isinstance(self.cache, CacheView):
            yield "sketch", self._sketch()
        if isinstance(self.cache, CacheView):
            return
        yield (
            "size",
            f"{self.bytes / 1e6:,.2f} MB as {manifest.container}, {self._a_target(self.bytes):.1f} bytes a target",
        )

    def _teacher(self) -> str:
        teacher = self.cache.manifest.teacher
        known = {name: teacher[name] for name in SAID_OF_TEACHERS if teacher.get(name) not in (None, "none", "")}
        said = {name: short(value, quoted=False) for name, value in known.items()}
        said |= {name: said[name][:HASH_SHOWN] for name in ("weights",) if name in said}
        place = self.cache.manifest.settings.get("teacher")
        came_from = f" from {short(place, quoted=False)}" if isinstance(place, str) else ""
        return ", ".join(
            text + came_from if name == "architecture" else f"{name.removesuffix('_dtype')} {text}"
            for name, text in said.items()
        )

    def _kept(self) -> str:
        manifest = self.cache.manifest
        what = [f"top {manifest.top_k}"] if manifest.top_k else []
        if manifest.top_p is not None:
            mean = "" if self.mean_entries is None else f", {self.mean_entries:.1f} in the mean"
            what[0] += (
                f" as far as {manifest.top_p:g} at T = {manifest.top_p_temperature:g}, {manifest.min_k} at least{mean}"
            )
        if manifest.tail_samples:
            what.append(f"{manifest.tail_samples} draws at T = {manifest.draw_temperature or math.nan:g}")
        temperatures = ", ".join(f"{temperature:g}" for temperature in manifest.temperatures)
        if not manifest.top_k or is_lossless(manifest.max_kl_error):
            rounding = "lossless"
        else:
            cost = "" if self.kl_error is None else f", {self.kl_error:.1e} measured"
            rounding = f"rounded within {manifest.max_kl_error:g} nats{cost}"
        return f"{' and '.join(what)}, exact at T = {temperatures}; {rounding}"

    def _sketch(self) -> str:
        manifest = self.cache.manifest
        known = [f"{kl:.3f} nats at T = {T:g}" for T, kl in zip(manifest.temperatures, self.sketch_kl)]
        error = f"; KL of the teacher from what it makes of the tail {', '.join(known)}" if known else ""
        size = "file missing" if self.sketch_bytes is None else f"{self.sketch_bytes / 1e6:,.2f} MB for the whole cache"
        return f"{manifest.tail_rank} coefficients a target, {size}{error}"

    def _a_target(self, num_bytes: int) -> float:
        return num_bytes / max(self.num_targets, 1)


def exponential(nats: float) -> str:
    """The number of which it is the logarithm, for a person."""
    value = math.exp(min(nats, 700))
    return f"{value:,.1f}" if value < 1e6 else f"{value:.1e}"


def bytes_by_part(cache: ReadableCache, partitions: list[int]) -> dict[str, float]:
    """Bytes a target of each of PARTS, in these shards; reads their directories."""
    sizes: Counter[str] = Counter()
    part_of = {name: part for part, names in PARTS.items() for name in names}
    total = num_targets = 0
    for partition in partitions:
        _, shard = cache.opened(partition)
        for name, size in shard.parts().items():
            sizes[part_of[name]] += size
        total += cache.records[partition].bytes
        num_targets += cache.records[partition].num_targets
    sizes[REST] = total - sizes.total()
    return {part: sizes[part] / max(num_targets, 1) for part in (*PARTS, REST) if sizes[part]}


def _certainty(cache: ReadableCache, num_targets: int) -> dict[float, Certainty]:
    records = cache.records.values()
    temperatures = cache.manifest.temperatures
    found = [[_said(record, name, len(temperatures)) for record in records] for name in _SUMS]
    if not num_targets or any(values is None for column in found for values in column):
        return {}
    entropies, tails, labels = (np.sum([v for v in column if v is not None], axis=0) / num_targets for column in found)
    return {
        temperature: Certainty(float(entropy), -float(label), float(tail))
        for temperature, entropy, tail, label in zip(temperatures, entropies, tails, labels)
    }


_SUMS = ("sum_entropy", "sum_tail_mass", "sum_label_logprob")


def _kl_error(cache: ReadableCache) -> float | None:
    found = [_said(record, "mean_kl_error", len(cache.manifest.temperatures)) for record in cache.records.values()]
    known = [float(values.max()) for values in found if values is not None]
    return max(known) if known and len(known) == len(found) else None


def _mean_entries(cache: ReadableCache, num_targets: int) -> float | None:
    found = [record.statistics.get("num_entries") for record in cache.records.values()]
    known = [value for value in found if isinstance(value, int | float) and math.isfinite(value)]
    return sum(known) / num_targets if num_targets and len(known) == len(found) else None


def _sketch_kl(cache: ReadableCache, num_targets: int) -> tuple[float, ...]:
    records = list(cache.records.values())
    found = [_said(record, SKETCH_KL, len(cache.manifest.temperatures)) for record in records]
    known = [values for values in found if values is not None]
    if not num_targets or len(known) < len(found):
        return ()
    return tuple(np.average(known, axis=0, weights=[record.num_targets for record in records]).tolist())


def _sketch_bytes(cache: ReadableCache) -> int | None:
    checksum = cache.manifest.sketch
    path = None if checksum is None else cache.folder / sketch_name(checksum)
    return path.size_and_time()[0] if path is not None and path.is_file() else None


def _said(record: ShardCommit, name: str, num_temperatures: int) -> np.ndarray | None:
    """float64 [temperatures]: what a record says; None if it does not, or what cannot be."""
    values = np.array(record.statistics.get(name, math.nan), np.float64)
    return values if values.shape == (num_temperatures,) and np.isfinite(values).all() else None
