"""What is checked before a student is loaded."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.cache.manifest import CacheManifest
from pipeline.cache.reader import Cache
from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.files import held
from pipeline.ownership import claim, entries_that_differ, told
from pipeline.settings import resolved
from pipeline.stores.store import Store
from pipeline.targets import column_of
from pipeline.weights import hash_config, hash_weights
from stages.train_student.ranks import rank
from stages.train_student.sampler import StepShape
from stages.train_student.settings import TrainConfig
from stages.train_student.sketch import SketchHead
from stages.train_student.sources import shares_of, sources_of
from stages.train_student.tails import DRAWN_TAILS, TAILS

RUN = "run.json"
FREE_TO_CHANGE = (
    *("out", "log_steps", "save_steps", "keep_checkpoints", "batch_size", "gradient_accumulation"),
    *("loader_workers", "tensorboard", "on_bad_loss", "trust_remote_code", "stall_s"),
)
"""Settings that a resumed run may change: with the same global batch they do not change what is trained."""
PATHS = ("cache", "eval_cache", "student")
"""Settings that say where something lies, which may change; what it is may not."""
NOT_IN_CACHE = ("container", "partitions")
"""Entries of a cache's identity that do not change what is read from it."""


def require_targets(config: TrainConfig, place: Store, manifest: CacheManifest) -> None:
    """Refuse a temperature or a tail that a cache does not hold."""
    _require_temperature(place, manifest, config)
    if manifest.top_k == 0 and config.tail != "sampled":
        raise ConfigError(f"{place}: holds draws alone (top_k is 0); take --tail sampled, not {config.tail!r}.")
    if manifest.top_k > 0 and config.tail == "sampled":
        raise ConfigError(
            f"{place}: holds the top {manifest.top_k} and draws from the rest alone; take --tail hybrid, or "
            "cache again with --top-k 0 for 'sampled'."
        )
    if config.tail in DRAWN_TAILS and config.temperature != manifest.draw_temperature:
        drawn = "no draws" if manifest.draw_temperature is None else f"draws at T={manifest.draw_temperature:g} alone"
        raise ConfigError(
            f"{place}: tail {config.tail!r} at T={config.temperature:g} needs draws from the teacher; it has "
            f"{drawn}; cache again with --tail-samples and --draw-temperature {config.temperature:g}."
        )


def sketch_of(cache: Cache) -> SketchHead | None:
    """The sketch of the tails of a cache, None where it has none."""
    sketch = cache.sketch
    return None if sketch is None else SketchHead.of_cache(sketch)


def require_sketch(config: TrainConfig, caches: Sequence[Cache]) -> SketchHead | None:
    """The sketch that the tail needs, None where it needs none; refuses a cache without it.

    One head draws the tails of all tokens, whatever cache they are from, so that all have to have the same.
    """
    if not TAILS[config.tail].is_sketched:
        return None
    for cache in caches:
        if cache.sketch is None:
            raise ConfigError(
                f"{cache.place}: holds no sketch of the tail, which tail {config.tail!r} needs; take another --tail, "
                "or cache again with --tail-rank."
            )
        if cache.manifest.sketch != caches[0].manifest.sketch:
            raise CacheMismatchError(
                f"{cache.place}: its sketch of the tail is not that of {caches[0].place} ({cache.manifest.sketch} and "
                f"{caches[0].manifest.sketch}), and tail {config.tail!r} needs one for all; take another --tail, or "
                "caches with one sketch."
            )
    return sketch_of(caches[0])


def require_same_ids(place: Store, manifest: CacheManifest, first: Store, known: CacheManifest) -> None:
    """Refuse a cache whose ids do not mean what they mean in the first one."""
    if difference := manifest.tokenizer.difference(known.tokenizer):
        raise CacheMismatchError(f"{place}: its tokenizer is not that of {first}: {difference}.")


def require_same_vocabulary(place: Store, manifest: CacheManifest, first: Store, known: CacheManifest) -> None:
    """Refuse a cache whose teacher knows other ids than that of the first one: their tails would be of other ids."""
    if manifest.vocab_size != known.vocab_size:
        raise CacheMismatchError(
            f"{place}: a vocabulary of {manifest.vocab_size}; {first} has {known.vocab_size}; take caches by teachers "
            "of one vocabulary."
        )


def approximation_note(config: TrainConfig, caches: Sequence[Cache]) -> str | None:
    """That the targets of some of the caches are approximate, and how near their sketch came where that is known."""
    temperature = config.temperature
    without = [cache for cache in caches if temperature not in cache.manifest.temperatures]
    if not without or (fitted := without[0].fitted_sketch()) is None:
        return None
    record, names = fitted.record, " and ".join(str(cache.place) for cache in without)
    known = ", ".join(f"{kl:.3g} nats at T={T:g}" for T, kl in zip(record.temperatures, record.mean_kl))
    return (
        f"{names}: T={temperature:g} was not captured; targets and metrics there are approximate, by a sketch of the "
        f"tail whose KL from the teacher was {known}."
    )


