"""The command `pipeline cache-logits`, from its settings to a finished cache."""

import functools

from pipeline.cache.manifest import CacheManifest
from pipeline.corpus import Corpus
from pipeline.hub import located
from pipeline.progress import Reporter
from pipeline.runs.failures import forget_failures
from pipeline.runs.rank import Rank, rank_from_environment
from pipeline.runs.terms import RunTerms
from stages.cache_logits.engine import NoEngine, OpenEngine
from stages.cache_logits.engines import ENGINES
from stages.cache_logits.planning import announcement, plan_cache
from stages.cache_logits.settings import CacheConfig
from stages.cache_logits.sketch_making import sketch_of_run
from stages.cache_logits.teacher import Teacher
from stages.cache_logits.vllm_engine import notes, require_vllm
from stages.cache_logits.worker import work


def cache_logits(config: CacheConfig, reporter: Reporter | None = None) -> CacheManifest:
    """Capture what is missing of the cache in `config.out` and return its manifest.

    Everything that can be checked is checked before the teacher is loaded. Killed at any moment and
    run again, it continues with what has no commit record. Any number of processes may work on one
    cache; each returns when all of it is there.
    """
    reporter = reporter or Reporter()
    config = located(config, "teacher", reporter)
    rank = rank_from_environment() if config.worker_from_env else Rank(config.worker, config.workers)
    plan = plan_cache(
        config,
        require_vllm if config.engine == "vllm" else lambda teacher: None,
        functools.partial(_new_sketch, config, reporter),
    )
    manifest = plan.cache.manifest
    for note in plan.teacher.notes:
        reporter.note(note)
    engine_class = ENGINES[config.engine]
    if config.reuse:
        num_new = manifest.num_tokens - plan.num_known_tokens
        reporter.log(
            f"{config.out}: {plan.num_known_tokens:,} tokens are in earlier caches and copied, {num_new:,} are scored."
        )
        engine_class = engine_class if num_new else NoEngine
    if config.retry_failed:
        forget_failures(config.out)
    todo = len(plan.cache.todo())
    if todo:
        plan.cache.remove_leftovers()
        reporter.log(announcement(config, manifest, todo))
        for note in notes(plan.teacher) if config.engine == "vllm" else ():
            reporter.note(note)
        sketch = plan.cache.fitted_sketch()
        work(
            plan.cache,
            plan.corpus,
            plan.known,
            lambda: engine_class(plan.teacher, config, plan.corpus.manifest.sequence_length, sketch),
            rank=rank,
            terms=RunTerms(max_failures=config.max_failures, lease_s=config.lease_s),
            stall_s=config.stall_s,
            encoding_threads=config.num_encoding_threads,
            reporter=reporter,
        )
    reporter.log(f"{config.out}: complete, {manifest.num_sequences:,} sequences, {manifest.num_targets:,} targets.")
    return manifest


def _new_sketch(config: CacheConfig, reporter: Reporter, teacher: Teacher, corpus: Corpus) -> bytes:
    """The file of a tail sketch for this run, by an engine that is gone before the capture loads its own."""
    longest = corpus.manifest.sequence_length

    def make_engine(settings: CacheConfig) -> OpenEngine:
        with reporter.waiting(f"loading {teacher.folder} with {config.engine} to fit the tail sketch"):
            return ENGINES[config.engine](teacher, settings, longest)

    return sketch_of_run(config, teacher, corpus, make_engine, reporter)
