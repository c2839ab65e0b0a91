"""A run's tail sketch: taken from where it is, or fitted to what the teacher says of a sample of the corpus."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch

from pipeline.cache.folder import CacheFolder
from pipeline.corpus import Corpus
from pipeline.errors import CacheMismatchError, ConfigError, EngineError
from pipeline.progress import Reporter
from pipeline.sketch import FittedSketch
from pipeline.targets import SparseTargets
from stages.cache_logits.engine import OpenEngine, Request
from stages.cache_logits.scoring import documents_of
from stages.cache_logits.settings import CacheConfig
from stages.cache_logits.sketch_fitting import STEPS, Head, Wanted, fit_sketch
from stages.cache_logits.teacher import Teacher

PROBED_TARGETS = 64
"""Positions at which the engine's own targets are held against what the head makes of its hidden states."""
ALLOWED = 1e-2
"""Nats by which they may differ."""

MakeEngine = Callable[[CacheConfig], OpenEngine]


def sketch_of_run(
    config: CacheConfig, teacher: Teacher, corpus: Corpus, make_engine: MakeEngine, reporter: Reporter
) -> bytes:
    """The file of the sketch for a run that has none yet.

    That of the caches in `config.reuse` if there are any, whose coefficients are worth nothing with another; else a
    new one. Raises EngineError for a teacher whose logits are no linear map of its hidden states.
    """
    for folder in config.reuse:
        contents = CacheFolder(folder).sketch_contents()
        if contents is None:
            raise CacheMismatchError(f"{folder}: has no tail sketch; without --tail-rank its targets can be reused.")
        return contents
    engine = make_engine(dataclasses.replace(config, tail_rank=0, tail_samples=0, draw_temperature=None))
    with closing(engine):
        requests = list(sample_requests(corpus, config.sketch_tokens))
        weight_VH, bias_V = engine.head()
        head = Head(
            weight_VH=torch.from_numpy(weight_VH), bias_V=torch.from_numpy(bias_V), softcap=teacher.model.logit_softcap
        )
        _require_linear(engine, head, requests[0], teacher)
        total = sum(len(request.positions) for request in requests)
        found = []
        with reporter.progress("sketch: sample", total) as progress:
            for _, hidden_NH in engine.hidden_states(requests):
                found.append(hidden_NH)
                progress.advance(len(hidden_NH))
    wanted = Wanted(
        rank=config.tail_rank,
        top_k=config.top_k,
        temperatures=config.temperatures,
        max_error=config.max_sketch_error,
    )
    hidden_NH = torch.from_numpy(np.concatenate(found))
    if config.tail_rank > hidden_NH.shape[1] or len(hidden_NH) < 2 * config.tail_rank + 2:
        raise ConfigError(
            f"tail_rank is {config.tail_rank}; the teacher's hidden states have {hidden_NH.shape[1]} values, and "
            f"{len(hidden_NH)} positions are there to fit it to."
        )
    with reporter.progress("sketch: fit", STEPS, "steps") as progress:
        sketch = fit_sketch(hidden_NH, head, wanted, progress)
    reporter.log(told(sketch))
    return sketch.to_bytes()


def told(sketch: FittedSketch) -> str:
    """What a sketch is worth, on one line."""
    record = sketch.record
    errors = ", ".join(f"{kl:.3f} nats at T={T:g}" for T, kl in zip(record.temperatures, record.mean_kl))
    return (
        f"tail sketch of rank {sketch.decoder.rank}, fitted to {record.num_fitted:,} positions; KL of the teacher from "
        f"what is rebuilt beside {record.top_k} exact entries, on {record.num_checked:,} others: {errors}"
    )


def sample_requests(corpus: Corpus, num_targets: int, seed: int = 0) -> Iterator[Request]:
    """Documents of sequences in a random order until they have so many targets; the last one has no more than that."""
    for index in np.random.default_rng(seed).permutation(len(corpus)).tolist():
        (sequence,) = corpus.rows(index, index + 1)
        for number, (token_ids, positions, uniforms) in enumerate(documents_of(sequence)):
            yield Request((index, number), token_ids, positions[:num_targets], uniforms[:num_targets])
            num_targets -= len(positions)
            if num_targets <= 0:
                return


def _require_linear(engine: OpenEngine, head: Head, request: Request, teacher: Teacher) -> None:
    """Raise EngineError unless the head makes the engine's targets of the engine's hidden states."""
    some = dataclasses.replace(
        request, positions=request.positions[:PROBED_TARGETS], uniforms=request.uniforms[:PROBED_TARGETS]
    )
    ((_, hidden_NH),) = engine.hidden_states([some])
    ((_, targets),) = engine.score([some])
    apart = _apart(head.logits(torch.from_numpy(hidden_NH)), targets)
    if not apart <= ALLOWED:
        raise EngineError(
            f"{teacher.folder}: its logits are up to {apart:.2g} nats from its head times its hidden states, so that a "
            "sketch would be one of something else; run without --tail-rank."
        )


def _apart(logits_NV: torch.Tensor, targets: SparseTargets) -> float:
    relative_NV = logits_NV - logits_NV.amax(1, keepdim=True)
    found_NK = relative_NV.gather(1, torch.from_numpy(targets.ids).long())
    return (found_NK - torch.from_numpy(targets.logits)).abs().max().item()