def require_measurable(config: TrainConfig, place: Store, held_out: CacheManifest) -> None:
    """Refuse a held-out cache that the student cannot be measured on."""
    _require_temperature(place, held_out, config)
    if held_out.top_k == 0:
        raise ConfigError(f"{place}: holds draws alone (top_k is 0); an evaluation needs a top k.")


def require_room(config: TrainConfig, place: Store, context_length: int, held_out: CacheManifest) -> None:
    """Refuse a held-out cache whose sequences are longer than the student's context."""
    if held_out.sequence_length > context_length:
        raise CacheMismatchError(
            f"{place}: sequences of {held_out.sequence_length} tokens; the student {config.student} has a "
            f"context of {context_length}; evaluate on a cache with a shorter --sequence-length."
        )


def open_folder(
    config: TrainConfig, caches: Sequence[CacheManifest], held_out: Sequence[CacheManifest], shape: StepShape
) -> None:
    """Record what is trained in the output folder, or check that it is the run that is there.

    Caches and student are compared by what they are, wherever they lie by now. How a step's sequences are shared
    among ranks and micro-batches may change, their number may not: the position in the data is the number of steps
    times the global batch.
    """
    if rank() != 0:
        return  # rank 0 looks for all
    run = _description(config, caches, held_out, shape)
    known = _defaults() | claim(config.out, RUN, run, "training run")
    different = entries_that_differ(known, run, [key for key in run if key in known and key not in PATHS])
    if len(held_out) != len(_listed(known["eval_cache"])):
        different["eval_cache"] = known["eval_cache"], run["eval_cache"]
    if different:
        hint = ""
        if "global_batch" in different:
            hint = (
                f" (batch_size {shape.batch_size} x gradient_accumulation {shape.accumulation} x {shape.world_size} "
                "ranks); the same global batch continues with any number of ranks"
            )
        found = told(different) + hint
        raise ConfigError(f"{config.out}: holds a run with other settings: {found}; choose another --out.")


def alone_in(out: Path) -> AbstractContextManager[None]:
    """Hold the folder of a run against other trainings: two would delete each other's checkpoints."""
    if rank() != 0:
        return nullcontext()
    return held(
        out / RUN, ConfigError(f"{out}: another `pipeline train-student` writes there; wait, or choose another.")
    )


def _description(
    config: TrainConfig, caches: Sequence[CacheManifest], held_out: Sequence[CacheManifest], shape: StepShape
) -> dict[str, Any]:
    """What decides the outcome, and the paths of that time for whoever reads the file."""
    run = {key: value for key, value in resolved(config).items() if key not in FREE_TO_CHANGE}
    run |= {"global_batch": shape.global_batch, "cache_corpus": caches[0].corpus, "shares": _shares(config, caches)}
    for setting, manifests in (("cache", caches), ("eval_cache", held_out)):
        for number, manifest in enumerate(manifests, start=1):
            name = setting if number == 1 else f"{setting} {number}"
            entries = manifest.identity().items()
            run |= {f"{name}: {key}": _json(value) for key, value in entries if key not in NOT_IN_CACHE}
    return run | {f"student: {key}": value for key, value in _student_identity(config.student).items()}


def _shares(config: TrainConfig, caches: Sequence[CacheManifest]) -> list[str] | None:
    """Of a mixture, which one cache is not."""
    if len(caches) == 1:
        return None
    return [str(share) for share in shares_of(sources_of(config.cache), [cache.num_sequences for cache in caches])]


def _listed(value: Any) -> list[Any]:
    """A setting that takes several, as this or an earlier version, which took one, has written it."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _student_identity(path: Path) -> dict[str, str]:
    config_path = path if path.suffix == ".json" else path / "config.json"
    document = json.loads(config_path.read_text(encoding="utf-8"))
    identity = {"config": hash_config(document)}
    return identity if path.suffix == ".json" else identity | {"weights": hash_weights(path)}


def _defaults() -> dict[str, Any]:
    """What an earlier version, which did not know all settings of today, trained with."""
    return {spec.name: _json(spec.default) for spec in dataclasses.fields(TrainConfig)} | {"shares": None}


def _json(value: Any) -> Any:
    """The value as it is read back from a file."""
    return list(value) if isinstance(value, tuple) else value


def _require_temperature(cache: Store, manifest: CacheManifest, config: TrainConfig) -> None:
    if config.approximate_temperature and manifest.tail_rank:
        return
    hint = ""
    if manifest.tail_rank:
        hint = " --approximate-temperature trains at others, whose targets are approximate."
    elif config.approximate_temperature:
        hint = " It holds no sketch of the tail, by which others are approximated; cache again with --tail-rank."
    try:
        column_of(manifest.temperatures, config.temperature)
    except ConfigError as exc:
        raise ConfigError(f"{cache}: {exc}{hint}") from exc
